"""The lab: an emulated host with KVM, guests, and networks for their migrations."""
