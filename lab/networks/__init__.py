"""Networks that other projects' programs make, with two hosts for a guest, in network namespaces."""
