"""Samples run through the model layer by layer, and the statistics that are left of them."""
