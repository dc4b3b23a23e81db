"""Attacks on every reader: seeds, mutations, the targets that are fuzzed, and the corpus of what once broke them."""
