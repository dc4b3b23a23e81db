"""Commands of the checkout; never installed."""
