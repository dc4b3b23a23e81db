"""The float graphs of each model family: operators and parameters, without the weights' values."""
