"""Every optimizer comes down a parabola and Rosenbrock's valley, in each dtype that it takes.

A learning rate is tried until the loss stalls, then the next one; `RATES` says which comes first,
so that the file takes less than a minute. An optimizer that is new needs no entry.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from registry import ROWS
from torch import Tensor

import functorch_opt as fo
from functorch_opt._core.points import has_point

STEPS, LOOK = 10_000, 20
USUAL = (0.1, 0.01, 1.0, 0.3, 0.03, 0.003, 0.001)
SMALLER = fo.exponential_decay(1.0, 100, 0.8)
"""For steps that do not become smaller by themselves, so that they end in the valley."""

RATES: dict[str, Any] = {
    "acprop": 0.003,
    "adabelief": 0.1,
    "adadelta": SMALLER,
    "adafactor": 0.003,
    "adagrad": 0.3,
    "adam": 0.3,
    "adamax": 0.3,
    "adamaxw": 0.3,
    "adamw": 0.3,
    "adopt": 1.0,
    "amsgrad": 0.3,
    "asgd": 0.0018,
    "dog": 1.0,
    "dowg": 1.0,
    "dp_adam": 0.3,
    "dpsgd": 0.002,
    "fromage": 0.003,
    "lamb": 0.01,
    "lars": 3.0,
    "lion": 0.003,
    "madgrad": 0.01,
    "mano": fo.exponential_decay(0.1, 100, 0.8),
    "momo": 1.0,
    "momo_adam": 1.0,
    "muon": 0.01,
    "muon_with_adamw": 0.01,
    "muonh": 0.03,
    "nadam": 0.03,
    "nadamw": 0.03,
    "noisy_sgd": 0.0018,
    "novograd": 0.003,
    "optimistic_gradient_descent": 0.0006,
    "polyak_sgd": 1.0,
    "prodigy": 1.0,
    "psgd_kron": 0.01,
    "radam": 0.005,
    "rmsprop": 0.003,
    "schedule_free_prodigy": 1.0,
    "sgd": 0.0018,
    "sgld": 0.0018,
    "sign_sgd": fo.exponential_decay(0.1, 100, 0.8),
    "signum": 0.003,
    "simplified_ademamix": 0.001,
    "sm3": 3.0,
    "splus": fo.exponential_decay(0.1, 100, 0.8),
}
"""The rate for Rosenbrock's valley that is tried first."""

OPTIONS: dict[str, dict[str, Any]] = {
    "acprop": {"eps_root": 1e-6},
    "apollo": {"key": 0},
    "dog": {"init_step": ("distance", 0.1)},
    "mano": {"weight_decay": 0.0},
    "muon_with_adamw": {"adamw_learning_rate": 0.01},
    "psgd_kron": {"key": 0},
    "sgld": {"temperature": 0.0, "key": 0},
    "noisy_sgd": {"eta": 1e-6, "key": 0},
    "sophia": {"key": 0},
}
"""What else an optimizer needs: some begin with very small steps, or never stop to draw noise."""

OF_DIRECTIONS = ("hyperball", "mano", "muonh")
"""They turn a matrix, and keep its length, so they begin with that of the bottom."""

OF_SIGNS = ("rprop", "sign_sgd")
"""At the bottom of the valley, the rounding of the parameters to bfloat16 turns signs of gradients,
and these read nothing else."""


def of_one_example(
    factory: Callable, rate: Any, **options: Any
) -> fo.GradientTransformation:
    """A private optimizer without its noise, of batches of one example."""
    batch = fo.stateless(lambda updates, params: fo.tree.map(lambda u: u[None], updates))
    return fo.chain(batch, factory(rate, 100.0, 0.0, key=0, **options))


OTHERS: dict[str, Callable[[Any], fo.GradientTransformation]] = {
    "dp_adam": lambda rate: of_one_example(fo.dp_adam, rate),
    "dpsgd": lambda rate: of_one_example(fo.dpsgd, rate, momentum=0.9),
    "hyperball": lambda rate: fo.chain(fo.scale_by_adam(), fo.hyperball(rate)),
    "lbfgs": lambda rate: fo.lbfgs(),
    "polyak_sgd": lambda rate: fo.polyak_sgd(rate),
    "scale_by_distance_over_gradients": lambda rate: fo.scale_by_distance_over_gradients(
        0.01 * rate, global_scale=-1.0
    ),
}
"""Optimizers that take other arguments, or are made here of stages."""


