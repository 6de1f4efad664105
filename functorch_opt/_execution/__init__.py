"""How declarations are run: compiled, in place."""
