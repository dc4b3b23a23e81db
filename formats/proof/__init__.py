"""What the proofs of all formats share: the reference model, and the rows of the parity table."""
