"""Measurements of the spectral parameter space. Each module is a command: `python -m benchmarks.train_step --json`."""
