"""NIC models, and the backends that move their frames."""
