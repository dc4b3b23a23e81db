"""GGML's block types: their sizes, packing and decoding, and which of them holds which grid."""
