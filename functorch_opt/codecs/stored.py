"""Slots in fewer bytes, around any transformation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from functorch_opt import random, tree
from functorch_opt._core.chain import Chain
from functorch_opt._core.groups import Groups
from functorch_opt._core.inject import Injected
from functorch_opt._core.rule import Leafwise
from functorch_opt._core.structure import Path
from functorch_opt._core.transformation import GradientTransformation, transformation
from functorch_opt.codecs.codec import CODECS, Codec
from functorch_opt.codecs.coded import Choice, Coded

__all__ = ["large_matrices", "stored"]

Codes = str | Mapping[str, str]


def large_matrices(path: Path, p: Tensor) -> bool:
    """Which parameters `stored` stores the slots of by default: those of 4,096 elements and more.

    Of these it leaves out vectors, which are biases and weights of norms, and every parameter with
    ``embed`` in its path. Embeddings are known to need precise moments.

    Args:
        path: where the parameter is, such as ``"layers/0/weight"``.
        p: the parameter.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.large_matrices("fc/weight", torch.zeros(64, 64))
        True
        >>> fo.large_matrices("embed/weight", torch.zeros(64, 64))
        False
    """
    return p.dim() > 1 and p.numel() >= 4096 and "embed" not in path


@transformation
def stored(
    inner: GradientTransformation,
    codes: Codes = "8bit",
    *,
    where: Choice = large_matrices,
    key: Tensor | int = 0,
) -> GradientTransformation:
    """`inner`, whose slots are stored in fewer bytes.

    A rule reads its slots in float32 and returns them in float32. Between the steps they are in a
    code. Decoding, the rule and encoding are one rule. Where tensors are updated in place, an
    elementwise rule sees a piece of them at a time, and no slot is ever whole in float32. A rule
    with sums over its tensor, or one that needs all of it, sees it whole; so does `update`, which
    is pure.

        "8bit"                 one byte an element, and a float32 scale for each block of 256
        "4bit"                 half a byte, and a float32 scale for each block of 128
        "float8"               one byte, and a bfloat16 scale for each block of 128
        "bfloat16"             two bytes, rounded to nearest
        "bfloat16_stochastic"  two bytes, rounded up or down at random

    A block of ``"8bit"`` is 256 consecutive elements of the flattened tensor. Its scale s is the
    largest ``|x|`` of it, and the code is the nearest level of ``x / s`` in the dynamic map. If no
    number of the block rounds to a negative level, as in second moments, the block has the unsigned
    map, with twice as many levels, and its scale is written as ``-s``. So this is decided by the
    numbers at hand, at every step. A block with an infinity or a NaN has no finite number
    afterwards. Numbers below 2.7e-7 of the largest one become 0.

    ``"4bit"`` does the same with 16 levels. A block of which all numbers are positive has the levels
    1/16, 2/16, ..., 1, without a 0, and any other one a dynamic map of three decades. ``"float8"`` has
    the format e4m3fn, and scales that are powers of two. In a block without negative numbers neither
    makes a positive number 0. A number of ``"4bit"`` may be off by a sixth of the largest of its
    block, so train with it and look at the loss before you rely on it.

    The state of the slot ``mu`` becomes ``mu``, with the codes in the shape of the parameter, and
    ``mu_scale``. Of ``"4bit"`` two codes are in a byte: the last dimension is half as long, or if it
    is odd, the codes are a vector. On leaves that are not chosen ``mu`` is what it was, and ``mu_scale`` is empty.

    Rounding to nearest in bfloat16 loses steps below 1/512 of a number. A second moment with a
    decay of 0.999 moves by less than that, and stays too large. Give ``"bfloat16"`` to the first
    moment, by its name, and ``"bfloat16_stochastic"`` to the second.

    Rounding at random keeps such steps on average, as in `stochastic_round`: the expected value of
    what is stored is the number itself. Each stage keeps a key for it, ``rounding_key``, and a
    count, so its bits are the same in every execution and after a restart. In a step they take four
    bytes for each element of two slots, which is more than the slots are smaller by. Where memory
    in the middle of a step counts, take another code.

    Not stored in a code are: slots that are stored in one already; slots of wrappers (such as a
    master copy); slots of complex tensors, and of those with one element or none; and, unless
    `codes` names them, slots that do not start at zero, for these are no moments but parameters, step
    sizes or matrices.

    Of sharded tensors codes lie with the parameter and scales on every rank. Blocks are those of the
    whole tensor, and codes and scales those of one process. The ranks exchange the bounds of all
    blocks in one message, before the rule, which is therefore worked out twice. The codes in bfloat16
    have no blocks and send nothing; random bits are drawn by the place in the whole tensor. For
    ``"4bit"`` each rank's part of the last dimension must be even.

    Args:
        inner: any transformation. What is made of rules in it is looked into.
        codes: the code of all slots that start at zero, or ``{slot: code}`` for slots by name.
        where: a function of path and parameter that chooses leaves; see `large_matrices`.
        key: int64 [2], see `functorch_opt.random.key`, or a seed, for rounding at random. Each stage
            has a key of its own, made of this one and of its place in `inner`.

    Raises:
        NotImplementedError: (by ``update``) a leaf that is chosen is sharded, in ``torch.compile``.
        TypeError: (by ``init``) a leaf that is chosen for ``"4bit"`` is sharded, and a rank has an odd
            part of its last dimension; `inner` is not a transformation; something that is not a key.
        ValueError: a code or a slot that there is not; no slot that starts at zero; (by ``init``) a
            slot for ``"4bit"`` that has not the shape of its parameter.

    Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2021, arXiv:2110.02861,
    sections 2 and 3. Li et al., "Memory Efficient Optimizers with 4-bit States", 2023,
    arXiv:2309.01507, sections 3 and 4. bitsandbytes decides once for each slot which map it has; and a block whose
    largest number is negative there loses 0.7% of it at every step.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.stored(fo.scale_by_adam(), "8bit")
        >>> print(fo.describe(tx.init({"w": torch.zeros(64, 64), "b": torch.zeros(64)})))
        shared/count      ()        int64        8 B
        slots/mu/b        (64,)     float32    256 B
        slots/mu/w        (64, 64)  uint8    4,096 B
        slots/mu_scale/b  (0,)      float32      0 B
        slots/mu_scale/w  (16,)     float32     64 B
        slots/nu/b        (64,)     float32    256 B
        slots/nu/w        (64, 64)  uint8    4,096 B
        slots/nu_scale/b  (0,)      float32      0 B
        slots/nu_scale/w  (16,)     float32     64 B
        total                                8,840 B
    """
    if not isinstance(inner, GradientTransformation):
        raise TypeError(
            f"stored takes a transformation, e.g. adamw(1e-3); got {type(inner).__name__} {inner!r}."
        )
    wanted, first = _codecs(codes), random.as_key(key)
    found: dict[str, bool] = {}
    tx = _rebuilt(inner, lambda rule, at: _coded(rule, wanted, where, found, first, at))
    named = wanted if wanted.keys() - {""} else {}
    for name in named:
        if name not in found:
            raise ValueError(
                f"no slot of {inner!r} is stored in a code: its rules have the slots "
                f"{sorted(found)}, of which none is called {name!r}."
            )
    if not any(found.values()):
        raise ValueError(
            f"no slot of {inner!r} starts at zero; its rules have the slots {sorted(found)}. "
            "Name those that you mean: codes={slot: code}."
        )
    return tx


def _codecs(codes: Codes) -> dict[str, Codec]:
    """The codec of each slot by name; that of "" is for all that start at zero."""
    given = {"": codes} if isinstance(codes, str) else dict(codes)
    for name in given.values():
        if name not in CODECS:
            raise ValueError(f"codes are {sorted(CODECS)}; got {name!r}.")
    return {slot: CODECS[name] for slot, name in given.items()}


def _coded(
    rule: Leafwise,
    wanted: Mapping[str, Codec],
    where: Choice,
    found: dict[str, bool],
    key: Tensor,
    at: str,
) -> Leafwise:
    """A rule with the slots that are `wanted` in a code; in `found`, whether each one is.

    Of the key it has one of its own, by its place `at`.
    """
    if isinstance(rule, Coded):
        found.update(dict.fromkeys(rule.codecs, True))
        return rule
    codecs = {}
    for slot, first in rule.slots.items():
        codec = wanted.get(slot)
        if codec is None and starts_at_zero(first):
            codec = wanted.get("")
        found.setdefault(slot, False)
        if codec is not None:
            found[slot] = True
            codecs[slot] = codec
    if not codecs:
        return rule
    number = _number_of(f"{at}/{rule.name}")
    return Coded(rule, codecs, where, random.fold_in(key, number))


def _number_of(text: str) -> int:
    """A number for a text, the same in every process. Dynamo can trace it, unlike a checksum."""
    number = 0
    for letter in text:
        number = (31 * number + ord(letter)) % 2**31
    return number


def starts_at_zero(first: Callable[[Tensor], Tensor]) -> bool:
    """Whether a slot has the shape of the parameter, and its first values are zeros."""
    function = first.func if isinstance(first, partial) else first
    if function is tree.zeros_like or function is torch.zeros_like:
        return True  # without looking, which cannot be done in a graph
    p = torch.ones(2, 3)
    try:
        x = first(p)
    except Exception:
        return False  # it is not for every shape
    return x.shape == p.shape and x.is_floating_point() and not x.any()


def _rebuilt(tx: Any, f: Callable[[Leafwise, str], Leafwise], at: str = "") -> Any:
    """`tx`, with `f` applied to all rules in it, and to the place of each."""
    if isinstance(tx, Leafwise):
        return f(tx, at)
    new = copy.copy(tx)
    vars(new).pop("_entries", None)
    if isinstance(tx, Chain):
        stages = tx.stages.items()
        new.stages = {name: _rebuilt(of, f, f"{at}/{name}") for name, of in stages}
        new.passes = new._passes()
    elif isinstance(tx, Groups):
        inside = tx.inside.items()
        new.inside = {label: _rebuilt(of, f, f"{at}/{label}") for label, of in inside}
    elif isinstance(tx, Injected):
        # At once, to say what is wrong.
        _rebuilt(tx.factory(**tx.fixed, **tx.numbers), f, at)
        vars(new).pop("_made", None)
        new.factory = lambda **given: _rebuilt(tx.factory(**given), f, at)
    elif isinstance(getattr(tx, "inner", None), GradientTransformation):
        new.inner = _rebuilt(tx.inner, f, at)
    return new
