"""The kernel's ABI: ioctl numbers, structs and handles of KVM, vhost-net and tun. A leaf room."""
