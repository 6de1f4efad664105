"""What `groups` may be given beside dicts: no decay, decay by layer, LoRA+, muP."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from functorch_opt._core.transformation import check_choice
from functorch_opt.optim.which import (
    Chooser,
    Parameter,
    chooser,
    parameters_of,
    told,
)
from functorch_opt.tree import PyTree

__all__ = ["layer_decay", "lora_plus", "mup", "no_decay"]

EMBEDDING_NAMES = ("embed", "embedding", "embeddings", "embed_tokens", "wte", "wpe")
"""Parts of a path that say so in a tree of params, which has no types."""


class Choice(NamedTuple):
    """What a rule says of a parameter."""

    rank: float
    """Groups are in this order."""
    label: str
    options: dict[str, Any]


class Rule:
    """A function from all parameters to what it says of each, and the call that made it."""

    def __init__(
        self, call: str, choices: Callable[[list[Parameter], bool], list[Choice]]
    ) -> None:
        self.call, self.choices = call, choices

    def __repr__(self) -> str:
        return self.call


def no_decay(*also: Any, embeddings: bool = True) -> Rule:
    """No weight decay for norms, biases and embeddings: a rule for `functorch_opt.optim.groups`.

    Decay is left out for

    1. parameters of fewer than two dims, and those whose own name has ``bias`` in it;
    2. parameters of a module with ``Norm`` in the name of its class;
    3. embeddings: parameters of a module with ``Embedding`` in the name of its class, and those
       whose own name has ``embed`` or ``token`` in it, such as ``pos_embed`` and ``cls_token``. In
       a tree of params, which has no classes, a part of the path such as ``wte`` says so;
    4. what `also` chooses.

    A matrix that is tied to an embedding is one.

    Args:
        *also: what else does not decay, see `functorch_opt.optim.groups`.
        embeddings: whether embeddings are among them.

    Raises:
        TypeError: one of `also` cannot choose parameters.
        ValueError: one of `also` chooses none.

    Example:
        >>> import torch, functorch_opt as fo
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 2))
        >>> print(fo.optim.groups(model, fo.optim.no_decay(), weight_decay=0.1))
        group     options           tensors  parameters  share
        decay     weight_decay=0.1        1           8  17.4%
        no decay  weight_decay=0          2          38  82.6%
        total                             3          46
    """

    decay = Choice(0, "decay", {})
    none = Choice(1, "no decay", {"weight_decay": 0.0})

    def choices(params: list[Parameter], typed: bool) -> list[Choice]:
        choosers: list[Chooser] = [_is_small]
        if embeddings:
            choosers.append(_is_embedding)
        for one in also:
            chosen = chooser(one, typed)
            if not any(map(chosen, params)):
                raise ValueError(f"no_decay: there is no parameter for {one!r}.")
            choosers.append(chosen)
        left_out = [any(chosen(of) for chosen in choosers) for of in params]
        return [none if of else decay for of in left_out]

    given = [*map(repr, also), *([] if embeddings else ["embeddings=False"])]
    return Rule(f"no_decay({', '.join(given)})", choices)


def _is_small(of: Parameter) -> bool:
    """Whether it is a bias, a number or a parameter of a norm."""
    norms = any("Norm" in type(owner).__name__ for owner in of.owners)
    return of.p.dim() < 2 or "bias" in of.last or norms


def _is_embedding(of: Parameter) -> bool:
    if any("Embedding" in type(owner).__name__ for owner in of.owners):
        return True
    if not of.owners:
        parts = of.path.replace("/", ".").lower().split(".")
        if any(part.rstrip("0123456789_") in EMBEDDING_NAMES for part in parts):
            return True
    return "embed" in of.last or "token" in of.last


# ---- decay by layer ----------------------------------------------------------------------------


def layer_decay(decay: float, blocks: str | Sequence[str] | None = None) -> Rule:
    """A learning rate that shrinks from the head down: a rule for `functorch_opt.optim.groups`.

        lr of layer i = lr decay^(n + 1 - i)

    Layer 0 is what comes before the `n` blocks, layers 1 to n are the blocks, and layer n + 1 is
    what comes after them, mostly the head. What lies between two blocks belongs to the one before
    it. The order is that of ``model.named_parameters()``.

    Args:
        decay: in (0, 1].
        blocks: what the blocks are called, with ``*`` for their number: ``"encoder.layer.*"``; or
            several of these, for instance that of an encoder and that of a decoder. None: the
            list of modules with the most parameters. Print the groups to see which it is.

    Raises:
        ValueError: `decay` is outside of (0, 1]; no blocks of this name; without a name, no list of
            modules, or two that do not lie in each other.
        TypeError: the parameters are a tree, which does not say in which order they are used.

    Source: Clark et al., "ELECTRA", 2020, section 3.1; Bao et al., "BEiT", 2022, whose code counts
    the layers in this way.

    Example:
        >>> import torch, functorch_opt as fo
        >>> layers = [torch.nn.Linear(4, 4, bias=False) for _ in range(2)]
        >>> parts = {"stem": torch.nn.Linear(3, 4), "blocks": torch.nn.Sequential(*layers)}
        >>> model = torch.nn.ModuleDict({**parts, "head": torch.nn.Linear(4, 1)})
        >>> groups = fo.optim.groups(model, fo.optim.layer_decay(0.5), lr=0.8)
        >>> [(group["name"], group["lr"]) for group in groups]  # doctest: +NORMALIZE_WHITESPACE
        [('layer 0: before the blocks', 0.1), ('layer 1: blocks.0', 0.2),
         ('layer 2: blocks.1', 0.4), ('layer 3: after the blocks', 0.8)]
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be in (0, 1]; got {decay}.")

    def choices(params: list[Parameter], typed: bool) -> list[Choice]:
        if not typed:
            raise TypeError(
                "layer_decay needs the model: a tree of params does not say in which order its "
                "layers are used."
            )
        named = _found(params) if blocks is None else blocks
        block_of = _blocks([of.path for of in params], named)
        known = [*dict.fromkeys(filter(None, block_of))]
        names = ["before the blocks", *known, "after the blocks"]
        head = len(known) + 1
        of_layer = []
        for layer, name in enumerate(names):
            options = {"lr_scale": decay ** (head - layer)}
            of_layer.append(Choice(layer, f"layer {layer}: {name}", options))
        return [of_layer[layer] for layer in _layers(block_of, names)]

    named = "" if blocks is None else f", {blocks!r}"
    return Rule(f"layer_decay({decay}{named})", choices)