def make(name: str, rate: Any) -> fo.GradientTransformation:
    if name in OTHERS:
        return OTHERS[name](rate)
    return getattr(fo, name)(rate, **OPTIONS.get(name, {}))


def optimizers() -> Iterator[str]:
    """All functions of the families whose first argument is the learning rate, and the others."""
    yield from OTHERS
    for name in fo.__all__:
        function = getattr(fo, name)
        if inspect.isfunction(function) and not name.startswith("scale_by_"):
            first = next(iter(inspect.signature(function).parameters), "")
            family = "optimizers" in function.__module__ and name not in OTHERS
            if first == "learning_rate" and family:
                yield name


# ---- the problems: value and gradient -------------------------------------------------------------------


def parabola(w: Tensor) -> tuple[Tensor, Tensor]:
    return (w - 1).abs().square().sum(), 2 * (w - 1)


def rosenbrock(w: Tensor) -> tuple[Tensor, Tensor]:
    """``|1 - x|^2 + 100 |y - x^2|^2`` of each column; as in torch, a gradient is conjugate."""
    x, y = w
    e, r = x - 1, y - x * x
    value = e.abs().square().sum() + 100 * r.abs().square().sum()
    return value, torch.stack([2 * e - 400 * r * x.conj(), 200 * r])


def start(dtype: torch.dtype, name: str = "") -> Tensor:
    w = torch.tensor([[-0.5, 0.0, 0.5], [0.5, 0.3, -0.2]])
    w = w + 0.1j * w.flip(0) if dtype.is_complex else w
    if name in OF_DIRECTIONS:
        w = w * (torch.ones(2, 3).norm() / w.norm())
    return w.to(dtype)


def test_the_gradients_are_those_of_the_values() -> None:
    for problem, dtype in itertools.product(
        (parabola, rosenbrock), (torch.float64, torch.complex128)
    ):
        w = start(dtype).requires_grad_()
        value, gradient = problem(w)
        (expected,) = torch.autograd.grad(value, w)
        torch.testing.assert_close(gradient, expected)


# ---- descent --------------------------------------------------------------------------------------------


def falls(
    tx: fo.GradientTransformation, problem: Callable, first_w: Tensor, by: float
) -> bool:
    """Whether the loss falls by this factor, before it stalls."""
    dtype, ps = first_w.dtype, {"w": first_w}
    wide = torch.float32 if dtype is torch.bfloat16 else dtype
    state, first = tx.init(ps), problem(ps["w"].to(wide))[0]
    least, since = first, 0
    for step in range(STEPS):
        value, gradient = problem(ps["w"].to(wide))
        grads = {"w": gradient.to(dtype)}

        def loss(qs: Any) -> Tensor:
            return problem(qs["w"].to(wide))[0]

        known = {"value": value, "grad": grads, "value_fn": loss, "obj_fn": loss}
        extra = {name: known[name] for name in tx.extra_args}
        updates, state = tx.update(grads, state, ps, **extra)
        ps = fo.apply_updates(ps, updates)
        if step % LOOK == 0:
            value = problem(evaluated(tx, state, ps)["w"].to(wide))[0]
            if value < first / by:
                return True
            if value < 0.98 * least:
                least, since = value, step
            if not value.isfinite() or step - since > 400 + step // 4:
                return False
    return False


def evaluated(tx: fo.GradientTransformation, state: Any, ps: Any) -> Any:
    """The parameters to evaluate with, which Schedule-Free keeps beside those of the training."""
    return fo.eval_params(tx, state, ps) if has_point(tx) else ps


