"""Benchmarks of lmms-eval on every file of a run, each in its own runtime."""
