"""Measurements, each a command of its own; what they printed is in docs/benchmarks.md."""
