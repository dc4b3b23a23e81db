"""The output folder: who may write it, and the checksums of what is in it."""
