"""The migration stream: messages, connections, and what two machines compare."""
