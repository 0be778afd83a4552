"""Networks that other projects' programs make, each with two hosts for a guest."""
