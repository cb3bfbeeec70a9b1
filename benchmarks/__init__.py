"""Benchmarks for development, outside the installed packages: run them from a checkout."""
