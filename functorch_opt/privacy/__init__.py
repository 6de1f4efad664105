"""Gradients of each example, and private optimizers."""
