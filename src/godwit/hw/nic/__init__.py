"""Network cards: the NIC capability, the models, and the frames on their way into a guest."""
