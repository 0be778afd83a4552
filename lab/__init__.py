"""The lab: an emulated host with KVM, guests, and networks to move them between."""
