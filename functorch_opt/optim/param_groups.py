"""Parameter groups by name, module, shape or function, with a table that shows what is where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from functorch_opt._core.transformation import check_choice
from functorch_opt.optim.rules import Choice, Rule
from functorch_opt.optim.which import (
    Parameter,
    chooser,
    name_of,
    parameters_of,
    told,
)
from functorch_opt.tree import PyTree

__all__ = ["ByPath", "ParamGroups", "groups"]

REST = "*"
"""The key of a dict that stands for what no other key chooses."""
SCALE = "_scale"
"""The end of an option that multiplies another one."""
HEADER = (
    "group",
    "options",
    "tensors",
    "parameters",
    "share",
)


class ByPath:
    """A function of path and parameter that looks its value up, for `partition` and `masked`.

    Args:
        values: ``{path: value}``.

    Attributes:
        values: as given.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = dict(values)

    def __call__(self, path: str, p: Tensor) -> Any:
        """The value of the parameter at `path`.

        Raises:
            ValueError: there was no such parameter when the groups were made.
        """
        if path not in self.values:
            raise ValueError(
                f"the groups have no parameter at {path!r}: make them from this model or from "
                "these params."
            )
        return self.values[path]

    def __repr__(self) -> str:
        return f"ByPath({self.values!r})"


class ParamGroups(list[dict[str, Any]]):
    """A list of parameter groups, for any `torch.optim.Optimizer`. `groups` makes it.

    Printed, it is a table.

    Attributes:
        labels: a function of path and parameter, for `partition`: the option ``algorithm`` of its
            group, or else the name of the group.
    """

    def __init__(self) -> None:
        super().__init__()
        self.labels = ByPath({})
        self._labels_of: dict[str, list[str]] = {}
        self._notes: list[str] = []
        self._options: set[str] = set()

    def _add(
        self,
        group: dict[str, Any],
        labels: list[str],
        params: list[Parameter],
    ) -> None:
        """Add a group, whose parameters were given these labels."""
        name = group.get("algorithm", group["name"])
        for of in params:
            self.labels.values |= dict.fromkeys(of.names, name)
            self._labels_of |= dict.fromkeys(of.names, labels)
        self.append(group)
        for option in group.keys() - {"params", "name"}:
            if not option.endswith(SCALE):
                self._options.add(option)

    def mask(self, *labels: str) -> ByPath:
        """A function of path and parameter, for `masked` and ``mask=``: whether one of the rules
        has given the parameter one of these labels.

        Args:
            *labels: for instance ``"decay"``. The name of a group consists of them.

        Raises:
            ValueError: nothing has such a label.
        """
        known = {label for of in self._labels_of.values() for label in of}
        unknown = [label for label in labels if label not in known]
        if unknown:
            raise ValueError(
                f"no rule has the label {told(unknown)}; there are {told(sorted(known))}."
            )
        wanted = {*labels}
        return ByPath(
            {path: bool(wanted & {*of}) for path, of in self._labels_of.items()}
        )

    def __str__(self) -> str:
        sizes = [[p.numel() for p in _params(group)] for group in self]
        total = sum(map(sum, sizes))
        rows: list[tuple[str, ...]] = [HEADER]
        for group, of_group in zip(self, sizes, strict=True):
            n = sum(of_group)
            row = (
                group["name"],
                self._shown(group),
                f"{len(of_group):,}",
                f"{n:,}",
                f"{n / max(total, 1):.1%}",
            )
            rows.append(row)
        tensors = sum(map(len, sizes))
        rows.append(("total", "", f"{tensors:,}", f"{total:,}", ""))
        return "\n".join([*_aligned(rows), *self._notes])

    def _shown(self, group: dict[str, Any]) -> str:
        """The options that were given. Those that an optimizer has added are left out."""
        shown = []
        for name, value in group.items():
            if name in self._options:
                number = f"{value:.4g}" if isinstance(value, float) else str(value)
                shown.append(f"{name}={number}")
        return " ".join(shown)


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """The lines of a table: two columns of words, and then numbers."""
    columns = zip(*rows, strict=True)
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in rows:
        pairs = [*zip(row, widths, strict=True)]
        words = [cell.ljust(width) for cell, width in pairs[:2]]
        numbers = [cell.rjust(width) for cell, width in pairs[2:]]
        line = "  ".join([*words, *numbers])
        lines.append(line.rstrip())
    return lines


def _params(group: dict[str, Any]) -> list[Tensor]:
    """The parameters, of which an optimizer has taken the names apart."""
    return [p[1] if isinstance(p, tuple) else p for p in group["params"]]


