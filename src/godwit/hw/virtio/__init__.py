"""virtio 1.2: split virtqueues, the base of all devices, the PCI transport, the devices."""
