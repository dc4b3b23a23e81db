"""Passes over a graph: operators are fused, integers are filled in, and linears are merged."""
