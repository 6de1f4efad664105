"""What the ranks do to slots in a code: the same steps on shards and on whole tensors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import scenarios
import torch
import torch.distributed.checkpoint as dcp
from registry import everywhere
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import functorch_opt as fo
from functorch_opt import tree
from functorch_opt._core.checkpoint import state_dict
from functorch_opt.codecs.codec import CODECS

# ---- the functional layer: given gradients -------------------------------------------------------

SHAPES = {
    "matrix": (37, 45),
    "vector": (1000,),
    "conv": (5, 33, 7),
    "few": (3, 2),
    "one": (1,),
    "scalar": (),
    "empty": (0, 4),
    "plain": (20, 30),
}

EVEN = {"matrix": (37, 48), "conv": (5, 33, 8), "few": (3, 4)}
"""Shapes whose last dimension, and each rank's part of it, has whole bytes of two codes."""

CHAINS: dict[str, Callable[[], fo.GradientTransformation]] = {
    "adamw": lambda: fo.chain(fo.clip(1.0), fo.adamw(0.1)),
    "lion": lambda: fo.lion(0.1),
    "one slot of two": lambda: fo.adam(0.1),
    "sums": lambda: summed(),
    "every other": lambda: fo.partition(
        {"coded": fo.adam(0.1), "plain": fo.sgd(0.1, momentum=0.9)},
        lambda path, p: "coded" if p.dim() != 1 else "plain",
    ),
    "a wrapper": lambda: fo.lookahead(fo.adam(0.1), 2, 0.5),
    "whole tensors": lambda: fo.masked(
        fo.chain(fo.scale_by_muon(), fo.scale(0.1)),
        lambda path, p: p.dim() == 2 and p.numel() > 0,
    ),
}


def summed() -> fo.GradientTransformation:
    """A rule with a sum, which the ranks exchange before the bounds of what the rule makes."""

    def rule(g: Tensor, m: Tensor, n: Tensor) -> Any:
        m = 0.9 * m + g / (1 + n)
        return m, {"m": m}

    return fo.leafwise(
        rule,
        slots={"m": fo.tree.zeros_like},
        sums={"n": lambda g: (g.double() * 0 + 1).sum().float()},
    )


def transformation(name: str, code: str = "8bit") -> fo.GradientTransformation:
    codes: Any = {"nu": code} if name == "one slot of two" else code
    return fo.stored(CHAINS[name](), codes, where=everywhere)


def drawn(step: int, nan: bool = False, even: bool = False) -> dict[str, Tensor]:
    """Gradients with blocks of one sign among them, and blocks of zeros."""
    generator = torch.Generator().manual_seed(step)
    shapes = SHAPES | EVEN if even else SHAPES
    given = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    given["vector"][:300] = given["vector"][:300].abs()
    given["vector"][300:600] = 0
    given["conv"] = -given["conv"].abs()
    if nan:
        given["matrix"][20, 30] = torch.nan
        given["plain"][1, 2] = -torch.inf
    return given


def places() -> dict[str, Any]:
    """Layouts, and one in which a dim of the tensor is cut twice."""
    found = dict(scenarios.layouts())
    if "rows, columns" in found:
        found["rows, cut twice"] = found["rows, columns"][0], [Shard(0), Shard(0)]
    return found


def three_steps(rank: int, name: str, layout: str, code: str = "8bit") -> dict[str, Any]:
    """What differs between three steps of ``update``, or of ``compiled_step``, on shards and on
    whole tensors.
    """
    tx, where = transformation(name, code), places()[layout]
    low = CODECS[code].dtype

    def put(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            n: x if n == "plain" else scenarios.place(x, *where)
            for n, x in tensors.items()
        }

    even = code == "4bit"
    ps = drawn(0, even=even)
    state = tx.init(ps)
    shards, in_place = (put(ps), tx.init(put(ps))), (put(ps), tx.init(put(ps)))
    step = scenarios.traced_step(tx)
    for k in (1, 2, 3):
        gs = drawn(k, even=even)
        us, state = tx.update(gs, state, ps)
        ps = fo.apply_updates(ps, us)
        us, held = tx.update(put(gs), shards[1], shards[0])
        shards = fo.apply_updates(shards[0], us), held
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            in_place = step(in_place[0], put(gs), in_place[1])
    expected = state_dict((ps, state))
    return {
        "update": off(expected, shards),
        "in place": off(expected, in_place),
        "coded": sum(x.dtype is low for x in expected.values()),
    }


