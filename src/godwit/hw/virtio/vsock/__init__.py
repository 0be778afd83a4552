"""virtio-vsock: sockets between a guest and its host, whose rings the kernel serves."""
