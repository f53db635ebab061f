"""Files as named tensors; independent of models."""