def off(expected: dict[str, Tensor], found: Any) -> dict[str, float]:
    """How far those values are off that are not the same to the bit."""
    whole = state_dict(tree.map(tree.whole, found))
    assert whole.keys() == expected.keys()
    differ = {}
    for key, x in expected.items():
        same = torch.equal(whole[key], x)
        if not same:
            differ[key] = float((1.0 * whole[key] - 1.0 * x).abs().max())
    return differ


def with_nan(rank: int) -> list[tuple[int, int]]:
    """How many numbers of each slot are not finite, on shards and on whole tensors."""
    tx, where = fo.stored(fo.adamw(0.1), where=everywhere), places()["rows"]
    ps, gs = drawn(0), drawn(1, True)

    def put(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: scenarios.place(x, *where) for n, x in tensors.items()}

    mine = put(ps)
    _, state = tx.update(gs, tx.init(ps), ps)
    _, held = tx.update(put(gs), tx.init(mine), mine)
    plain = fo.adamw(0.1)
    numbers = fo.recoded(fo.state_dict(state), plain.init(ps))
    theirs = fo.recoded(fo.state_dict(held), plain.init(mine))
    return [not_finite(tree.whole(theirs[n]), x) for n, x in numbers.items()]


def not_finite(*xs: Tensor) -> tuple[int, ...]:
    return tuple([int((~x.isfinite()).sum()) for x in xs])


def what_is_sent(rank: int, name: str) -> dict[str, int]:
    """The messages of one step, by their kinds."""
    tx, where = transformation(name), places()["rows"]
    mine = {n: scenarios.place(x, *where) for n, x in drawn(0).items()}
    gs = {n: scenarios.place(x, *where) for n, x in drawn(1).items()}
    state = tx.init(mine)
    with CommDebugMode() as seen:
        tx.update(gs, state, mine)
    return {str(kind): n for kind, n in seen.get_comm_counts().items() if n}


def where_it_lies(rank: int) -> dict[str, Any]:
    tx, where = transformation("adamw"), places()["rows"]
    mine = {n: scenarios.place(x, *where) for n, x in drawn(0).items()}
    state = tx.init(mine)
    codes, scales = fo.get(state, "mu")["matrix"], fo.get(state, "mu_scale")["matrix"]
    return {
        "codes": codes.placements == (Shard(0),),
        "scales": scales.placements == (Replicate(),),
        "bytes": codes.to_local().nbytes,
    }


def in_a_graph(rank: int) -> str:
    tx, where = transformation("adamw"), places()["rows"]
    mine = {"w": scenarios.place(torch.ones(40, 40), *where)}
    state = tx.init(mine)
    step = torch.compile(tx.update, fullgraph=True, backend="eager")
    try:
        step(mine, state, mine)
    except Exception as error:
        return str(error)
    return ""


def recoded(rank: int, code: str) -> dict[str, float]:
    """A float32 state of shards goes into codes and back: beside the same of whole tensors."""
    plain, where = fo.adamw(0.1), places()["rows"]
    small = fo.stored(plain, code, where=everywhere)
    even = code == "4bit"
    found = []
    for put in (lambda x: x, lambda x: scenarios.place(x, *where)):
        ps, gs = [put_all(put, drawn(k, even=even)) for k in (0, 1)]
        _, state = plain.update(gs, plain.init(ps), ps)
        fresh = small.init(ps)
        coded = fo.load_state_dict(fresh, fo.recoded(fo.state_dict(state), fresh))
        back = fo.recoded(fo.state_dict(coded), state)
        found.append((state_dict(coded), back))
    return {**off(found[0][0], found[1][0]), **off(found[0][1], found[1][1])}


def put_all(put: Callable[[Tensor], Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {n: put(x) for n, x in tensors.items()}


def half_a_byte(rank: int) -> str:
    """The error of a matrix whose rows have no whole number of bytes on a rank."""
    tx, where = transformation("adamw", "4bit"), places()["columns"]
    try:
        tx.init({"layer/w": scenarios.place(torch.ones(8, 46), *where)})
    except TypeError as error:
        return str(error)
    return ""


# ---- the stateful optimizers ---------------------------------------------------------------------


class Net(nn.Module):
    """Its matrices are large enough for a code, and neither 2 nor 4 divides their rows."""

    def __init__(self, width: int = 701) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, width), nn.Linear(width, 7)
        self.out = nn.Linear(7, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.down(torch.tanh(self.up(x)))))


