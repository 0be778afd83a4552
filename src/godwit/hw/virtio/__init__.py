"""virtio 1.2: split virtqueues, what a device is, the PCI transport, the devices."""
