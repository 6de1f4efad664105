"""Building blocks that many optimizers share, one family per file.

Their names are in `functorch_opt` itself.
"""

from functorch_opt._elsewhere import missing as _missing


def __getattr__(name: str) -> object:
    """An error, which of a name of ``optax.transforms`` says where it is."""
    raise _missing("functorch_opt.transforms", name)
