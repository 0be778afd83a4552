"""RAM during a migration: dirty logs, runs of pages, convergence, throttling, population."""
