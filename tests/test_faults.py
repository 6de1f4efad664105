"""Faults: a kill in the middle of training, wrong checkpoints of every kind, and exceptions
wherever the user's code runs.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import optimizer

import functorch_opt as fo
from functorch_opt import tree

# ---- killed, and resumed -------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent
STEPS = 300


def start(checkpoint: Path, how: str) -> subprocess.Popen:
    command = [
        sys.executable,
        str(ROOT / "tests" / "resumable.py"),
        str(checkpoint),
        str(STEPS),
        how,
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


def lines(process: subprocess.Popen) -> Iterator[list[str]]:
    for line in process.stdout:
        yield line.split()


@pytest.mark.parametrize(
    "how", ["eager", pytest.param("compile", marks=pytest.mark.slow)]
)
def test_a_run_that_is_killed_twice_ends_as_one_that_is_not(
    how: str, tmp_path: Path
) -> None:
    """After kill -9 during training, parameters and state are the same bit for bit.

    It has AdamW, noise, a schedule inside, a scheduler outside, and the average.
    """
    begun = [0]
    with start(tmp_path / "whole.pt", how) as whole:
        for at in (60, 150):
            with start(tmp_path / "killed.pt", how) as process:
                for line in lines(process):
                    if line[0] == "resumed":
                        begun.append(int(line[1]))
                    if line[0] == "saved" and int(line[1]) >= at:
                        process.send_signal(signal.SIGKILL)
                        break
                rest = [line[0] for line in lines(process)]
            assert process.returncode == -signal.SIGKILL and "finished" not in rest
        with start(tmp_path / "killed.pt", how) as process:
            ends = [list(lines(of))[-1] for of in (whole, process)]
    assert whole.returncode == process.returncode == 0
    assert begun[1] >= 60 and torch.load(tmp_path / "killed.pt")["step"] == STEPS
    assert ends[0][0] == "finished" and ends[0] == ends[1]


# ---- checkpoints of every kind -------------------------------------------------------------------


def make_params(
    dtype: torch.dtype = torch.float32, shapes: tuple = ((2, 3), (2,)), seed: int = 0
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for shape in shapes
    ]


def one_step(opt: torch.optim.Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in (p for group in opt.param_groups for p in group["params"]):
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    opt.step()


def groups_of(params: list) -> list[dict]:
    return [{"params": params[:1], "lr": 0.2}, {"params": params[1:]}]


def noisy() -> fo.GradientTransformation:
    return fo.chain(
        fo.add_noise(0.1, 0.5, key=7),
        fo.adam(fo.linear_schedule(0.1, 0.0, 9)),
        fo.params_ema(0.9),
    )


def parted() -> fo.GradientTransformation:
    return fo.partition(
        {"m": fo.adam(0.1), "v": fo.sgd(0.1, 0.9)},
        lambda path, p: "m" if p.ndim > 1 else "v",
    )


BUILDERS: dict[str, tuple[Callable, dict]] = {
    "AdamW": (lambda ps: fo.optim.AdamW(ps, amsgrad=True), {}),
    "AdamW in groups": (lambda ps: fo.optim.AdamW(groups_of(ps)), {}),
    "SGD": (lambda ps: fo.optim.SGD(ps, momentum=0.9), {}),
    "RMSprop": (lambda ps: fo.optim.RMSprop(ps, momentum=0.9, centered=True), {}),
    "NAdam": (fo.optim.NAdam, {}),
    "ASGD": (fo.optim.ASGD, {}),
    "Rprop": (fo.optim.Rprop, {}),
    "Adafactor": (fo.optim.Adafactor, {}),
    "Muon": (fo.optim.Muon, {"shapes": ((2, 3), (3, 2))}),
    "factory": (
        lambda ps: fo.optim.Optimizer(groups_of(ps), fo.adamw, learning_rate=0.1),
        {},
    ),
    "chain": (lambda ps: fo.optim.Optimizer(ps, noisy()), {}),
    "partition": (lambda ps: fo.optim.Optimizer(ps, parted()), {}),
    "master": (
        lambda ps: fo.optim.Optimizer(ps, fo.keep_master_weights(fo.adamw(0.1))),
        {"dtype": torch.bfloat16},
    ),
}


def bits(value: Any) -> Any:
    """Something that is equal for equal bits, NaN and negative zeros too."""
    if isinstance(value, Tensor):
        value = value.to_dense()
        return (
            value.dtype,
            tuple(value.shape),
            value.detach().contiguous().reshape(-1).view(torch.uint8).tolist(),
        )
    if isinstance(value, dict):
        return {key: bits(of) for key, of in value.items()}
    return tuple(map(bits, value)) if isinstance(value, (list, tuple)) else repr(value)


def everything(opt: torch.optim.Optimizer) -> Any:
    params = [p for group in opt.param_groups for p in group["params"]]
    return bits(
        [params, [opt.state.get(p, {}) for p in params], len(opt.state), opt.param_groups]
    )


class Bench:
    """An optimizer with a state to go back to, the result of its next step, and a checkpoint of
    another run of it.
    """

    def __init__(self, name: str) -> None:
        build, options = BUILDERS[name]
        self.opt = build(make_params(**options))
        one_step(self.opt, 0)
        self.params = [p for group in self.opt.param_groups for p in group["params"]]
        self.groups = [(group, dict(group)) for group in self.opt.param_groups]
        self.values = [
            (p, p.detach().clone(), {k: v.clone() for k, v in self.opt.state[p].items()})
            for p in self.params
        ]
        self.plans = dict(self.opt._plans)  # to go back is quick with them
        other = build(make_params(seed=1, **options))
        one_step(other, 1)
        one_step(other, 2)
        self.saved = copy.deepcopy(other.state_dict())
        self.before = everything(self.opt)
        one_step(self.opt, 5)
        self.after = everything(self.opt)
        assert self.before != self.after
        self.reset()

    def reset(self) -> None:
        for group, options in self.groups:
            group.clear()
            group.update(options)
        state: dict = collections.defaultdict(dict)
        with torch.no_grad():
            for p, value, entry in self.values:
                p.copy_(value)
                state[p] = {k: v.clone() for k, v in entry.items()}
        self.opt.state, self.opt.param_groups, self.opt._plans = (
            state,
            [group for group, _ in self.groups],
            dict(self.plans),
        )
        assert everything(self.opt) == self.before


BENCHES: dict[str, Bench] = {}

VALUES: list[Any] = [
    None, True, -1, 0, 3, 2.5, float("nan"), float("inf"), "x", b"x", [], [1.0], (), (0.5, 0.5), {}, {"a": 1}, 1j, object(),
    torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor(-1), torch.tensor(True), torch.tensor(1j), torch.zeros(0), torch.ones(2),
    torch.ones(2, 3), torch.full((2, 3), float("nan")), torch.ones(2, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.bfloat16),
    torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.complex64), torch.ones(3, 2), torch.eye(3).to_sparse(),
    torch.ones(2, dtype=torch.int64), torch.tensor([7, 2**62]), torch.ones(2, device="meta"),
]  # fmt: skip


@st.composite
def changes(draw: st.DrawFn) -> list[tuple]:
    """What is done to a state dict: somewhere a key is removed, added or given another value.

    The place is chosen when the state dict is known.
    """
    value = st.integers(0, len(VALUES) - 1)
    place = st.integers(0, 10**6)
    where = st.sampled_from(
        ["state", "state", "state", "entry", "group", "group", "params", "top", "groups"]
    )
    what = st.sampled_from(["drop", "set", "set", "add", "rename"])
    return draw(st.lists(st.tuples(where, what, place, value), min_size=1, max_size=3))


def apply(saved: dict, change: tuple) -> None:
    where, what, place, number = change
    value = copy.deepcopy(VALUES[number])
    containers: list[Any] = {
        "top": lambda: [saved],
        "groups": lambda: [saved["param_groups"]],
        "group": lambda: list(saved["param_groups"]),
        "params": lambda: [group["params"] for group in saved["param_groups"]],
        "entry": lambda: [saved["state"]],
        "state": lambda: list(saved["state"].values()),
    }[where]()
    container = containers[place % len(containers)]
    assert isinstance(container, (dict, list))
    keys = list(container) if isinstance(container, dict) else list(range(len(container)))
    key = keys[place // 7 % len(keys)]
    if what == "drop":
        del container[key]
    elif what == "set":
        container[key] = value
    elif isinstance(container, dict):
        container["new" if isinstance(key, str) else 99] = (
            container.pop(key) if what == "rename" else value
        )
    else:
        container.append(value)


def mutated(saved: dict, made: list[tuple]) -> dict:
    saved = copy.deepcopy(saved)
    for change in made:
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            apply(saved, change)  # an earlier change may have taken the place away
    return saved


def check(name: str, made: list[tuple], strict: bool) -> str:
    if name not in BENCHES:
        BENCHES[name] = Bench(name)
    bench = BENCHES[name]
    saved = mutated(bench.saved, made)
    opt = bench.opt
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        error = None
        try:
            opt.load_state_dict(saved, strict=strict)
        except (KeyError, TypeError, ValueError) as raised:
            error = raised
    if error is not None:
        assert len(str(error)) > 25, error
        assert everything(opt) == bench.before
        one_step(opt, 5)
        assert everything(opt) == bench.after
        bench.reset()
        return type(error).__name__
    assert [w.category for w in caught] in ([], [UserWarning])
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    whole = True
    for p, number in zip(bench.params, numbers, strict=True):
        entry = {
            key: value
            for key, value in saved["state"].get(number, {}).items()
            if value is not None
        }
        for key, value in opt.state.get(p, {}).items():
            if isinstance(entry[key], Tensor) and not key.endswith(("count", "clock")):
                assert bits(value) == bits(entry[key])
            else:  # a count is kept as int64, whatever it was saved as
                assert value is entry[key] or value == entry[key]
        whole &= set(opt.state.get(p, {})) == set(entry)
    assert whole or (caught and not strict)
    one_step(opt, 5)
    bench.reset()
    return "warned" if caught else "loaded"


seen: dict[str, int] = {}


@pytest.mark.parametrize("examples", [400, pytest.param(3_000, marks=pytest.mark.slow)])
def test_any_state_dict_loads_rightly_or_changes_nothing(examples: int) -> None:
    """For all kinds of optimizers, what is loaded is what was saved, bit for bit.

    After an error everything is as before, and so is the next step.
    """
    seen.clear()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[*HealthCheck],
    )
    @given(name=st.sampled_from(sorted(BUILDERS)), made=changes(), strict=st.booleans())
    def run(name: str, made: list[tuple], strict: bool) -> None:
        outcome = check(name, made, strict)
        seen[outcome] = seen.get(outcome, 0) + 1

    run()
    assert set(seen) == {"loaded", "warned", "KeyError", "TypeError", "ValueError"}, seen
    assert min(seen.values()) > examples // 100, seen


# ---- exceptions in the user's code ---------------------------------------------------------------


class Failed(Exception):
    pass


def fail(*_: object, **__: object) -> None:
    raise Failed


def module_and_data() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(8, 3)


PLACES: dict[str, Callable[[nn.Module, torch.optim.Optimizer], Any]] = {
    "module forward pre-hook": lambda model, opt: model[2].register_forward_pre_hook(
        fail
    ),
    "module forward hook": lambda model, opt: model[2].register_forward_hook(fail),
    "module backward pre-hook": lambda model, opt: model[
        2
    ].register_full_backward_pre_hook(fail),
    "module backward hook": lambda model, opt: model[2].register_full_backward_hook(fail),
    "gradient hook": lambda model, opt: model[0].weight.register_hook(fail),
    "post-accumulate hook": lambda model, opt: model[
        0
    ].bias.register_post_accumulate_grad_hook(fail),
    "step pre-hook": lambda model, opt: opt.register_step_pre_hook(fail),
    "global step pre-hook": lambda model, opt: optimizer.register_optimizer_step_pre_hook(
        fail
    ),
}


@pytest.mark.parametrize(
    "build",
    [fo.optim.AdamW, BUILDERS["chain"][0], BUILDERS["factory"][0]],
    ids=["AdamW", "chain", "factory"],
)
@pytest.mark.parametrize("closure", [False, True], ids=["loop", "closure"])
@pytest.mark.parametrize("place", PLACES)
def test_an_exception_on_the_way_to_a_step_changes_nothing(
    place: str, closure: bool, build: Callable
) -> None:
    """Parameters and state are as before, though some gradients may be there already.

    The next step is that of a run without the fault.
    """
    (model, x), (twin, _) = module_and_data(), module_and_data()
    opt, reference = build(list(model.parameters())), build(list(twin.parameters()))

    def step(m: nn.Module, o: torch.optim.Optimizer) -> None:
        def compute() -> Tensor:
            o.zero_grad()
            loss = (m(x) ** 2).mean()
            loss.backward()
            return loss

        if closure:
            o.step(compute)
        else:
            compute()
            o.step()

    step(model, opt)
    step(twin, reference)
    before = everything(opt)
    handle = PLACES[place](model, opt)
    try:
        with pytest.raises(Failed):
            step(model, opt)
    finally:
        handle.remove()
    assert everything(opt) == before
    for _ in range(2):
        step(model, opt)
        step(twin, reference)
    assert everything(opt) == everything(reference) != before


def test_an_exception_after_the_step_leaves_the_whole_step() -> None:
    for register in (
        lambda o: o.register_step_post_hook(fail),
        lambda o: optimizer.register_optimizer_step_post_hook(fail),
    ):
        opt, twin = (BUILDERS["chain"][0](make_params()) for _ in range(2))
        one_step(opt, 0)
        one_step(twin, 0)
        handle = register(opt)
        try:
            with pytest.raises(Failed):
                one_step(opt, 1)
        finally:
            handle.remove()
        one_step(twin, 1)
        assert everything(opt) == everything(twin)
        one_step(opt, 2)
        one_step(twin, 2)
        assert everything(opt) == everything(twin)


@pytest.mark.parametrize(
    "register", ["register_state_dict_pre_hook", "register_state_dict_post_hook"]
)
def test_an_exception_while_saving_changes_nothing(register: str) -> None:
    opt, twin = (BUILDERS["chain"][0](make_params()) for _ in range(2))
    for o in (opt, twin):
        one_step(o, 0)
    handle = getattr(opt, register)(fail)
    with pytest.raises(Failed):
        opt.state_dict()
    handle.remove()
    for o in (opt, twin):
        one_step(o, 1)
    assert everything(opt) == everything(twin)


def test_an_exception_in_a_stage_or_a_schedule_changes_nothing() -> None:
    """The third of three stages fails, when the others have worked out their state already."""
    armed = []

    def schedule(count: Tensor) -> Tensor:
        if armed:
            raise Failed
        return 0.1 + 0 * count

    tx = fo.chain(fo.trace(0.9), fo.scale_by_adam(), fo.scale_by_schedule(schedule))
    opt, twin = (fo.optim.Optimizer(make_params(), tx) for _ in range(2))
    for o in (opt, twin):
        one_step(o, 0)
    before = everything(opt)
    armed.append(True)
    with pytest.raises(Failed):
        one_step(opt, 1)
    assert everything(opt) == before
    armed.clear()
    for o in (opt, twin):
        one_step(o, 1)
    assert everything(opt) == everything(twin) != before


def test_an_exception_in_the_first_step_leaves_no_state() -> None:
    params = make_params()
    opt = fo.optim.AdamW(params)
    params[0].grad = torch.ones_like(params[0])
    params[1].grad = torch.ones_like(params[1]).to_sparse()
    with pytest.raises(ValueError, match="dense"):
        opt.step()
    assert not any(opt.state.values())
    assert tree.leaves(opt.state_dict()["state"]) == []
