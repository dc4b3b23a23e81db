"""Levels L1 to L3 of a GPTQ folder, in transformers with gptqmodel and by AutoGPTQ's decoder."""