def groups(
    params: nn.Module | PyTree,
    *rules: Mapping[Any, Mapping[str, Any]] | Rule,
    overlap: Literal["error", "first"] = "error",
    empty: Literal["error", "skip"] = "error",
    frozen: Literal["keep", "leave out"] = "keep",
    **options: Any,
) -> ParamGroups:
    """Parameter groups for any optimizer, those of `torch.optim` among them.

    A rule is a dict, ``{which parameters: their options}``, or one of `no_decay`, `layer_decay`,
    `lora_plus` and `mup`. *Which* is

    - a pattern of names, in which ``*`` stands for any characters: ``"head.*"``;
    - a class of modules, for all parameters in such a module, at any depth: ``nn.LayerNorm``;
    - a shape, with None for any size: ``(None, 768)``;
    - a function of path and parameter: ``lambda path, p: p.ndim > 1``;
    - a tuple of these, for all that any of them chooses.

    ``"*"`` as the last key is the rest. Each rule gives each parameter options, and the groups are
    the parameters that were given the same by every rule. Where two rules give one option, that of
    the first rule holds, and `options` are for what no rule has given. A factor multiplies:
    ``lr_scale`` is a factor of ``lr``, and those of several rules are multiplied. It stays in the
    group beside ``lr``, for schedulers that set the rate anew.

    Print the groups to see what is where. Every group has a ``name``, which another one can be
    given by the option ``name`` in a dict.

    Args:
        params: a model, or a tree of params, which has names and shapes but no modules.
        *rules: as above.
        overlap: what two keys of a dict may do that choose one parameter. ``"first"``: the first
            one has it.
        empty: what a key may do that chooses nothing. ``"skip"``: it is left out.
        frozen: what becomes of parameters without ``requires_grad``. They may be in an optimizer,
            which has no state for them, and go on when they are trained later.
        **options: options of all groups, such as ``lr`` and ``weight_decay``.

    A tied weight has all its names, and is in one group. A parameter of a lazy module has no shape:
    call the model once before.

    Raises:
        ValueError: keys that overlap, or choose nothing; parameters that a dict without ``"*"``
            leaves over; a factor of an option that is not given; parameters without a shape.
        TypeError: what cannot choose parameters.

    Example:
        >>> import torch, functorch_opt as fo
        >>> layers = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)
        >>> model = torch.nn.Sequential(*layers)
        >>> rates = {"2.*": {"lr": 0.01, "name": "head"}, "*": {"lr": 0.001}}
        >>> groups = fo.optim.groups(model, rates, fo.optim.no_decay(), weight_decay=0.1)
        >>> print(groups)
        group           options                    tensors  parameters  share
        head, decay     lr=0.01 weight_decay=0.1         1          32   6.3%
        head, no decay  lr=0.01 weight_decay=0           1           4   0.8%
        rest, decay     lr=0.001 weight_decay=0.1        1          64  12.6%
        rest, no decay  lr=0.001 weight_decay=0          2         408  80.3%
        total                                            5         508
        >>> opt = torch.optim.AdamW(groups)
        >>> tx = fo.adamw(0.01, weight_decay=0.1, mask=groups.mask("decay"))
    """
    check_choice("error", "first", overlap=overlap)
    check_choice("error", "skip", empty=empty)
    check_choice("keep", "leave out", frozen=frozen)
    found = parameters_of(params)
    typed = isinstance(params, nn.Module)
    said = []
    for rule in rules:
        if isinstance(rule, Rule):
            said.append(rule.choices(found, typed))
        else:
            said.append(_of_dict(rule, found, typed, overlap, empty))
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i in range(len(found)):
        choices = [of_rule[i] for of_rule in said]
        key = tuple([(choice.rank, choice.label) for choice in choices])
        alike.setdefault(key, []).append(i)
    made = ParamGroups()
    for key in sorted(alike):
        first = alike[key][0]
        choices = [of_rule[first] for of_rule in said]
        params_of = [found[i] for i in alike[key]]
        group = {
            "params": _kept(params_of, frozen),
            **_options(choices, options),
        }
        labels = [choice.label for choice in choices]
        made._add(group, labels, params_of)
    made[:] = [group for group in made if group["params"]]
    _complete(made)
    made._notes = _notes(found, frozen)
    return made


def _kept(params: list[Parameter], frozen: str) -> list[tuple[str, Tensor]]:
    """The named parameters of a group."""
    keep = frozen == "keep"
    return [(of.path, of.p) for of in params if keep or of.p.requires_grad]


def _complete(made: list[dict[str, Any]]) -> None:
    """Give every group each factor that one of them has."""
    factors = {name for group in made for name in group if name.endswith(SCALE)}
    for group in made:
        for name in factors:
            group.setdefault(name, 1.0)


