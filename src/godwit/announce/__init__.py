"""The announcement of a guest at its new host (docs/announcement.md)."""
