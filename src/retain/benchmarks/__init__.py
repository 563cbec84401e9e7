"""Benchmarks by name: each gives one Stream."""
