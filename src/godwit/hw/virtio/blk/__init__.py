"""virtio-blk: disks (virtio 1.2, 5.2)."""
