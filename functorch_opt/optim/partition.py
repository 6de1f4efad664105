"""Several algorithms as one `torch.optim.Optimizer`, each with options of its own in the groups."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from functorch_opt._core.groups import check_takes_path_and_leaf
from functorch_opt._core.transformation import GradientTransformation
from functorch_opt.optim.adapter import Optimizer
from functorch_opt.optim.codes import AS_USUAL, check_code
from functorch_opt.optim.options import arguments, is_open
from functorch_opt.optim.param_groups import SCALE
from functorch_opt.optim.recipe import made
from functorch_opt.optim.which import told

__all__ = ["Partition"]

Labels = Mapping[str, str] | Callable[[str, Tensor], str]
Codes = str | Mapping[str, str]


class Algorithm:
    """One algorithm of a `Partition`: how its chain is made, and what its options are."""

    def __init__(
        self,
        label: str,
        tx: Any,
        code: str | None = None,
    ) -> None:
        tx, hyper = opened(tx)
        try:
            given = arguments(tx, hyper)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{label!r}: {error}") from error
        self._recipe = (tx, given.fixed, given.rate, given.has_momentum)
        of_state = {} if code is None else {"state": code}
        self.defaults = {"algorithm": label, **given.defaults, **of_state}
        self._own = tuple(self.defaults)
        self._numbers = frozenset(("lr", *given.numbers))
        self._optional = frozenset(filter(is_open(given.defaults), given.defaults))

    def completed(
        self,
        group: dict[str, Any],
    ) -> dict[str, Any]:
        """A group with all options of this algorithm."""
        group = dict(group)
        rate = self._recipe[2]
        if rate is not None and rate in group:
            group.setdefault("lr", group.pop(rate))
        for name, default in self.defaults.items():
            if name not in group:
                factor = group.get(f"{name}{SCALE}")
                value = default.clone() if isinstance(default, Tensor) else default
                group[name] = value if factor is None else value * factor
        return group


def opened(tx: Any) -> tuple[Any, dict[str, Any]]:
    """The factory of a transformation and its arguments, if its learning rate is among them.

    Otherwise they are the transformation itself, and nothing.
    """
    if not isinstance(tx, GradientTransformation) or tx.call is None:
        return tx, {}
    function, args, kwargs = tx.call
    try:
        signature = inspect.signature(function)
        bound = signature.bind(*args, **kwargs)
    except (TypeError, ValueError):
        return tx, {}
    if not {"lr", "learning_rate"} & signature.parameters.keys():
        return tx, {}
    return function, dict(bound.arguments)


def code_of(
    state: Codes | None,
    labels: Iterable[str],
) -> dict[str, str | None]:
    """The code of the slots of each algorithm; None for all: it is no option.

    Raises:
        ValueError: a code that there is not, or a label that has no transformation.
    """
    labels = [*labels]
    if state is None:
        return dict.fromkeys(labels)
    codes = dict.fromkeys(labels, state) if isinstance(state, str) else dict(state)
    for label, code in codes.items():
        check_code(code)
        if label not in labels:
            raise ValueError(
                f"state has the label {label!r}; the transformations are for {labels}."
            )
    return {label: codes.get(label, AS_USUAL) for label in labels}


class Partition(Optimizer):
    """Several algorithms as one optimizer: each parameter has that of its label.

    It computes what `functorch_opt.partition` does. Each group is of one algorithm, which it names
    in its option ``algorithm``, and has the options of that algorithm, with `lr` for
    ``learning_rate``. Schedulers see all groups; OneCycleLR and CyclicLR write the ``momentum`` of
    those that have one. Checkpoints hold all of them. With ``compile=True`` the step is one
    operation of a graph that you compile.

    A transformation that was made with a learning rate, such as ``adamw(3e-4)``, has its arguments
    as options. Of any other, such as a chain, ``lr`` multiplies what it gives, and is 1.0 by
    default. A norm, such as that of a clip, is that of one algorithm.

    Args:
        params: parameters, ``(name, parameter)`` pairs or groups. A group may have an option
            ``algorithm``, and then all of its parameters are for that one.
        transforms: ``{label: transformation}``; or in its place the function that makes one, whose
            learning rate is then in the groups.
        param_labels: a label for each parameter whose group names no algorithm: a function of path
            and parameter, such as `matrix_labels` makes, or ``{path: label}``. The path of a
            parameter without a name is its number.
        compile: run the step in place through `compiled_step`, with one pass for each algorithm.
        state: how slots are stored, such as ``"8bit"``, or ``{label: code}``; see
            `functorch_opt.stored`. Given here, it is also an option of the groups. An algorithm that
            has no label there stores them as usual, which is called ``"float32"``.
        owners: whether each parameter is stepped by one rank of many; see `Optimizer`.

    A group with a factor, such as the ``lr_scale`` that `layer_decay` gives, and without the option
    that it multiplies, has that of its algorithm times the factor.

    Raises:
        ValueError: a parameter without a label, or with one that has no transformation; an option
            that only another algorithm has; an option outside its range; a code that there is not,
            or for an algorithm without slots; a state dict whose groups are of other algorithms.
        TypeError: what is no transformation; an option of another type.

    Example:
        >>> import torch, functorch_opt as fo
        >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 4))
        >>> transforms = {"muon": fo.muon(0.02), "adamw": fo.adamw(3e-4, weight_decay=0.1)}
        >>> labels = fo.matrix_labels(model)
        >>> opt = fo.optim.Partition(model.named_parameters(), transforms, labels)
        >>> for group in opt.param_groups:
        ...     print(group["algorithm"], group["lr"], group["param_names"])
        muon 0.02 ['1.weight']
        adamw 0.0003 ['0.weight', '1.bias']
        >>> opt.param_groups[1]["b2"], "b2" in opt.param_groups[0]
        (0.999, False)
        >>> codes = {"muon": "8bit"}
        >>> opt = fo.optim.Partition(
        ...     model.named_parameters(), transforms, labels, state=codes
        ... )
        >>> [group["state"] for group in opt.param_groups]
        ['8bit', 'float32']
    """

    def __init__(
        self,
        params: Iterable[Any],
        transforms: Mapping[str, Any],
        param_labels: Labels | None = None,
        *,
        compile: bool = False,
        state: Codes | None = None,
        owners: bool = False,
    ) -> None:
        if not isinstance(transforms, Mapping) or not transforms:
            raise TypeError(
                "transforms must be a dict from label to transformation; "
                f"got {type(transforms).__name__} {transforms!r}."
            )
        if callable(param_labels):
            check_takes_path_and_leaf("param_labels", param_labels)
        self._begin(params, transforms, param_labels, compile, state, owners)

    @torch._disable_dynamo
    def _begin(
        self,
        params: Iterable[Any],
        transforms: Mapping[str, Any],
        param_labels: Labels | None,
        compile: bool,
        state: Codes | None,
        owners: bool,
    ) -> None:
        codes, txs = code_of(state, transforms), transforms.items()
        algorithms = {label: Algorithm(label, tx, codes[label]) for label, tx in txs}
        self._algorithms, self._labels = algorithms, param_labels
        first, *_ = algorithms.values()
        # Schedulers look here for a momentum.
        defaults = {"lr": first.defaults["lr"]}
        if any("momentum" in of.defaults for of in algorithms.values()):
            defaults["momentum"] = None
        self._setup(params, defaults, (), compile, owners=owners)

    def _of(
        self,
        group: dict[str, Any],
    ) -> Algorithm:
        label = group.get("algorithm")
        if label not in self._algorithms:
            raise ValueError(
                f"a group has the algorithm {label!r}; the transformations are for "
                f"{[*self._algorithms]}."
            )
        return self._algorithms[label]

    def _chain(
        self,
        *args: Any,
        algorithm: str,
        **options: Any,
    ) -> GradientTransformation:
        return made(self._algorithms[algorithm]._recipe, options)

    @torch._disable_dynamo
    def add_param_group(
        self,
        param_group: dict[str, Any],
    ) -> None:
        """Add a group, or one for each algorithm that its parameters have labels of.

        Args:
            param_group: ``{"params": ..., "algorithm": label, option: value, ...}``. Options that
                are left out are those of the algorithm.

        Raises:
            ValueError: a label that is missing or has no transformation; an option that only
                another algorithm has, or outside its range; names that are not unique.
            TypeError: an option of another type.
        """
        before = len(self.param_groups)
        if not isinstance(param_group, dict):
            raise TypeError(f"a group must be a dict; got {type(param_group).__name__}.")
        try:
            for group in self._by_algorithm(param_group):
                super().add_param_group(group)
        except Exception:
            del self.param_groups[before:]
            raise

    def _by_algorithm(
        self,
        group: dict[str, Any],
    ) -> Iterator[dict[str, Any]]:
        """The group with all of its options, as several where its parameters have several labels."""
        params = group.get("params")
        if "algorithm" in group:
            yield self._completed(group)
            return
        if isinstance(params, set) or not isinstance(params, Iterable):
            yield group  # torch has errors for these
            return
        params = [params] if isinstance(params, Tensor) else [*params]
        start = sum(len(other["params"]) for other in self.param_groups)
        parts: dict[str, list[Any]] = {label: [] for label in self._algorithms}
        for i, given in enumerate(params, start=start):
            path, p = given if isinstance(given, tuple) else (str(i), given)
            parts[self._label(path, p)].append(given)
        parts = {label: part for label, part in parts.items() if part}
        for label, part in parts.items():
            mine = {**group, "params": part, "algorithm": label}
            if "name" in group and len(parts) > 1:
                mine["name"] = f"{group['name']}, {label}"
            yield self._completed(mine)

    def _label(
        self,
        path: str,
        p: Tensor,
    ) -> str:
        labels = self._labels
        if labels is None:
            raise ValueError(
                f"the parameter {path!r} has no algorithm: give its group one, "
                f"{{'params': ..., 'algorithm': {next(iter(self._algorithms))!r}}}, or give "
                "param_labels."
            )
        label = labels(path, p) if callable(labels) else labels.get(path)
        if label not in self._algorithms:
            raise ValueError(
                f"param_labels gives {label!r} for {path!r}; the transformations are for "
                f"{[*self._algorithms]}."
            )
        return label

    def _completed(
        self,
        group: dict[str, Any],
    ) -> dict[str, Any]:
        mine = self._of(group)
        group = mine.completed(group)
        known = {name for of in self._algorithms.values() for name in of.defaults}
        stray = sorted(group.keys() & known - mine.defaults.keys() - {"momentum"})
        if stray:
            raise ValueError(
                f"{group['algorithm']!r} has no option {told(stray)}, which another algorithm has."
            )
        return group

    def load_state_dict(
        self,
        state_dict: dict[str, Any],
        *,
        strict: bool = False,
    ) -> None:
        """As `Optimizer.load_state_dict`; the groups must be of the same algorithms, in order.

        Raises:
            ValueError: they are not, or as there.
        """
        groups = state_dict.get("param_groups", ())
        saved = [group.get("algorithm") for group in groups]
        here = [group["algorithm"] for group in self.param_groups]
        if len(saved) == len(here) and saved != here:
            raise ValueError(
                f"the groups of this state dict are of the algorithms {saved}, and here they are "
                f"of {here}. Make the groups as they were saved."
            )
        super().load_state_dict(state_dict, strict=strict)

    def __getstate__(self) -> dict[str, Any]:
        private = {"_algorithms": self._algorithms, "_labels": self._labels}
        return {**super().__getstate__(), **private}

    def __setstate__(
        self,
        state: dict[str, Any],
    ) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.update(self._of(group).completed(group))
