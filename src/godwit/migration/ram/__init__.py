"""RAM on its way: dirty logs, runs of pages, convergence, throttling, population."""
