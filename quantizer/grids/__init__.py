"""What a weight may become: affine integers, or the block types of GGUF."""
