"""Slots that lie on the host: the same optimizer, whose step fetches them in windows."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from several_devices import numbers, placed, several
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

import functorch_opt as fo
from functorch_opt._execution import from_host

SHAPES = [(8, 6), (5,), (64, 70), (8, 6), (), (3, 4), (64, 65)]
Tensors = list[Tensor]


class Copies:
    """In the place of a card: says what it is asked to do, and does it as late as a card may."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.said: list[str] = []
        self.on_the_way: list[tuple[Tensors, Tensors]] = []
        self.names: dict[int, int] = {}
        self.alive = self.most = 0

    def _say(self, what: str, hosts: Tensors) -> None:
        name = self.names.setdefault(id(hosts[0]), len(self.names))
        self.said.append(f"{what} {name}")

    def fetch(self, hosts: Tensors) -> tuple[Tensors, Any]:
        self._arrive()
        self._say("fetch", hosts)
        assert all(type(x) is Tensor for x in hosts)
        self.alive += 1
        self.most = max(self.most, self.alive)
        # Nobody may read these numbers before he has waited.
        copies = [torch.zeros_like(x, device=self.device) for x in hosts]
        return copies, (copies, hosts)

    def wait(self, made: Any) -> None:
        copies, hosts = made
        self._say("step", hosts)
        for x, host in zip(copies, hosts, strict=True):
            x.copy_(host)

    def put(self, copies: Tensors, hosts: Tensors) -> None:
        self._say("put", hosts)
        self.alive -= 1
        self.on_the_way.append((copies, hosts))

    def _arrive(self) -> None:
        for copies, hosts in self.on_the_way:
            for x, host in zip(copies, hosts, strict=True):
                host.copy_(x)
        self.on_the_way.clear()

    def finish(self) -> None:
        self._arrive()
        self.said.append("finish")


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Any, Copies]]:
    """Devices with numbers, and windows that are small."""
    made: dict[Any, Copies] = {}

    def card(device: Any) -> Copies:
        return made.setdefault(str(device), Copies(device))

    monkeypatch.setattr(from_host, "card", card)
    monkeypatch.setattr(from_host, "BYTES", 1000)
    with several():
        yield made


