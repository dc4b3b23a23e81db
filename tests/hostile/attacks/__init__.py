"""Attacks on every reader: good files, mutations of them, and inputs that once broke a reader."""
