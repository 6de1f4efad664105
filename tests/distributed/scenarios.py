"""What the ranks do: functions of the rank that train something and return what the tests assert.

The reference is one process with the whole batch. Every rank works it out for itself; the sharded
model sees this rank's rows of the batch.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import executions
import programs
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from registry import ROWS
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import functorch_opt as fo
from functorch_opt import tree
from functorch_opt._core.checkpoint import state_dict

STEPS, ROWS_OF_BATCH = 6, 8


class Net(nn.Module):
    """Sizes that neither 2 nor 4 divides: on 4 ranks some have less than others, and some
    nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down, self.out = (
            nn.Linear(6, 7),
            nn.LayerNorm(7),
            nn.Linear(7, 3),
            nn.Linear(3, 1),
        )
        self.gain = nn.Parameter(torch.tensor([1.0, 0.5, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(
            torch.tanh(self.down(torch.tanh(self.norm(self.up(x))))) * self.gain
        )


def make_net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(ROWS_OF_BATCH, 6, generator=generator, dtype=torch.float64)
    return x, x.prod(dim=1, keepdim=True) + x.sum(dim=1, keepdim=True)


def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return ((net(x) - y) ** 2).mean()


@functools.cache
def mesh(*shape: int) -> DeviceMesh:
    """A mesh of all ranks. It is made once: its groups have threads that never end."""
    return init_device_mesh(
        "cpu",
        shape or (dist.get_world_size(),),
        mesh_dim_names=("replicate", "shard")[-max(1, len(shape)) :],
    )


def shard(net: Net, how: str = "all") -> Net:
    """ "all": FSDP2; "mixed": `norm` and `gain` stay ordinary; "hybrid": two copies, each in two
    parts.
    """
    where = mesh(2, 2) if how == "hybrid" else mesh()
    for layer in (net.up, net.down, net.out):
        fully_shard(layer, mesh=where)
    return net if how == "mixed" else fully_shard(net, mesh=where)


def gathered(net: nn.Module) -> dict[str, Tensor]:
    return {name: tree.whole(p.detach()).clone() for name, p in net.named_parameters()}


Optimizers = Callable[[dict[str, nn.Parameter]], list[torch.optim.Optimizer]]


def train(
    net: nn.Module,
    opts: Iterable[torch.optim.Optimizer],
    steps: range,
    mine: slice = slice(None),
    before_step: Any = None,
) -> None:
    """An ordinary loop.

    A plain parameter of a partly sharded model gets the mean of the ranks' gradients by hand, as
    DDP would do it.
    """
    opts = list(opts)
    for step in steps:
        x, y = batch(step)
        loss(net, x[mine], y[mine]).backward()
        for p in net.parameters():
            if (
                mine != slice(None)
                and not isinstance(p, DTensor)
                and not isinstance(net, DistributedDataParallel)
            ):
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
        if before_step:
            before_step(net)
        for opt in opts:
            opt.step()
            opt.zero_grad()


def my_rows(rank: int) -> slice:
    n = ROWS_OF_BATCH // dist.get_world_size()
    return slice(rank * n, rank * n + n)


# ---- optimizers ----------------------------------------------------------------------------------


def muon(named: dict[str, nn.Parameter], **options: Any) -> list[torch.optim.Optimizer]:
    matrices = [p for p in named.values() if p.ndim == 2]
    rest = [p for p in named.values() if p.ndim != 2]
    return [
        fo.optim.Muon(matrices, lr=0.02, **options),
        fo.optim.AdamW(rest, lr=0.05, **options),
    ]


def generic(make: Callable[..., Any], **hyper: Any) -> Any:
    return lambda named, **options: [
        fo.optim.Optimizer(named.items(), make if hyper else make(), **hyper, **options)
    ]


def torchs_adamw(named: dict[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(named.values(), lr=0.05, weight_decay=0.1, foreach=False)]


OURS: dict[str, Any] = {
    "AdamW": lambda named, **options: [
        fo.optim.AdamW(named.values(), lr=0.05, weight_decay=0.1, **options)
    ],
    "clip": generic(lambda: fo.chain(fo.clip_by_global_norm(0.05), fo.adamw(0.05))),
    "clip of each group": generic(
        lambda: fo.partition(
            {
                "matrix": fo.chain(fo.clip_by_global_norm(0.05), fo.adam(0.05)),
                "rest": fo.chain(fo.clip_by_global_norm(0.02), fo.sgd(0.1)),
            },
            lambda path, p: "matrix" if p.ndim == 2 else "rest",
        )
    ),
    "lamb": generic(fo.lamb, learning_rate=0.05, weight_decay=0.1),
    "lamb, master": generic(
        lambda: fo.keep_master_weights(fo.lamb(0.05, weight_decay=0.1))
    ),
    "lars": generic(fo.lars, learning_rate=0.5, weight_decay=0.1, trust_coefficient=0.1),
    "centralize": generic(lambda: fo.chain(fo.centralize(), fo.sgd(0.05, momentum=0.9))),
    "Muon": muon,
    "NAdam": lambda named, **options: [
        fo.optim.NAdam(named.values(), lr=0.05, **options)
    ],
    "Adafactor": lambda named, **options: [
        fo.optim.Adafactor(named.values(), lr=0.05, **options)
    ],
}
REFERENCES = OURS | {"AdamW": torchs_adamw}


# ---- FSDP2 ---------------------------------------------------------------------------------------


def counts(entry: dict[str, Any]) -> set[float]:
    """How many steps the state of a parameter says that it has made: one number, if all is well."""
    return {
        float(value)
        for key, value in entry.items()
        if key == "step" or key.endswith("/count")
    }


def trajectory(rank: int, name: str, how: str, compile: bool) -> dict[str, Any]:
    """How far a sharded run ends from one process, how far that has moved, and where the state
    lies.
    """
    alone = make_net()
    start = gathered(alone)
    train(alone, REFERENCES[name](dict(alone.named_parameters())), range(STEPS))
    net = shard(make_net(), how)
    opts = OURS[name](dict(net.named_parameters()), compile=compile)
    train(net, opts, range(STEPS), my_rows(rank))
    end, expected = gathered(net), gathered(alone)
    placements = {}
    for opt in opts:
        for p in opt.param_groups[0]["params"]:
            for key, value in opt.state[p].items():
                where = value.placements if isinstance(value, DTensor) else None
                own = p.placements if isinstance(p, DTensor) else None
                placements[key, value.dim() > 0] = placements.get(
                    (key, value.dim() > 0), True
                ) and (where == own if value.dim() else None)
    return {
        "error": max(float((end[n] - expected[n]).abs().max()) for n in start),
        "moved": min(float((end[n] - start[n]).abs().max()) for n in start),
        "placements": {key: same for (key, shaped), same in placements.items() if shaped},
        "scalars": sorted({key for key, shaped in placements if not shaped}),
        "steps": sorted(
            {
                n
                for opt in opts
                for p in opt.param_groups[0]["params"]
                for n in counts(opt.state[p])
            }
        ),
        "compiled": sum(
            len(segment.compiled)
            for opt in opts
            for plan in opt._plans.values()
            if compile
            for found in plan.in_place.segments.values()
            for segment in found
        ),
        "empty": [
            n
            for n, p in net.named_parameters()
            if isinstance(p, DTensor) and p.to_local().numel() == 0
        ],
    }


def looked_at(rank: int) -> dict[str, float]:
    """How far a look at a sharded step is from that of one process."""
    alone, net = make_net(), shard(make_net())

    def ratio(u: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return u.norm() / p.norm()

    inner = fo.chain(
        fo.clip_by_global_norm(0.1),
        fo.adamw(0.1, weight_decay=0.1),
        fo.monitor({"norm": tree.norm}, layers={"ratio": ratio}),
    )
    tx = fo.apply_if_finite(inner, 3)
    opts = [fo.optim.Optimizer(of.named_parameters(), tx) for of in (alone, net)]
    for step in range(2):
        x, y = batch(step)
        loss(alone, x, y).backward()
        mine = my_rows(rank)
        loss(net, x[mine], y[mine]).backward()
        looks = [opt.report() for opt in opts]
        for opt in opts:
            opt.step()
            opt.zero_grad()
    one, other = looks
    assert one.keys() == other.keys()
    return {name: abs(float(x - other[name])) for name, x in one.items()}


def norm_and_clip(rank: int, max_norm: float) -> dict[str, Any]:
    """A chain that clips, against torch's `clip_grad_norm_` and torch's AdamW, both sharded; and
    the norms that the two see.
    """
    seen: dict[str, list[float]] = {"ours": [], "torchs": []}
    theirs, ours = shard(make_net()), shard(make_net())

    def torchs_clip(net: nn.Module) -> None:
        seen["torchs"].append(
            float(tree.whole(nn.utils.clip_grad_norm_(net.parameters(), max_norm)))
        )

    def our_norm(net: nn.Module) -> None:
        seen["ours"].append(float(tree.norm([p.grad for p in net.parameters()])))

    train(
        theirs,
        torchs_adamw(dict(theirs.named_parameters())),
        range(STEPS),
        my_rows(rank),
        torchs_clip,
    )
    tx = fo.chain(fo.clip_by_global_norm(max_norm), fo.adamw(0.05, weight_decay=0.1))
    train(
        ours,
        [fo.optim.Optimizer(ours.parameters(), tx)],
        range(STEPS),
        my_rows(rank),
        our_norm,
    )
    a, b = gathered(ours), gathered(theirs)
    return {**seen, "error": max(float((a[n] - b[n]).abs().max()) for n in a)}


# ---- the functional layer: given gradients, any layout -------------------------------------------


def layouts() -> dict[str, tuple[DeviceMesh, list[Any]]]:
    if dist.get_world_size() == 4:
        grid = mesh(2, 2)
        return {
            "rows, columns": (grid, [Shard(0), Shard(1)]),
            "copies of columns": (grid, [Replicate(), Shard(1)]),
        }
    return {
        "rows": (mesh(), [Shard(0)]),
        "columns": (mesh(), [Shard(1)]),
        "copies": (mesh(), [Replicate()]),
    }


SHAPES = {
    "conv": (5, 3, 1, 2),
    "bias": (3,),
    "matrix": (3, 2),
    "row": (1, 6),
    "empty": (0, 2),
    "scalar": (),
    "plain": (2, 3),
}


def values(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


def place(x: Tensor, where: DeviceMesh, placements: list[Any]) -> Tensor:
    """Dims that a tensor does not have are not split."""
    fitting = [
        p if p.is_replicate() or p.dim < x.dim() else Replicate() for p in placements
    ]
    return distribute_tensor(x, where, fitting, src_data_rank=None)


def row_on_shards(rank: int, name: str) -> dict[str, Any]:
    """Every variant of a row of the registry, two steps with given gradients, in every layout:
    against ordinary tensors.
    """
    row = next(row for row in ROWS if row.name == name)
    errors: dict[str, float] = {}
    for i, variant in enumerate(row.variants):
        tx = row.build(variant)
        for layout, where in layouts().items():

            def put(tensors: dict[str, Tensor], where: Any = where) -> dict[str, Tensor]:
                return {
                    n: x if n == "plain" else place(x, *where) for n, x in tensors.items()
                }

            ps = values(0)
            mine, state = put(ps), tx.init(ps)
            held = tx.init(mine)
            for step in (1, 2):
                gs = values(step)
                us, state = tx.update(gs, state, ps)
                ours, held = tx.update(put(gs), held, mine)
                assert all(
                    isinstance(u, DTensor) == (n != "plain") for n, u in ours.items()
                )
                ps, mine = fo.apply_updates(ps, us), fo.apply_updates(mine, ours)
            whole, expected = (
                state_dict(tree.map(tree.whole, (mine, held))),
                state_dict(tree.map(tree.whole, (ps, state))),
            )
            assert whole.keys() == expected.keys()
            worst = [
                float(((1.0 * whole[k] - x) / (1 + x.abs())).abs().max())
                for k, x in (
                    (k, 1.0 * x) for k, x in expected.items()
                )  # flags are 0 and 1
                if x.numel()
            ]
            errors[f"{i}, {layout}"] = max(worst)
    return errors


def programs_on_shards(rank: int, seeds: list[int]) -> tuple[int, list[str]]:
    """Random programs with every tensor in some layout: how many, and what is wrong with which."""
    failures, checked = [], 0
    for seed in seeds:
        drawn = programs.program(seed)
        if not drawn.shards:
            continue
        layout, where = [*layouts().items()][seed % len(layouts())]

        def put(x: Tensor, where: Any = where) -> Tensor:
            return x if isinstance(x, DTensor) else place(x.contiguous(), *where)

        names = {
            f"update, sharded by {layout}": sharded_step(put, executions.pure_step),
            f"compiled_step, sharded by {layout}": sharded_step(put, traced_step),
            f"Optimizer, sharded by {layout}": sharded_optimizer(put),
        }
        executions.ALL.update(names)
        try:
            failures += [str(failure) for failure in executions.check(drawn, names)]
        except executions.Unfit:
            continue
        checked += 1
    return checked, failures


def around(inner: fo.GradientTransformation) -> fo.GradientTransformation:
    """A wrapper that needs what came in, after `inner`."""
    return fo.wrap(inner, after=lambda u, g: u + 0.1 * g)


def centralized() -> fo.GradientTransformation:
    return fo.leafwise(lambda g: g - g.mean(), kind="tensorwise")


def highest() -> fo.GradientTransformation:
    """A maximum over a slot that is wider than its parameter. A part of it may be empty."""

    def rule(g: Tensor, m: Tensor, top: Tensor) -> Any:
        return g / (1 + top), {"m": m + g}

    slots = {"m": lambda p: torch.zeros_like(p, dtype=torch.float64)}
    return fo.leafwise(
        rule, slots=slots, sums={"top": fo.largest(lambda m: m.abs().amax())}
    )


PASSES: dict[str, Callable[[], fo.GradientTransformation]] = {
    "a wrapper behind whole tensors": lambda: fo.chain(
        fo.scale_by_adam(), centralized(), around(fo.scale_by_rms())
    ),
    "a gate behind whole tensors": lambda: fo.chain(
        centralized(), fo.gate(fo.scale_by_rms(), lambda count: count % 2 == 0)
    ),
    "a wrapper beside another group": lambda: fo.partition(
        {"x": highest(), "y": around(fo.clip_by_global_norm(0.5))},
        lambda path, p: "x" if p.dim() > 1 else "y",
    ),
    "a maximum of an empty part": highest,
    "sums in several dtypes": lambda: fo.leafwise(
        lambda g, v, n: (g, {"v": torch.lerp(v, g + 0.1 * n, 0.2)}),
        slots={"v": fo.tree.zeros_like},
        sums={"n": lambda g: (g * g).sum()},
    ),
}


def passes_on_shards(rank: int, name: str, layout: str) -> float:
    """Three steps of `compiled_step` on shards, beside the same on whole tensors."""
    tx, where = PASSES[name](), layouts()[layout]
    shapes = {"a": (3, 2), "b": (1,), "c": (1, 2), "d": ()}

    def drawn(step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        given = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
        return {**given, "a": given["a"].double()}

    ps = drawn(0)
    mine = {n: place(x, *where) for n, x in ps.items()}
    state, held = tx.init(ps), tx.init(mine)
    step = traced_step(tx)
    for k in range(1, 4):
        gs = drawn(k)
        updates, state = tx.update(gs, state, ps)
        ps = fo.apply_updates(ps, updates)
        mine, held = step(mine, {n: place(x, *where) for n, x in gs.items()}, held)
    return max(float((tree.whole(mine[n]) - x).abs().max()) for n, x in ps.items())


def traced_step(tx: fo.GradientTransformation) -> executions.CompiledStep:
    return executions.CompiledStep(tx, True, "eager")


def sharded_step(put: Callable[[Tensor], Tensor], make: Callable[..., Any]) -> Any:
    def execute(drawn: Any, plan: executions.Plan) -> Any:
        tx = plan.tx()
        return executions.run(
            plan, make(tx), tx, moved=lambda given: tree.map(put, given)
        )

    return execute


def sharded_optimizer(put: Callable[[Tensor], Tensor]) -> Any:
    def execute(drawn: Any, plan: executions.Plan) -> Any:
        opt = executions.optimizer(drawn, plan, False, put)
        return executions.train(plan, opt, opt.step, put=put)

    return execute


def sums_not_taken(rank: int) -> float:
    """Gradients that are terms of a sum: an elementwise rule that is not linear must see the
    sum.
    """
    tx, where = fo.chain(fo.clip_by_global_norm(0.5), fo.adam(0.1)), mesh()
    ps, terms = values(0), [values(10 + r) for r in range(dist.get_world_size())]
    gs = {n: sum(term[n] for term in terms) for n in ps}
    mine = {n: place(x, where, [Shard(0)]) for n, x in ps.items()}
    partial = {n: DTensor.from_local(terms[rank][n], where, [Partial()]) for n in ps}
    us, _ = tx.update(gs, tx.init(ps), ps)
    ours, _ = tx.update(partial, tx.init(mine), mine)
    return max(
        float((tree.whole(ours[n]) - u).abs().max()) for n, u in us.items() if u.numel()
    )


def differentiated(rank: int) -> float:
    """d loss / d learning rate through three updates of sharded parameters, against ordinary
    ones.
    """

    def after(put: Callable[[Tensor], Tensor], lr: Tensor) -> Tensor:
        ps = {n: put(x) for n, x in values(0).items() if n in ("conv", "matrix", "bias")}
        tx = fo.chain(fo.clip_by_global_norm(0.5), fo.adam(lr, eps=1e-3))
        state = tx.init(ps)
        for step in range(3):
            gs = {n: put(x) + 0.1 * ps[n] for n, x in values(step + 1).items() if n in ps}
            us, state = tx.update(gs, state, ps)
            ps = fo.apply_updates(ps, us)
        return sum(tree.whole((p**2).sum()) for p in ps.values())

    where = mesh()
    slopes = []
    for put in (lambda x: x, lambda x: place(x, where, [Shard(0)])):
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        after(put, lr).backward()
        slopes.append(float(lr.grad))
    return abs(slopes[0] - slopes[1]) / abs(slopes[0])


def in_a_graph(rank: int) -> tuple[int, float]:
    """The functional update of sharded tensors, a norm among them, in a user's compiled step:
    graphs, and the error against eager.
    """
    tx, where, graphs = fo.chain(fo.clip_by_global_norm(0.5), fo.adamw(0.1)), mesh(), []

    def put(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            n: x if n == "plain" else place(x, where, [Shard(0)])
            for n, x in tensors.items()
            if x.numel()
        }

    def step(gs: Any, state: Any, ps: Any) -> Any:
        us, state = tx.update(gs, state, ps)
        return fo.apply_updates(ps, us), state

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    ps = mine = put(values(0))
    state = ours = tx.init(ps)
    for k in (1, 2, 3, 4):
        ps, state = step(put(values(k)), state, ps)
        mine, ours = compiled(put(values(k)), ours, mine)
    return len(graphs), max(
        float((tree.whole(mine[n]) - tree.whole(p)).abs().max()) for n, p in ps.items()
    )


def misplaced(rank: int) -> list[str]:
    """The errors of mixing ordinary and sharded tensors at one place."""
    where = mesh()
    plain = {"w": torch.ones(4, 2)}
    sharded = {"w": place(plain["w"], where, [Shard(0)])}
    tx, errors = fo.adam(0.1), []
    for gs, of, ps in (
        (plain, sharded, sharded),
        (sharded, plain, plain),
        (sharded, plain, sharded),
    ):
        for step in (
            tx.update,
            lambda gs, state, ps: fo.compiled_step(tx)(ps, gs, state),
        ):
            with pytest.raises(ValueError, match="ordinary tensor") as caught:
                step(gs, tx.init(of), ps)
            errors.append(str(caught.value))
    return errors


def fail_on_one_rank(rank: int) -> None:
    if rank == 1:
        raise ValueError("only here")
    dist.barrier()


def hang_on_one_rank(rank: int) -> None:
    if rank == 0:
        dist.barrier()


# ---- checkpoints ---------------------------------------------------------------------------------


def fresh_state(
    rank: int, name: str, options: dict[str, bool], sharded: bool
) -> dict[str, Any]:
    """Look at the state of a fresh optimizer by torch's function, then train: against an optimizer
    that nobody has looked at.
    """
    nets = [shard(make_net()) if sharded else make_net() for _ in range(2)]
    (looked_at,), (left_alone,) = [
        OURS[name](dict(net.named_parameters())) for net in nets
    ]
    before = gathered(nets[0])
    seen = get_optimizer_state_dict(
        nets[0], looked_at, options=StateDictOptions(**options)
    )
    same = all(torch.equal(p, before[n]) for n, p in gathered(nets[0]).items())
    counted = {n for entry in looked_at.state.values() for n in counts(entry)}
    mine = my_rows(rank) if sharded else slice(None)
    for net, opt in zip(nets, (looked_at, left_alone), strict=True):
        train(net, [opt], range(3), mine)
    a, b = gathered(nets[0]), gathered(nets[1])
    return {
        "same": same,
        "counts": counted,
        "equal": all(torch.equal(a[n], b[n]) for n in a),
        "keys": sorted(map(str, seen.get("state", seen))),
    }


def masked_round_trip(rank: int, options: dict[str, bool]) -> dict[str, Any]:
    """A transformation that keeps nothing for most parameters, through torch's strict functions."""
    tx = fo.masked(
        fo.chain(fo.clip_by_global_norm(0.5), fo.adam(0.05)),
        lambda path, p: p.ndim == 2,
        otherwise="zero",
    )
    nets = [shard(make_net()) for _ in range(2)]
    opts = [fo.optim.Optimizer(net.named_parameters(), tx) for net in nets]
    train(nets[0], opts[:1], range(3), my_rows(rank))
    chosen = StateDictOptions(**options)
    model_state, state = get_state_dict(nets[0], opts[0], options=chosen)
    set_state_dict(
        nets[1],
        opts[1],
        model_state_dict=copy.deepcopy(model_state),
        optim_state_dict=copy.deepcopy(state),
        options=chosen,
    )
    train(nets[0], opts[:1], range(3, 6), my_rows(rank))
    train(nets[1], opts[1:], range(3, 6), my_rows(rank))
    a, b = gathered(nets[0]), gathered(nets[1])
    return {
        "equal": all(torch.equal(a[n], b[n]) for n in a),
        "moved": float((a["up.weight"] - gathered(make_net())["up.weight"]).abs().max()),
    }


def checkpoint(net: nn.Module, opts: list[torch.optim.Optimizer]) -> dict[str, Any]:
    model, optimizers = get_state_dict(net, opts)
    return {"model": model, "optimizers": optimizers}


def save(rank: int, name: str, folder: str, steps: int) -> None:
    net = shard(make_net())
    opts = OURS[name](dict(net.named_parameters()))
    train(net, opts, range(steps), my_rows(rank))
    dcp.save(checkpoint(net, opts), checkpoint_id=folder)


def load(rank: int, name: str, folder: str, steps: int) -> float:
    """Go on from a checkpoint with the ranks that there are now; how far from one process that was
    never interrupted.
    """
    alone = make_net()
    train(alone, REFERENCES[name](dict(alone.named_parameters())), range(2 * steps))
    one = dist.get_world_size() == 1
    net = make_net(seed=1) if one else shard(make_net(seed=1))
    opts = OURS[name](dict(net.named_parameters()))
    state = checkpoint(net, opts)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        net, opts, model_state_dict=state["model"], optim_state_dict=state["optimizers"]
    )
    train(net, opts, range(steps, 2 * steps), slice(None) if one else my_rows(rank))
    a, b = gathered(net), gathered(alone)
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def functional_save(rank: int, folder: str) -> None:
    tx, where = fo.chain(fo.clip_by_global_norm(0.5), fo.adamw(0.1)), mesh()
    ps = {n: place(x, where, [Shard(0)]) for n, x in values(0).items()}
    state = tx.init(ps)
    us, state = tx.update(
        {n: place(x, where, [Shard(0)]) for n, x in values(1).items()}, state, ps
    )
    dcp.save(
        {"params": fo.apply_updates(ps, us), "state": fo.state_dict(state)},
        checkpoint_id=folder,
    )


def functional_load(rank: int, folder: str) -> float:
    tx, where = fo.chain(fo.clip_by_global_norm(0.5), fo.adamw(0.1)), mesh()

    def step(ps: Any, state: Any, k: int, put: Any) -> Any:
        us, state = tx.update({n: put(x) for n, x in values(k).items()}, state, ps)
        return fo.apply_updates(ps, us), state

    expected = values(0), tx.init(values(0))
    for k in (1, 2):
        expected = step(*expected, k, lambda x: x)

    def put(x: Tensor) -> Tensor:
        return place(x, where, [Shard(0)])

    ps = {n: put(torch.zeros_like(x)) for n, x in values(0).items()}
    saved = {"params": ps, "state": fo.state_dict(tx.init(ps))}
    dcp.load(saved, checkpoint_id=folder)
    ps, _ = step(saved["params"], fo.load_state_dict(tx.init(ps), saved["state"]), 2, put)
    return max(
        float((tree.whole(ps[n]) - x).abs().max())
        for n, x in expected[0].items()
        if x.numel()
    )


def bytes_of_state(rank: int) -> int:
    """Of AdamW's state on this rank, in a model of 1,024 x 1,024 weights."""
    net = nn.Linear(1024, 1024, bias=False)
    if dist.get_world_size() > 1:
        fully_shard(net, mesh=mesh())
    opt = fo.optim.AdamW(net.parameters())
    net(torch.ones(2, 1024)).sum().backward()
    opt.step()
    return sum(
        tree.part_of(x).nbytes for entry in opt.state.values() for x in entry.values()
    )


# ---- DDP, ZeRO, optimizer in backward ------------------------------------------------------------


def in_backward(rank: int, name: str) -> dict[str, Any]:
    """Steps inside of backward under FSDP2, beside steps after it; and how many gradients there are
    at a time.
    """
    nets = [shard(make_net()) for _ in range(2)]
    of_both = [OURS[name](dict(net.named_parameters())) for net in nets]
    for opt in of_both[1]:
        fo.optim.step_in_backward(opt)
    there: list[int] = []

    def count(_: Tensor) -> None:
        there.append(sum(p.grad is not None for p in nets[1].parameters()))

    for p in nets[1].parameters():
        p.register_post_accumulate_grad_hook(count)
    for net, opts in zip(nets, of_both, strict=True):
        train(net, opts, range(STEPS), my_rows(rank))
    a, b = map(gathered, nets)
    start = gathered(make_net())
    return {
        "error": max(float((a[n] - b[n]).abs().max()) for n in a),
        "moved": min(float((a[n] - start[n]).abs().max()) for n in a),
        "hooks": len(there) / len(a),
        "gradients": max(there),
    }


def ddp(rank: int, name: str, zero: bool) -> dict[str, Any]:
    alone = make_net()
    train(alone, REFERENCES[name](dict(alone.named_parameters())), range(STEPS))
    net = make_net()
    wrapped = DistributedDataParallel(net)
    if zero:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt: Any = ZeroRedundancyOptimizer(
                net.parameters(),
                optimizer_class=fo.optim.AdamW,
                lr=0.05,
                weight_decay=0.1,
            )
        opts = [opt]
    else:
        opts = OURS[name](dict(net.named_parameters()))
    train(wrapped, opts, range(STEPS), my_rows(rank))
    a, b = gathered(net), gathered(alone)
    return {
        "error": max(float((a[n] - b[n]).abs().max()) for n in a),
        "parameters with state": sum(
            len(o.optim.state) if zero else len(o.state) for o in opts
        ),
        "parameters": len(a),
    }


def zero_checkpoint(rank: int) -> bool:
    """Consolidate on rank 0, give that to everybody, load it into a new optimizer, and go on
    alike.
    """

    def make(net: nn.Module) -> ZeroRedundancyOptimizer:
        return ZeroRedundancyOptimizer(
            net.parameters(), optimizer_class=fo.optim.AdamW, lr=0.05
        )

    net = make_net()
    wrapped, opt = DistributedDataParallel(net), make(net)
    train(wrapped, [opt], range(3), my_rows(rank))
    opt.consolidate_state_dict(to=0)
    saved = [
        copy.deepcopy(opt.state_dict()) if rank == 0 else None
    ]  # as from a file: ZeRO keeps the tensors that it is given
    dist.broadcast_object_list(saved, src=0)
    net_2 = copy.deepcopy(net)
    opt_2 = make(net_2)
    opt_2.load_state_dict(saved[0])
    train(wrapped, [opt], range(3, 6), my_rows(rank))
    train(DistributedDataParallel(net_2), [opt_2], range(3, 6), my_rows(rank))
    a, b = gathered(net), gathered(net_2)
    assert not torch.equal(a["up.weight"], gathered(make_net())["up.weight"])
    return all(torch.equal(a[n], b[n]) for n in a)
