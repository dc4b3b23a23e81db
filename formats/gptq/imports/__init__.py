"""Import of GPTQ checkpoints that other programs made."""
