"""Levels L1 to L3 of a folder in transformers: the process that loads it, and the rows it gives."""