def _layers(block_of: list[str | None], names: list[str]) -> list[int]:
    """The layer of each parameter; `names` are those of the layers."""
    *_, last = [i for i, block in enumerate(block_of) if block]
    layers, now = [], 0
    for i, block in enumerate(block_of):
        if block:
            now = names.index(block)
        elif i > last:
            now = len(names) - 1
        layers.append(now)
    return layers


def _blocks(paths: list[str], patterns: str | Sequence[str]) -> list[str | None]:
    """The block that each parameter is part of."""
    patterns = [patterns] if isinstance(patterns, str) else [*patterns]
    forms = []
    for pattern in patterns:
        form = re.compile(re.escape(pattern).replace(r"\*", r"\d+") + r"(?=\.)")
        if not any(map(form.match, paths)):
            raise ValueError(
                f"layer_decay: no parameter is in a block {pattern!r}, where * is a number. "
                f"There are {told(_lists(paths)) or 'no lists of modules'}."
            )
        forms.append(form)

    def block_of(path: str) -> str | None:
        for form in forms:
            if found := form.match(path):
                return found.group()
        return None

    return [block_of(path) for path in paths]


def _lists(paths: Iterable[str]) -> list[str]:
    """The lists of at least two modules: ``["encoder.layer.*", ...]``."""
    blocks: dict[str, set[str]] = {}
    for path in paths:
        for place in re.finditer(r"(?<![^.])\d+(?=\.)", path):
            block = path[: place.end()]
            blocks.setdefault(_pattern(block), set()).add(block)
    return [pattern for pattern, of in blocks.items() if len(of) > 1]


