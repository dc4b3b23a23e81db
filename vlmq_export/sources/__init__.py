"""What MODEL may be: a float model, a GPTQ checkpoint that others made, or an artifact of ours."""