@pytest.mark.parametrize("name", [*optimizers()])
@pytest.mark.parametrize(
    ("dtype", "by"),
    [(torch.float32, 1000), (torch.bfloat16, 100), (torch.complex64, 100)],
    ids=["float32", "bfloat16", "complex64"],
)
@pytest.mark.parametrize("problem", [parabola, rosenbrock])
def test_it_comes_down(
    problem: Callable, dtype: torch.dtype, by: float, name: str
) -> None:
    if name in OF_SIGNS and problem is rosenbrock and dtype is torch.bfloat16:
        pytest.skip("bfloat16 turns the signs of gradients in the valley")
    first = RATES.get(name, 0.1)
    if problem is parabola and not callable(first):
        first = max(first, 0.1)
    for rate in dict.fromkeys([first, *USUAL]):
        tx = make(name, rate)
        if dtype is torch.bfloat16 and problem is rosenbrock:
            # In the valley the steps are so small that bfloat16 would round them away.
            tx = fo.keep_master_weights(tx)
        if falls(tx, problem, start(dtype, name), by):
            return
    pytest.fail(f"{name} comes down at none of the usual learning rates")


# ---- wrappers and stages --------------------------------------------------------------------------------

NORMALIZED = fo.chain(fo.normalize(), fo.sgd(0.01))

WRAPPERS: dict[str, Callable[[Any], fo.GradientTransformation]] = {
    "MultiSteps": lambda tx: fo.MultiSteps(tx, 2),
    "apply_every": lambda tx: fo.chain(tx, fo.apply_every(2)),
    "apply_if_finite": lambda tx: fo.apply_if_finite(tx, 3),
    "asam": lambda tx: fo.asam(tx, 0.01),
    "conditionally_mask": lambda tx: fo.conditionally_mask(tx, lambda n: n % 3 > 0),
    "conditionally_transform": lambda tx: fo.conditionally_transform(
        tx, lambda n: n >= 0
    ),
    "ema_nesterov": lambda tx: fo.ema_nesterov(tx),
    "flatten": fo.flatten,
    "keep_error_bits": fo.keep_error_bits,
    "keep_master_weights": fo.keep_master_weights,
    "lookahead": lambda tx: fo.lookahead(tx, 5, 0.5),
    "mechanize": fo.mechanize,
    "named_chain": lambda tx: fo.named_chain(("inner", tx), ("half", fo.scale(0.5))),
    "outer_loop": lambda tx: fo.outer_loop(tx, fo.sgd(0.5), 5),
    "project_gradients": lambda tx: fo.project_gradients(tx, 1, 10, 1.0),
    "sam": lambda tx: fo.sam(tx, NORMALIZED),
    "schedule_free": lambda tx: fo.schedule_free(tx, 0.1),
    "selective_transform": lambda tx: fo.selective_transform(tx, freeze_mask=False),
    "split_real_and_imaginary": fo.split_real_and_imaginary,
}
"""Around Adam."""

ELSEWHERE = {
    "freeze": "it holds parameters where they are: test_wrappers.py",
    "with_owners": "in one process it is what is inside: distributed/test_replicas.py",
}
"""Rows of the optimizers and wrappers that come down nowhere here, and why."""

OF_PRECISION = ("keep_error_bits", "keep_master_weights")
"""They hold small steps in bfloat16 themselves."""


def test_what_comes_down_nowhere_says_why() -> None:
    """A name that begins with ``scale_by_`` is a stage of an optimizer."""
    missing = {
        row.name
        for row in ROWS
        if family_of(row.name) in ("optimizers", "wrappers")
        and not row.name.startswith("scale_by_")
    }
    missing -= {*optimizers(), *WRAPPERS}
    assert missing == ELSEWHERE.keys()


def family_of(name: str) -> str:
    """The folder that a public function is in."""
    return getattr(fo, name).__module__.split(".")[1]


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize(
    ("dtype", "by"),
    [(torch.float32, 1000), (torch.bfloat16, 100), (torch.complex64, 100)],
    ids=["float32", "bfloat16", "complex64"],
)
@pytest.mark.parametrize("problem", [parabola, rosenbrock])
def test_it_comes_down_wrapped(
    problem: Callable, dtype: torch.dtype, by: float, name: str
) -> None:
    for rate in (0.1, 0.3, 0.01):
        tx = WRAPPERS[name](fo.adam(rate))
        small = dtype is torch.bfloat16 and problem is rosenbrock
        if small and name not in OF_PRECISION:
            tx = fo.keep_master_weights(tx)
        if falls(tx, problem, start(dtype), by):
            return
    pytest.fail(f"{name} comes down at none of the rates")
