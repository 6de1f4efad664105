"""Many settings trained in one run."""
