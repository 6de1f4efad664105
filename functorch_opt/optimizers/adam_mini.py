"""Adam-mini: Adam with one second moment for a whole block of a parameter.

    m  = b1 m + (1 - b1) g
    nu = b2 nu + (1 - b2) mean(g^2)                                          over the block
    u  = m / (1 - b1^t) / (sqrt(nu / (1 - b2^t)) + eps)

Which elements are a block depends on the layer: each element of a bias; a head of queries or keys;
a row of an embedding, of an output layer, of values, of a projection or of an MLP; all of the rest.

Source: Zhang, Chen, Li, Ding, Wu, Kingma, Ye, Luo & Sun, "Adam-mini: Use Fewer Learning Rates To
Gain More", 2024, alg. 1 and 2, and the authors' code.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core import numerics
from functorch_opt._core.chain import chain
from functorch_opt._core.groups import LabelsOrFn, MaskOrFn, partition
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_range,
    check_whole,
    transformation,
)
from functorch_opt.optimizers.adam import scale_by_adam
from functorch_opt.optimizers.matrices import real_part
from functorch_opt.transforms.decay import add_decayed_weights
from functorch_opt.transforms.scale import scale_by_learning_rate

__all__ = ["adam_mini", "scale_by_adam_mini"]

HEADS = ("k_proj", "q_proj", "wq", "wk", "query", "key")
ROWS = (
    *("embed", "embd", "wte", "lm_head", "output", "final_layer"),
    *("v_proj", "wv", "value", "o_proj", "wo", "attn.proj", "attn/proj"),
    *("feed_forward", "linear", "mlp"),
)


def blocks_by_name(path: str, p: Tensor) -> str:
    """What is a block of the parameter at `path`, by the names of the authors."""
    path = path.lower()
    if "bias" in path:
        return "element"
    if p.ndim >= 2 and any(name in path for name in HEADS):
        return "head"
    is_row = p.ndim >= 2 and any(name in path for name in ROWS)
    return "row" if is_row else "tensor"


def _prepare(count, b1, b2):
    t = tree.as_real(count + 1)
    c1 = 1 / (1 - b1**t)
    c2 = 1 / (1 - b2**t)
    return {"w1": 1 - b1, "w2": 1 - b2, "c1": c1, "c2": c2}


def _of_tensors(hyper: dict[str, Any], mu_dtype: Any) -> GradientTransformation:
    """The block is the whole tensor."""

    def rule(g, mu, nu, gg, n, w1, w2, c1, c2, eps):
        mu = torch.lerp(mu, g, w1)
        nu = torch.lerp(nu, gg / (n + (n == 0)), w2)
        u = c1 * mu / ((c2 * nu + tree.TINY).sqrt() + eps)
        return u, {"mu": mu, "nu": nu}

    slots: dict[str, Any] = {
        "mu": partial(tree.zeros_like, dtype=mu_dtype),
        "nu": numerics.scalar_slot(0.0),
    }
    sums = {"gg": lambda g: g.square().sum(), "n": lambda g: g.numel()}
    return leafwise(rule, _prepare, slots=slots, hyper=hyper, sums=sums)


def _of_rows(hyper: dict[str, Any], mu_dtype: Any, k: int) -> GradientTransformation:
    """The block is `k` rows."""

    def first_nu(p):
        _check_rows(p, k)
        return p.real.new_zeros(len(p) // k, dtype=tree.at_least_float32(p.real.dtype))

    def rule(g, mu, nu, w1, w2, c1, c2, eps):
        mu, nu = torch.lerp(mu, g, w1), real_part(nu)
        blocks = [len(nu), k * math.prod(g.shape[1:])]
        if g.numel():
            nu = torch.lerp(nu, g.abs().square().reshape(blocks).mean(1), w2.real)
        size = (c2.real * nu + tree.TINY).sqrt() + eps.real  # [blocks]
        u = c1 * mu.reshape(blocks) / size[:, None]
        return u.reshape(g.shape), {"mu": mu, "nu": nu}

    slots: dict[str, Any] = {
        "mu": partial(tree.zeros_like, dtype=mu_dtype),
        "nu": first_nu,
    }
    return leafwise(rule, _prepare, slots=slots, hyper=hyper, kind="tensorwise")


def _check_rows(p: Tensor, k: int) -> None:
    if not p.dim() or len(p) % k:
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} has no blocks of {k} rows. "
            "Give head_dim the rows of a head, or other labels in blocks."
        )


@transformation
def scale_by_adam_mini(
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    mu_dtype: torch.dtype | None = None,
    *,
    head_dim: int = 1,
    blocks: LabelsOrFn | None = None,
) -> GradientTransformation:
    """Adam whose second moment is a mean over blocks.

    The rule is at the top of `functorch_opt.optimizers.adam_mini`. ``nu`` has one number for each
    block, so the state is about half of Adam's. The state is a dict with those of the keys
    "element", "row", "head" and "tensor" that some parameter has.

    Args:
        b1: decay of the mean, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: added outside the root, 0 or greater.
        mu_dtype: dtype of the mean; by default that of the params, at least float32.
        head_dim: the rows of a head of queries or keys.
        blocks: a label for each parameter, as in `partition`: "element", "row", "head" (`head_dim`
            rows) or "tensor". None means the authors' rules: they look for words in the path, such
            as "bias", "q_proj", "embed", "mlp". What has none of them is one block, and so is all
            that has no name: give ``model.named_parameters()`` to a class.

    Raises:
        ValueError: an argument outside its range; a parameter that cannot be cut into such rows; a
            label that there is not.

    Source: Zhang et al., 2024, alg. 1 and 2; the names are those of adam-mini 1.1.1.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.scale_by_adam_mini(), {"mlp": torch.zeros(2, 2), "norm": torch.zeros(2)}
        >>> g = {"mlp": torch.tensor([[3.0, 4.0], [0.5, 0.5]]), "norm": torch.tensor([1.0, 7.0])}
        >>> u, state = tx.update(g, tx.init(params))
        >>> fo.get(state, "row/nu")["mlp"].shape, fo.get(state, "tensor/nu")["norm"].shape
        (torch.Size([2]), torch.Size([]))
        >>> u["norm"]
        tensor([0.2000, 1.4000])
    """
    check_range(0, 1, b1=b1, b2=b2)
    check_range(0, float("inf"), eps=eps)
    check_whole(1, head_dim=head_dim)
    hyper = {"b1": b1, "b2": b2, "eps": eps}
    stages = {
        "element": scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype),
        "row": _of_rows(hyper, mu_dtype, 1),
        "head": _of_rows(hyper, mu_dtype, head_dim),
        "tensor": _of_tensors(hyper, mu_dtype),
    }
    for name in ("row", "head", "tensor"):
        stages[name].name = "scale_by_adam_mini"  # which errors mention
    return partition(stages, blocks_by_name if blocks is None else blocks)


@transformation
def adam_mini(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    mu_dtype: torch.dtype | None = None,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn | None = None,
    *,
    head_dim: int = 1,
    blocks: LabelsOrFn | None = None,
) -> GradientTransformation:
    """Adam-mini: `scale_by_adam_mini`, decoupled weight decay, the learning rate.

    Args:
        learning_rate: 0 or greater, or a schedule. Learning rates of AdamW fit.
        b1, b2, eps, mu_dtype, head_dim, blocks: see `scale_by_adam_mini`.
        weight_decay: multiplied by the learning rate.
        mask: which parameters decay, see `masked`; by default all. The authors leave out those
            whose names have "norm", "ln" or "bias".

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Zhang et al., 2024.

    Example:
        >>> import functorch_opt as fo
        >>> fo.adam_mini(1e-3, head_dim=64)
        adam_mini(0.001, head_dim=64)
    """
    direction = scale_by_adam_mini(
        b1, b2, eps, mu_dtype, head_dim=head_dim, blocks=blocks
    )
    decay = add_decayed_weights(weight_decay, mask)
    return chain(direction, decay, scale_by_learning_rate(learning_rate))
