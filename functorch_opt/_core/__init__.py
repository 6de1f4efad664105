"""The theory: what a transformation is, and what `update` means."""
