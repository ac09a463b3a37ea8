"""Benchmarks against the peers: `stepkto bench`, or `python benchmarks/run.py` in a checkout."""
