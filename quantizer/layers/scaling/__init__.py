"""Scales of input channels, which what comes before a linear takes the inverse of."""
