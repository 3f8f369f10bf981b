"""Benchmarks: each prints one JSON line last; results are kept in bench/results."""
