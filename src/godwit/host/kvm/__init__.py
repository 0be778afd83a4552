"""KVM: ioctl numbers, structs, handles, and saved state."""
