"""A guest in a file: saved, checked, and restored whole or page by page."""
