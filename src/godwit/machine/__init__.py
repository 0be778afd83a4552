"""The machine: board, vCPUs, devices, and its saved state."""
