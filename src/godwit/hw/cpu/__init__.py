"""The guest's CPU: its features by name, what a host offers, baselines, and what differs."""
