"""Levels L1 to L3 of a GGUF export, in llama.cpp."""
