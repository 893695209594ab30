"""Benchmarks of the ops: `python -m jax_awq.bench --help`."""
