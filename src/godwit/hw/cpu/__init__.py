"""The guest's CPU: features by name, what a host offers, baselines, and what differs."""
