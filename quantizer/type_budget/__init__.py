"""A block type for each matrix under a budget of bits, by measured cost."""
