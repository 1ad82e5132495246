"""Documents into packed sequences: which go together, and the loss weight of each token."""
