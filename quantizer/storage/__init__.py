"""Files on disk: JSON and tensors of others read with limits, and our own written whole."""
