"""From rows of a file to samples that the model can run."""
