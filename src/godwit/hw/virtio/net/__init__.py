"""virtio-net: the device, its control queue and filter, its two backends."""
