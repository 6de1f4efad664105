"""Building blocks that many optimizers share, one family per file."""
