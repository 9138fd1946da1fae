"""Benchmarks of optimizers on small real tasks: ``python -m bench --help``."""