def drawn(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def parameters(devices: list[str]) -> Tensors:
    """Parameters on these devices, in turn."""
    here = enumerate(drawn(0))
    return [
        torch.nn.Parameter(placed(x, devices[k % len(devices)]), requires_grad=True)
        for k, x in here
    ]


def train(
    optimizer: Any,
    seeds: Any,
    without: int | None = None,
    before: Callable[[Tensors], Any] = lambda params: None,
) -> Tensors:
    """Steps with random gradients; the parameter `without` has none."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for seed in seeds:
        for i, (p, g) in enumerate(zip(params, drawn(seed), strict=True)):
            p.grad = None if i == without else placed(g, str(p.device))
        before(params)
        optimizer.step()
    return [numbers(p.detach()) for p in params]


def slots(optimizer: Any) -> dict[tuple[int, str], Tensor]:
    entries = enumerate(optimizer.state.values())
    return {(i, key): x for i, entry in entries for key, x in entry.items()}


CARD, CARDS = ["cuda:0"], ["cuda:0", "cpu", "cuda:1"]
MAKES: dict[str, Any] = {
    "sgd": lambda: fo.sgd(0.1),
    "momentum": lambda: fo.sgd(0.1, momentum=0.9),
    "adamw": lambda: fo.adamw(fo.linear_schedule(0.1, 0.01, 3)),
    "clipped": lambda: fo.chain(
        fo.clip_by_global_norm(0.5), fo.adamw(0.1), fo.params_ema(0.9)
    ),
    "clipped later": lambda: fo.chain(
        fo.scale_by_adam(), fo.clip_by_global_norm(0.5), fo.trace(0.9)
    ),
    "noise": lambda: fo.chain(fo.add_noise(0.1, 0.5, 3), fo.sgd(0.1, momentum=0.9)),
    "lamb": lambda: fo.lamb(0.1),
    "muon": lambda: fo.muon(0.1),
    "8bit": lambda: fo.stored(fo.adamw(0.1), "8bit"),
    "4bit": lambda: fo.stored(fo.lion(0.1), "4bit"),
    "injected": lambda: fo.inject_hyperparams(fo.adam)(0.1),
    "master": lambda: fo.keep_master_weights(fo.adam(0.1)),
    "finite": lambda: fo.apply_if_finite(fo.adam(0.1), 3),
    "accumulated": lambda: fo.MultiSteps(fo.adam(0.1), 2),
    "schedule free": lambda: fo.schedule_free_sgd(0.1),
    "groups": lambda: fo.partition(
        {"a": fo.adam(0.1), "b": fo.chain(fo.clip_by_global_norm(0.1), fo.sgd(0.1, 0.9))},
        lambda path, p: "a" if p.dim() > 1 else "b",
    ),
}


@pytest.mark.parametrize("devices", [CARD, CARDS], ids=["a card", "cards and the host"])
@pytest.mark.parametrize("name", MAKES)
def test_the_numbers_are_those_of_slots_on_the_card(
    name: str, devices: list[str], cards: Any
) -> None:
    ours, theirs = (
        fo.optim.Optimizer(parameters(devices), MAKES[name]()) for _ in range(2)
    )
    fo.optim.slots_on_host(ours)
    found, expected = train(ours, range(1, 5)), train(theirs, range(1, 5))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    mine = slots(ours)
    for at, x in slots(theirs).items():
        torch.testing.assert_close(numbers(mine[at]), numbers(x), rtol=0, atol=0)
        is_slot = not at[1].endswith(("count", "clock", "step"))
        assert (
            mine[at].device.type == "cpu" or not x.dim() or not is_slot or "key" in at[1]
        )


def test_one_window_is_fetched_while_the_one_before_is_stepped(cards: Any) -> None:
    """A window has at most 1,000 bytes of slots, or one tensor; and two are on the card at a time."""
    optimizer = fo.optim.Adam(parameters(CARD), lr=0.1)
    fo.optim.slots_on_host(optimizer)
    train(optimizer, [1])
    (card,) = cards.values()
    assert card.said == [
        *("fetch 0", "fetch 1", "step 0", "put 0"),
        *("fetch 2", "step 1", "put 1"),
        *("fetch 3", "step 2", "put 2"),
        *("step 3", "put 3", "finish"),
    ]
    assert card.most == 2


def test_a_step_of_one_window_is_made_in_it_every_time(
    cards: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that differ in numbers only go another way with slots on the card."""
    monkeypatch.setattr(from_host, "BYTES", 1 << 20)
    optimizer = fo.optim.Adam(parameters(CARD), lr=0.1)
    fo.optim.slots_on_host(optimizer)
    train(optimizer, range(1, 7))
    (card,) = cards.values()
    assert card.said == ["fetch 0", "step 0", "put 0", "finish"] * 6
    ((fixed, groups),) = optimizer._trained_buckets()
    step = optimizer._plan(fixed, groups).in_place
    assert step.ways and all(way.again is None for way in step.ways.values())


def test_a_step_in_two_passes_fetches_the_slots_of_each(cards: Any) -> None:
    """The norm of Adam's updates is known when all have been worked out."""
    tx = fo.chain(fo.scale_by_adam(), fo.clip_by_global_norm(0.5), fo.trace(0.9))
    optimizer = fo.optim.Optimizer(parameters(CARD), tx)
    fo.optim.slots_on_host(optimizer)
    train(optimizer, [1])
    (card,) = cards.values()
    assert card.said.count("finish") == 2
    assert card.most == 2


def test_a_window_has_the_bytes_that_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(from_host, "BYTES", 10)
    route = from_host.Route([0], [0, 2, 3, 4, 5], [[0, 1, 2, 3, 4]], {})
    card, other = torch.device("cuda:0"), torch.device("cuda:1")
    devices = [card, None, card, other, card, card]
    windows = from_host.in_windows(route, [6, 0, 4, 1, 30, 2], devices)
    assert [x.leaves for x in windows] == [[0, 2], [4], [5], [3]]
    assert [x.places for x in windows] == [[[0, 1]], [[3]], [[4]], [[2]]]


def test_slots_of_parameters_without_a_gradient_stay_where_they_are(cards: Any) -> None:
    optimizer = fo.optim.AdamW(parameters(CARD), lr=0.1)
    fo.optim.slots_on_host(optimizer)
    train(optimizer, [1, 2])
    before = copy.deepcopy(slots(optimizer))
    train(optimizer, [3], without=2)
    for (i, key), x in slots(optimizer).items():
        assert torch.equal(x, before[i, key]) == (i == 2), (i, key)


def test_slots_are_made_on_the_host_and_moved_there(cards: Any) -> None:
    late, early = (fo.optim.AdamW(parameters(CARD), lr=0.1) for _ in range(2))
    fo.optim.slots_on_host(early)
    early.init_state()
    train(late, [1])
    train(early, [1])
    fo.optim.slots_on_host(late)
    assert {type(x) for x in slots(late).values()} == {Tensor}
    assert {type(x) for x in slots(early).values()} == {Tensor}
    torch.testing.assert_close(train(late, [2]), train(early, [2]), rtol=0, atol=0)


def test_groups_schedulers_clipping_and_codes(cards: Any) -> None:
    """As with slots on the card, in an ordinary loop."""

    def made() -> Any:
        ps = parameters(CARD)
        groups = [{"params": ps[:3]}, {"params": ps[3:], "lr": 0.03, "weight_decay": 0.5}]
        return fo.optim.AdamW(groups, lr=0.1, state="8bit")

    ours, theirs = made(), made()
    fo.optim.slots_on_host(ours)
    found = []
    for optimizer in (ours, theirs):
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for seed in (1, 2, 3):
            found.append(train(optimizer, [seed], before=clip))
            scheduler.step()
    torch.testing.assert_close(found[2], found[5], rtol=0, atol=0)
    assert ours.param_groups[1]["lr"] == 0.03 / 8
    codes = [x for x in slots(ours).values() if x.dtype is torch.uint8]
    assert len(codes) == 4 and all(type(x) is Tensor for x in codes)


def clip(params: Tensors) -> None:
    torch.nn.utils.clip_grad_norm_(params, 0.5, foreach=False)


@pytest.mark.parametrize("from_card", [False, True], ids=["from the host", "from a card"])
def test_a_checkpoint_goes_to_the_host_and_training_goes_on(
    from_card: bool, cards: Any
) -> None:
    first = fo.optim.AdamW(parameters(CARD), lr=0.1)
    if not from_card:
        fo.optim.slots_on_host(first)
    train(first, [1, 2])
    saved = first.state_dict()
    if not from_card:
        with _disable_current_modes():
            file = io.BytesIO()
            torch.save(saved["state"], file)
            file.seek(0)
            saved["state"] = torch.load(file, weights_only=True)
    again = fo.optim.AdamW(parameters(CARD), lr=0.1)
    both = [x.param_groups[0]["params"] for x in (again, first)]
    for mine, p in zip(*both, strict=True):
        numbers(mine.detach()).copy_(numbers(p.detach()))
    fo.optim.slots_on_host(again)
    with torch.no_grad():  # a copy with a graph would ask for a driver
        again.load_state_dict(saved)
    assert {type(x) for x in slots(again).values()} == {Tensor}
    torch.testing.assert_close(train(again, [3]), train(first, [3]), rtol=0, atol=0)


def test_a_copy_of_the_optimizer_has_its_slots_on_the_host(cards: Any) -> None:
    optimizer = fo.optim.AdamW(parameters(CARD), lr=0.1)
    fo.optim.slots_on_host(optimizer)
    train(optimizer, [1])
    other = fo.optim.AdamW(parameters(CARD), lr=0.1)
    other.__setstate__(copy.copy(optimizer.__getstate__()))
    (card,) = cards.values()
    card.said.clear()
    train(other, [2])
    assert "fetch 0" in card.said


def test_averages_are_worked_out_on_the_host(cards: Any) -> None:
    for make in (MAKES["clipped"], MAKES["schedule free"]):
        inside = []
        for host in (True, False):
            optimizer = fo.optim.Optimizer(parameters(CARD), make())
            if host:
                fo.optim.slots_on_host(optimizer)
            train(optimizer, [1, 2])
            params = optimizer.param_groups[0]["params"]
            with optimizer.eval_params():
                inside.append([numbers(p.detach()).clone() for p in params])
        torch.testing.assert_close(*inside)


def test_a_loss_scale_decides_about_the_step(cards: Any) -> None:
    """What `torch.amp.GradScaler` sets for the time of a step."""
    ours, theirs = (fo.optim.AdamW(parameters(CARD), lr=0.1) for _ in range(2))
    fo.optim.slots_on_host(ours)
    for seed, infinite in ((1, 0.0), (2, 1.0), (3, 0.0)):
        for optimizer in (ours, theirs):
            optimizer.found_inf = placed(torch.tensor(infinite), "cuda:0")
            train(optimizer, [seed])
    torch.testing.assert_close(train(ours, [4]), train(theirs, [4]), rtol=0, atol=0)
    assert ours.state[ours.param_groups[0]["params"][0]]["step"] == 3


def test_parameters_that_are_moved_later_leave_their_slots_on_the_host(
    cards: Any,
) -> None:
    """Moved by their ``data``, as a model's ``cuda()`` does, they are the same parameters."""
    optimizer = fo.optim.AdamW(parameters(CARD), lr=0.1)
    fo.optim.slots_on_host(optimizer)
    ((fixed, groups),) = optimizer._trained_buckets()
    plan = optimizer._plan(fixed, groups)
    plan.on_host = False  # as it was made of parameters on the CPU
    train(optimizer, [1])
    assert {type(x) for x in slots(optimizer).values()} == {Tensor}


def test_an_error_in_a_window_leaves_nothing_on_the_way(
    cards: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = fo.optim.SGD(parameters(CARD), lr=0.1, momentum=0.9)
    fo.optim.slots_on_host(optimizer)
    train(optimizer, [1])
    (card,) = cards.values()
    wait = card.wait

    def fail(made: Any) -> None:
        if len(card.said) > 5:
            raise RuntimeError("out of memory")
        wait(made)

    card.said.clear()
    monkeypatch.setattr(card, "wait", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(optimizer, [2])
    assert card.said[-1] == "finish" and not card.on_the_way


def fails_in_rehearsal(g: Tensor, m: Tensor) -> Any:
    assert len(g.shape) != 1 or len(g) == 5
    return g, {"m": m + g}


ZEROS = {"m": fo.tree.zeros_like}
REFUSED: dict[str, tuple[Any, str]] = {
    "totals of slots": (
        lambda: fo.leafwise(
            lambda g, m, top: (g / (1 + top), {"m": m + g}),
            slots=ZEROS,
            totals={"top": lambda m: m.abs().sum()},
        ),
        "adds m up over all parameters",
    ),
    "whole trees": (
        lambda: fo.GradientTransformation(
            lambda ps: {"m": fo.tree.map(torch.zeros_like, ps)},
            lambda us, state, ps=None: (us, state),
        ),
        "looks at whole trees",
    ),
    "bits at random": (
        lambda: fo.stored(fo.adamw(0.1), "bfloat16_stochastic"),
        "draws bits for all of its slots",
    ),
    "worked out first": (
        lambda: fo.leafwise(fails_in_rehearsal, slots=ZEROS),
        "has to be worked out before",
    ),
}


def put_on_host_and_train(optimizer: Any) -> None:
    fo.optim.slots_on_host(optimizer)
    train(optimizer, [1])


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_read_all_slots_is_refused_before_anything_is_written(
    name: str, cards: Any
) -> None:
    make, message = REFUSED[name]
    optimizer = fo.optim.Optimizer(parameters(CARD), make())
    with pytest.raises(ValueError, match=message):
        put_on_host_and_train(optimizer)
    params = optimizer.param_groups[0]["params"]
    torch.testing.assert_close([numbers(p.detach()) for p in params], drawn(0))
    assert not optimizer.state
    if name == "whole trees":
        train(optimizer, [1])  # as before the call


def test_what_has_no_windows_is_refused(cards: Any) -> None:
    optimizer = fo.optim.AdamW(parameters(CARD), lr=0.1)
    fo.optim.slots_on_host(optimizer)
    train(optimizer, [1])
    with pytest.raises(ValueError, match=r"report\(\) looks at the whole optimizer"):
        optimizer.report()
    with torch.no_grad(), pytest.raises(ValueError, match="inside of backward"):
        fo.optim.step_in_backward(optimizer)
    captured = fo.optim.AdamW(parameters(CARD), lr=0.1, capturable=True)
    with pytest.raises(ValueError, match="capturable=True"):
        fo.optim.slots_on_host(captured)
    with pytest.raises(ValueError, match="these lie on mps"):
        fo.optim.slots_on_host(fo.optim.SGD(parameters(["mps"]), lr=0.1, momentum=0.9))


def test_on_the_cpu_nothing_changes() -> None:
    ours, theirs = (fo.optim.AdamW(parameters(["cpu"]), lr=0.1) for _ in range(2))
    fo.optim.slots_on_host(ours)
    torch.testing.assert_close(train(ours, [1, 2]), train(theirs, [1, 2]), rtol=0, atol=0)
    assert ours.report()
    fo.optim.step_in_backward(ours).remove()
    with pytest.raises(TypeError, match=r"an optimizer of fo\.optim; got SGD"):
        fo.optim.slots_on_host(torch.optim.SGD(parameters(["cpu"])))


def test_compiled_code_steps_the_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands for a card, for which code can be compiled here."""
    from functorch_opt.optim import plan

    made = Copies(torch.device("cpu"))
    monkeypatch.setattr(from_host, "card_of", lambda p: made)
    monkeypatch.setattr(from_host, "BYTES", 1000)
    monkeypatch.setattr(plan, "is_needed", lambda params: True)
    ours, theirs = (
        fo.optim.AdamW(parameters(["cpu"]), lr=0.1, compile=True) for _ in range(2)
    )
    fo.optim.slots_on_host(ours)
    expected = train(theirs, range(1, 4))
    torch.testing.assert_close(train(ours, range(1, 4)), expected, rtol=0, atol=0)
    assert made.said.count("finish") == 3 and made.most == 2
    torch._dynamo.reset()
    for optimizer in (ours, theirs):  # one operation of the graph
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()
    params, expected = ([*x.param_groups[0]["params"]] for x in (ours, theirs))
    torch.testing.assert_close(params, expected, rtol=0, atol=0)
    assert made.said.count("finish") == 4
    eager = fo.optim.AdamW(parameters(["cpu"]), lr=0.1)
    put_on_host_and_train(eager)
    step = torch.compile(eager.step, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="a step in a graph of yours"):
        step()


class Stream:
    """In the place of a stream of CUDA: says in which order things are launched, and wait."""

    said: ClassVar[list[str]] = []

    def __init__(self, name: str) -> None:
        self.name = name

    def wait_stream(self, other: Stream) -> None:
        self.said.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.said.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        return f"event of {self.name}"

    def synchronize(self) -> None:
        self.said.append(f"host waits for {self.name}")


def test_the_streams_of_a_card_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = iter(["there", "back"])

    @contextmanager
    def stream(one: Stream) -> Iterator[None]:
        Stream.said.append(f"on {one.name}:")
        yield

    monkeypatch.setattr(Stream, "said", [])
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(next(names)))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("step"))
    with several():
        card = from_host.Card(torch.device("cuda:0"))
        host = torch.arange(3.0)
        (there,), made = card.fetch([host])
        assert str(there.device) == "cuda:0"
        card.wait(made)
        numbers(there).mul_(2)
        card.put([there], [host])
        card.finish()
    assert host.tolist() == [0, 2, 4]
    assert Stream.said == [
        *("there waits for back", "on there:", "step waits for event of there"),
        *("back waits for step", "on back:", "host waits for back"),
    ]