def _pattern(block: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", block)


def _found(params: list[Parameter]) -> str:
    """The list of modules with the most parameters."""
    sizes = dict.fromkeys(_lists(of.path for of in params), 0)
    for of in params:
        path = _pattern(of.path)
        for pattern in sizes:
            sizes[pattern] += of.p.numel() if path.startswith(f"{pattern}.") else 0
    if not sizes:
        raise ValueError(
            "layer_decay: there is no list of modules with at least two blocks. "
            "Say what the blocks are called, with * for their number: blocks='layer*'."
        )
    most = max(sizes.values())
    best, *others = [pattern for pattern, size in sizes.items() if size == most]
    large = [pattern for pattern, size in sizes.items() if most > size > most / 10]
    apart = [best]
    for pattern in [*others, *large]:
        if all(_are_apart(pattern, other) for other in apart):
            apart.append(pattern)
    if len(apart) > 1:
        raise ValueError(
            f"layer_decay: the blocks could be those of {told(apart)}. "
            f"Say which: blocks={best!r}, or a tuple of several in order."
        )
    return best


def _are_apart(one: str, other: str) -> bool:
    """Whether two lists do not lie in each other."""
    shorter, longer = sorted([one, other], key=len)
    return not longer.startswith(f"{shorter}.")


# ---- multipliers -------------------------------------------------------------------------------


def lora_plus(ratio: float = 16.0) -> Rule:
    """A larger learning rate for the matrices B of LoRA: a rule for `functorch_opt.optim.groups`.

        lr of B = ratio lr

    A matrix B is what has ``lora_B`` or ``lora_embedding_B`` in its path, as in peft.

    Args:
        ratio: greater than 0. The authors' choice is 16 (2 to the power of 4).

    Raises:
        ValueError: `ratio` is not greater than 0; there is no B.

    Source: Hayou et al., "LoRA+", 2024. The authors' code, and peft's, give biases the larger rate
    too; the paper does not, and nor does this.

    Example:
        >>> import torch, functorch_opt as fo
        >>> params = {"q.lora_A": torch.zeros(2, 8), "q.lora_B": torch.zeros(8, 2)}
        >>> groups = fo.optim.groups(params, fo.optim.lora_plus(16), lr=1e-4)
        >>> [(group["name"], group["lr"]) for group in groups]
        [('rest', 0.0001), ('lora_B', 0.0016)]
    """
    if not ratio > 0:
        raise ValueError(f"ratio must be greater than 0; got {ratio}.")

    rest = Choice(0, "rest", {"lr_scale": 1.0})
    larger = Choice(1, "lora_B", {"lr_scale": float(ratio)})

    def choices(params: list[Parameter], typed: bool) -> list[Choice]:
        is_b = [re.search(r"lora_(embedding_)?B", of.path) for of in params]
        if not any(is_b):
            raise ValueError(
                "lora_plus: no parameter has lora_B in its path. Are the adapters in the model?"
            )
        return [larger if b else rest for b in is_b]

    return Rule(f"lora_plus({ratio})", choices)


def mup(
    base: nn.Module | PyTree,
    optimizer: Literal["adam", "sgd"] = "adam",
    scale_decay: bool = True,
) -> Rule:
    """The learning rates of muP, by width: a rule for `functorch_opt.optim.groups`.

    A dim is a width where it differs from that of `base`, and m is what it was multiplied by. For
    Adam, and others that normalize a gradient:

        a matrix of two widths      lr / m of its last width, which is the fan-in
        else                        lr

    and for SGD:

        a matrix of two widths      lr m_out / m_in
        one width                   lr m
        else                        lr

    These are the learning rates only. The rest of muP is the model's: the output layer multiplies
    what comes in by 1/m, attention scales by 1/d, and initial numbers have the standard deviations
    of the paper.

    Args:
        base: the same model with the widths at which the learning rate was found, or its params.
            It may be on the meta device.
        optimizer: ``"adam"`` or ``"sgd"``.
        scale_decay: whether the decay is multiplied by the inverse, so that the decay of a step,
            which torch multiplies by lr, is that of the base model. Then `groups` must be given
            ``weight_decay``.

    Raises:
        ValueError: `base` has parameters of other names or of other dims; more than two widths.

    Source: Yang & Hu et al., "Tensor Programs V", 2022, table 8. It is what ``MuAdam`` and
    ``MuSGD`` of the authors' package mup do.

    Example:
        >>> import torch, functorch_opt as fo
        >>> def mlp(width):
        ...     hidden = torch.nn.Linear(width, width, bias=False)
        ...     return torch.nn.Sequential(torch.nn.Linear(3, width), hidden)
        >>> rule = fo.optim.mup(mlp(4), scale_decay=False)
        >>> print(fo.optim.groups(mlp(16), rule, lr=0.1))
        group      options   tensors  parameters  share
        lr x 1     lr=0.1          2          64  20.0%
        lr x 0.25  lr=0.025        1         256  80.0%
        total                      3         320
    """
    check_choice("adam", "sgd", optimizer=optimizer)
    shapes = {of.path: of.p.shape for of in parameters_of(base)}

    def choices(params: list[Parameter], typed: bool) -> list[Choice]:
        _check_same(shapes, params)
        found = []
        for of in params:
            scale = _mup_scale(of.path, of.p, shapes[of.path], optimizer)
            options = {"lr_scale": scale}
            if scale_decay:
                options["weight_decay_scale"] = 1 / scale
            found.append(Choice(-scale, f"lr x {scale:.4g}", options))
        return found

    return Rule(f"mup({type(base).__name__}, {optimizer!r}, {scale_decay})", choices)


def _check_same(shapes: Mapping[str, Any], params: list[Parameter]) -> None:
    mine = {of.path for of in params}
    if differing := sorted(mine ^ shapes.keys()):
        raise ValueError(
            f"mup: base and the model have other parameters: {told(differing)}. "
            "Give the same model with other widths."
        )


def _mup_scale(path: str, p: Tensor, base: Sequence[int], optimizer: str) -> float:
    """What the learning rate of a parameter is multiplied by."""
    if p.dim() != len(base):
        raise ValueError(
            f"mup: {path!r} has shape {list(p.shape)}, and {list(base)} in base: widths may "
            "differ, and dims may not."
        )
    by: dict[int, float] = {}
    pairs = zip(p.shape, base, strict=True)
    for i, (size, of_base) in enumerate(pairs):
        if size != of_base:
            by[i] = size / of_base
    if len(by) > 2:
        raise ValueError(
            f"mup: {path!r} has shape {list(p.shape)}, and {list(base)} in base: a parameter of "
            "more than two widths has no rule."
        )
    m = [by[i] for i in sorted(by)]  # of a matrix: out, in
    if len(m) == 2:
        return 1 / m[1] if optimizer == "adam" else m[0] / m[1]
    return m[0] if m and optimizer == "sgd" else 1.0
