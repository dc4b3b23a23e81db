"""The GGUF container, and what is written into the text model, the mmproj and the imatrix."""
