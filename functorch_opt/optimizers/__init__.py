"""Optimizers, one family per file: the rule and the ready-made chain together."""
