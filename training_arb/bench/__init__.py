"""Benchmarks: measurements, peers and reports."""
