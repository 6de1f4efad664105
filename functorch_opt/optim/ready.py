"""Every ready-made optimizer that torch.optim does not have, as a class.

Each class is made from its factory by one line, `ready`, and has the factory's arguments:

    opt = fo.optim.Lion(model.parameters(), lr=1e-4, weight_decay=0.1)
    opt = fo.optim.Optimizer(model.parameters(), fo.lion, lr=1e-4, weight_decay=0.1)

give the same numbers. A factory is ready-made if it is exported by a file of
`functorch_opt.optimizers` and its first argument is the learning rate. So a new optimizer needs no
line here. Type checkers read `ready.pyi`, which ``python -m tests.ready_stub`` writes.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch

from functorch_opt import optimizers
from functorch_opt._core.transformation import GradientTransformation
from functorch_opt.optim.adapter import Optimizer
from functorch_opt.optim.options import FLAGS

Factory = Callable[..., GradientTransformation]
KEYWORD, POSITIONAL = (
    inspect.Parameter.KEYWORD_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)

WORDS = {
    "acprop": "ACProp",
    "adabelief": "AdaBelief",
    "adam": "Adam",
    "adamaxw": "AdamaxW",
    "adamc": "AdamC",
    "adamuon": "AdaMuon",
    "adamw": "AdamW",
    "ademamix": "AdEMAMix",
    "adopt": "ADOPT",
    "amsgrad": "AMSGrad",
    "apollo": "APOLLO",
    "came": "CAME",
    "cocob": "COCOB",
    "dadapt": "DAdapt",
    "dog": "DoG",
    "dowg": "DoWG",
    "focus": "FOCUS",
    "galore": "GaLore",
    "kl": "KL",
    "lamb": "LAMB",
    "laprop": "LaProp",
    "lars": "LARS",
    "madgrad": "MADGRAD",
    "mars": "MARS",
    "momo": "MoMo",
    "muonh": "MuonH",
    "nadamw": "NAdamW",
    "normuon": "NorMuon",
    "novograd": "NovoGrad",
    "psgd": "PSGD",
    "radam": "RAdam",
    "sgd": "SGD",
    "sgld": "SGLD",
    "sm3": "SM3",
    "soap": "SOAP",
    "spam": "SPAM",
    "splus": "SPlus",
}
"""Words of names that their authors write otherwise than with one capital."""


class Ready(Optimizer):
    """What the classes made by `ready` have in common."""

    _factory: ClassVar[Factory]

    def __init__(self, *args: Any, **given: Any) -> None:
        signature = inspect.signature(type(self))
        known = signature.parameters
        try:
            if unknown := [name for name in given if name not in known]:
                hint = " (it is called lr)" if "learning_rate" in unknown else ""
                raise TypeError(f"no argument is called {', '.join(unknown)}{hint}")
            bound = signature.bind(*args, **given)
        except TypeError as error:
            raise TypeError(
                f"{type(self).__name__}: {error}; its arguments are {', '.join(known)}."
            ) from None
        options = bound.arguments
        params = options.pop("params")
        compile = options.pop("compile", False)
        names = ("state", "capturable", "owners")
        how = {name: options.pop(name) for name in names if name in options}
        super().__init__(params, self._factory, compile=compile, **how, **options)

    def _check_group(self, group: dict[str, Any], loaded: bool = False) -> None:
        """Also what a group cannot have for itself: it would be passed over in silence."""
        known = inspect.signature(type(self)).parameters.keys()
        of_all = known - {"params", *self._own, *FLAGS}
        stray = sorted(of_all & group.keys())
        if stray and not loaded:
            raise ValueError(
                f"{', '.join(stray)} of {type(self).__name__} cannot differ between groups: "
                "give it to the optimizer, for all of them."
            )
        super()._check_group(group, loaded)

    __repr__ = torch.optim.Optimizer.__repr__


def ready(factory: Factory) -> type[Ready]:
    """The class of a factory: ``learning_rate`` becomes ``lr``, and ``params`` and ``compile`` are
    added to the arguments."""
    name = class_name(factory.__name__)
    namespace = {
        "_factory": staticmethod(factory),
        "__module__": __name__,
        "__doc__": documented(factory, name),
        "__signature__": with_params(inspect.signature(factory)),
    }
    return type(name, (Ready,), namespace)


def class_name(of_factory: str) -> str:
    words = of_factory.split("_")
    return "".join([WORDS.get(word, word.capitalize()) for word in words])


def with_params(signature: inspect.Signature) -> inspect.Signature:
    rate, *rest = signature.parameters.values()
    given = [
        inspect.Parameter("params", POSITIONAL, annotation="Iterable[Any]"),
        rate.replace(name="lr"),
        *rest,
        inspect.Parameter("compile", KEYWORD, annotation="bool", default=False),
        inspect.Parameter("state", KEYWORD, annotation="str | None", default=None),
        inspect.Parameter("capturable", KEYWORD, annotation="bool", default=False),
        inspect.Parameter("owners", KEYWORD, annotation="bool", default=False),
    ]
    return inspect.Signature(given)


def documented(factory: Factory, name: str) -> str:
    """The docstring of a class, from that of its factory."""
    call = f"fo.optim.{name}(model.named_parameters(), {example(factory)})"
    summary, *_ = inspect.cleandoc(factory.__doc__ or "").split("\n\n")
    return f"""`functorch_opt.{factory.__name__}` as a class.

    {summary}

    The source, and what each argument means, are there. Numbers are options of the groups.

    Args:
        params: named parameters, parameters or groups. Masks and labels that look at names, the
            default ones too, need named parameters.
        lr: the factory's ``learning_rate``; schedulers drive it.
        {others(factory)}: as in `functorch_opt.{factory.__name__}`.
        compile: run the step in place through `compiled_step`; see `Optimizer`.
        state: how slots are stored, such as ``"8bit"``; see `Optimizer`.
        capturable: let a step be captured as a CUDA graph; see `Optimizer`.
        owners: whether each parameter is stepped by one rank of many; see `Optimizer`.

    Raises:
        TypeError: an argument that it does not take.
        ValueError: an argument outside its range; an option of a group that all groups share.

    Example:
        >>> import torch, functorch_opt as fo
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = {call}
        >>> opt.param_groups[0]["lr"]
        0.01
    """


def others(factory: Factory) -> str:
    """The names of the arguments after the first, in lines that are not too long."""
    _, *names = inspect.signature(factory).parameters
    return textwrap.fill(", ".join(names), 60).replace("\n", "\n            ")


def example(factory: Factory) -> str:
    """An example of the arguments: ``lr``, and what has no default."""
    _, *rest = inspect.signature(factory).parameters.values()
    required = [p.name for p in rest if p.default is p.empty]
    return ", ".join(["lr=0.01", *[f"{name}=0" for name in required]])


def ready_made() -> Iterator[Factory]:
    """The factories of optimizers, by their first argument."""
    for file in pkgutil.iter_modules(optimizers.__path__, f"{optimizers.__name__}."):
        module = importlib.import_module(file.name)
        for name in getattr(module, "__all__", ()):  # what families share has none
            value = getattr(module, name)
            if inspect.isfunction(value) and is_optimizer(value):
                yield value


def is_optimizer(function: Factory) -> bool:
    """Whether it is an optimizer that has no class with torch's arguments."""
    first = next(iter(inspect.signature(function).parameters), None)
    stage = function.__name__.startswith("scale_by_")
    left_out = function.__name__ in TORCHS | NO_CLASS.keys()
    return first == "learning_rate" and not stage and not left_out


NO_CLASS = {
    "hyperball": "it is the last stage of an optimizer",
    "sophia": "it reads the loss as a function, which no step can give",
}
"""Functions of a learning rate that are not made a class, and why."""
TORCHS = {
    name.lower() for name, value in vars(torch.optim).items() if inspect.isclass(value)
}
CLASSES = {cls.__name__: cls for cls in map(ready, ready_made())}
__all__ = [*CLASSES]
globals().update(CLASSES)
