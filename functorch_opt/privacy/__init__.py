"""The gradients of single examples, and private optimizers."""