def _of_dict(
    rule: Mapping[Any, Mapping[str, Any]],
    params: list[Parameter],
    typed: bool,
    overlap: str,
    empty: str,
) -> list[Choice]:
    """What a dict says of each parameter."""
    if not isinstance(rule, Mapping):
        raise TypeError(
            "a rule is a dict, {which parameters: options}, or what no_decay, layer_decay, "
            f"lora_plus or mup made; got {type(rule).__name__} {rule!r}."
        )
    keys = [key for key in rule if key != REST]
    chosen_by: list[list[Any]] = [[] for _ in params]
    for key in keys:
        chosen = chooser(key, typed)
        for i, of in enumerate(params):
            if chosen(of):
                chosen_by[i].append(key)
    if overlap == "error":
        _check_overlap(params, chosen_by)
    first = [by[0] if by else REST for by in chosen_by]
    if empty == "error":
        _check_empty(keys, first, chosen_by)
    if REST in first and REST not in rule:
        pairs = zip(params, first, strict=True)
        left = [of.path for of, key in pairs if key == REST]
        raise ValueError(
            f"no key of the dict chooses {told(left)}. "
            "Add '*' for the rest: {..., '*': {}}."
        )
    of_key = {}
    for rank, (key, options) in enumerate(rule.items()):
        of_key[key] = _choice(rank, key, options)
    _check_labels([choice.label for choice in of_key.values()])
    return [of_key[key] for key in first]


def _choice(rank: int, key: Any, options: Mapping[str, Any]) -> Choice:
    rest = {name: value for name, value in options.items() if name != "name"}
    default = "rest" if key == REST else name_of(key)
    return Choice(rank, options.get("name", default), rest)


def _check_labels(labels: list[str]) -> None:
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(
                f"several keys of the dict are called {label!r}. "
                "Give them names: {which: {'name': ..., ...}}."
            )


def _check_overlap(params: list[Parameter], chosen_by: list[list[Any]]) -> None:
    twice = [i for i, by in enumerate(chosen_by) if len(by) > 1]
    if not twice:
        return
    first, *others = twice
    path = params[first].path
    keys = [repr(name_of(key)) for key in chosen_by[first]]
    more = f" (and {len(others)} more)" if others else ""
    raise ValueError(
        f"{' and '.join(keys)} both choose {path!r}{more}. Make them disjoint, "
        "or let the first one have it: overlap='first'."
    )


def _check_empty(
    keys: list[Any],
    first: list[Any],
    chosen_by: list[list[Any]],
) -> None:
    for key in keys:
        if key in first:
            continue
        why = "no parameter is chosen"
        if any(key in by for by in chosen_by):
            why = "an earlier key has all that it chooses"
        raise ValueError(
            f"there is nothing for {name_of(key)!r}: {why}. Mend or remove it, "
            "or allow it: empty='skip'."
        )


def _options(choices: list[Choice], of_all: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group, from what the rules say and what is for all."""
    given: dict[str, Any] = {}
    factors: dict[str, float] = {}
    for options in [*(choice.options for choice in choices), of_all]:
        for name, value in options.items():
            if name.endswith(SCALE):
                factors[name] = factors.get(name, 1.0) * value
            else:
                given.setdefault(name, value)
    for name, factor in factors.items():
        of = name.removesuffix(SCALE)
        if of in given:
            given[of] = given[of] * factor
        elif "algorithm" not in given:
            raise ValueError(
                f"a rule multiplies {of}, which is not given: no optimizer would do that by "
                f"itself. Give it for all: groups(model, ..., {of}=...)."
            )
    labels = [choice.label for choice in choices]
    ordered = {name: given[name] for name in sorted(given, key=_place)}
    return {
        "name": ", ".join(labels) or "all",
        **ordered,
        **factors,
    }


def _place(name: str) -> tuple[int, str]:
    """Where an option is shown."""
    return {"algorithm": 0, "lr": 1}.get(name, 2), name


def _notes(params: list[Parameter], frozen: str) -> list[str]:
    """What a table says besides: tied weights and frozen parameters."""
    notes = []
    for of in params:
        first, *others = of.names
        if others:
            notes.append(f"{first} is also {', '.join(others)}")
    still = [of for of in params if not of.p.requires_grad]
    if still:
        where = "among these" if frozen == "keep" else "left out"
        n = sum([of.p.numel() for of in still])
        names = told([of.path for of in still], 2)
        notes.append(
            f"frozen, and {where}: {len(still):,} tensors, {n:,} parameters ({names})"
        )
    return notes
