"""Levels L1 to L3 of a compressed-tensors folder, in transformers with the library."""
