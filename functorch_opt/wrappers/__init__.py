"""Functions that take a transformation and return another one."""
