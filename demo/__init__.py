"""What functorch_opt does, in three short experiments: ``python -m demo``."""
