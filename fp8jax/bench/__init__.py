"""Benchmarks against the peers: `python -m fp8jax.bench NAME` prints a table of ratios, all timed
in one run.
"""
