"""Network cards: what every NIC is, and the frames on their way into a guest."""