def make_net(seed: int = 0, code: str = "8bit") -> Net:
    """Two codes in a byte take an even width."""
    torch.manual_seed(seed)
    return Net(702 if code == "4bit" else 701)


def sharded(net: Net) -> Net:
    for layer in (net.up, net.down):
        fully_shard(layer, mesh=scenarios.mesh())
    return fully_shard(net, mesh=scenarios.mesh())


def optimizers(
    net: nn.Module, name: str, state: str = "8bit", **options: Any
) -> list[torch.optim.Optimizer]:
    if name == "AdamW":
        return [fo.optim.AdamW(net.parameters(), lr=0.01, state=state, **options)]
    matrices = [p for p in net.parameters() if p.numel() > 4096]
    rest = [p for p in net.parameters() if p.numel() <= 4096]
    return [
        fo.optim.Muon(matrices, lr=0.01, state=state, **options),
        fo.optim.AdamW(rest, lr=0.01, **options),
    ]


def train(net: nn.Module, opts: list[torch.optim.Optimizer], steps: range) -> None:
    """Every rank has the whole batch, so its gradients are the mean of equal ones."""
    for step in steps:
        x, y = (z.float() for z in scenarios.batch(step))
        scenarios.loss(net, x, y).backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()


def everything(net: nn.Module, opts: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Parameters and state, gathered."""
    found = scenarios.gathered(net)
    for name, p in net.named_parameters():
        for opt in opts:
            for key, x in opt.state.get(p, {}).items():
                found[f"{name} {key}"] = tree.whole(x)
    return found


def under_fsdp(rank: int, name: str, compile: bool, code: str = "8bit") -> dict[str, Any]:
    alone, net = make_net(code=code), sharded(make_net(code=code))
    theirs = optimizers(alone, name, code)
    train(alone, theirs, range(5))
    opts = optimizers(net, name, code, compile=compile)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(net, opts, range(5))
    expected = everything(alone, theirs)
    return {
        "differ": off(expected, everything(net, opts)),
        "coded": sum(x.dtype is CODECS[code].dtype for x in expected.values()),
        "warned": [str(w.message) for w in caught if "in a code" in str(w.message)],
    }


def tensor_parallel(rank: int) -> dict[str, float]:
    """torch's own tensor parallelism: `up` is cut by columns of the product, `down` by rows."""
    # torch's divides only what can be divided evenly; a block of `down` lies on both ranks.
    alone = Net(width=702).double()
    net = copy.deepcopy(alone)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(net, scenarios.mesh(), plan)
    found = []
    for model in (alone, net):
        opt = fo.optim.AdamW(model.parameters(), lr=0.01, state="8bit")
        for step in range(5):
            scenarios.loss(model, *scenarios.batch(step)).backward()
            opt.step()
            opt.zero_grad()
        found.append(everything(model, [opt]))
    codes = [key for key, x in found[0].items() if x.dtype is torch.uint8]
    off_by = [(found[0][k].int() - found[1][k].int()).abs().max() for k in codes]
    names = [key for key, _ in alone.named_parameters()]
    return {
        "codes": float(max(off_by)),
        "parameters": max(float((found[0][n] - found[1][n]).abs().max()) for n in names),
        "coded": len(codes),
    }


def save(rank: int, name: str, folder: str, code: str) -> None:
    net = sharded(make_net(code=code))
    opts = optimizers(net, name, code)
    train(net, opts, range(3))
    dcp.save(scenarios.checkpoint(net, opts), checkpoint_id=folder)


def load(rank: int, name: str, folder: str, code: str) -> dict[str, float]:
    """Go on with the ranks that there are now: what differs from a run of one process."""
    alone = make_net(code=code)
    theirs = optimizers(alone, name, code)
    train(alone, theirs, range(6))
    one = torch.distributed.get_world_size() == 1
    net = make_net(1, code) if one else sharded(make_net(1, code))
    opts = optimizers(net, name, code)
    state = scenarios.checkpoint(net, opts)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        net, opts, model_state_dict=state["model"], optim_state_dict=state["optimizers"]
    )
    train(net, opts, range(3, 6))
    return off(everything(alone, theirs), everything(net, opts))
