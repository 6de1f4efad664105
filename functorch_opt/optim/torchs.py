"""Two classes that are torch's own, so that `functorch_opt.optim` is complete.

L-BFGS evaluates the model many times within a step: that is no transformation of gradients, and
torch's loop does it well. SparseAdam works on the layout of sparse gradients, which no rule for a
tensor sees. So neither takes ``compile``.
"""

from __future__ import annotations

from typing import Any

import torch.optim

__all__ = ["LBFGS", "SparseAdam"]


class LBFGS(torch.optim.LBFGS):
    """torch.optim.LBFGS, which it is but for one mended defect: a copy or a pickle of it can make
    steps too.

    Args:
        params: parameters or one group.
        lr: factor of the direction; 1 with a line search.
        max_iter: iterations within a step.
        max_eval: evaluations within a step; None: ``max_iter * 5 / 4``.
        tolerance_grad: a step ends where no number of the gradient is larger.
        tolerance_change: a step ends where parameters or loss change by less.
        history_size: pairs that the curvature is estimated from.
        line_search_fn: None or ``"strong_wolfe"``.

    ``step(closure)`` needs the closure: it clears the gradients, calls ``backward`` and returns the
    loss. For a pure L-BFGS, to be vmapped or differentiated, see the functional layer.

    Raises:
        ValueError: more than one group.

    Source: Nocedal & Wright, "Numerical Optimization", 2006, algs. 7.4, 3.5 and 3.6.

    Example:
        >>> import torch, functorch_opt as fo
        >>> w = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> opt = fo.optim.LBFGS([w], line_search_fn="strong_wolfe")
        >>> def closure():
        ...     opt.zero_grad()
        ...     loss = ((w - 1) ** 2).sum()
        ...     loss.backward()
        ...     return loss
        >>> first_loss = opt.step(closure)
        >>> w.allclose(torch.ones(2))
        True
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._params, self._numel_cache = self.param_groups[0]["params"], None


class SparseAdam(torch.optim.SparseAdam):
    """torch.optim.SparseAdam as it is: Adam for sparse gradients, which touches only the rows that
    have one.

    Args:
        params: dense parameters, named parameters or groups; their gradients must be sparse
            (``nn.Embedding(..., sparse=True)``).
        lr: learning rate, greater than 0; a float or a 1-element tensor.
        betas: decays of the two moments, in [0, 1).
        eps: greater than 0.
        maximize: ascend.

    Its numbers are not those of `Adam` on the same gradients: rows without gradient keep their
    moments. If dense gradients fit into memory (``sparse=False``), take `Adam`, which composes,
    compiles and keeps dtypes.

    Raises:
        ValueError: an argument outside its range; a sparse parameter.

    Example:
        >>> import torch, functorch_opt as fo
        >>> table = torch.nn.Embedding(5, 2, sparse=True)
        >>> opt = fo.optim.SparseAdam(table.parameters(), lr=0.1)
        >>> before = table.weight.detach().clone()
        >>> table(torch.tensor([3])).sum().backward()
        >>> opt.step()
        >>> (table.weight != before).any(dim=1)
        tensor([False, False, False,  True, False])
    """
