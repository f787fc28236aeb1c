"""Benchmarks: ``python -m jepa_dist.bench NAME``, a table on the console and JSON in a file."""
