"""Each real runtime against the fake-quantized reference."""
