"""How a decoder layer and the output head are quantized, method by method."""
