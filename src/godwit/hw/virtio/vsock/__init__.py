"""virtio-vsock: sockets between a guest and the host, whose rings the kernel serves."""
