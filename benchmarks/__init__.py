"""What a step, a fit and log p(x) cost, against whom, and how that is measured: `python -m benchmarks --help`."""
