"""KVM: its numbers, structs and handles, and what is saved of it."""
