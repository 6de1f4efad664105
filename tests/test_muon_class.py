"""`fo.optim.Muon` with what torch's has not: dims, names of coefficients, a dtype of the iteration.

The reference is torch.optim.Muon, with each matrix as a parameter of its own.
"""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import functorch_opt as fo

STEPS = 5
HYPER = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
DIMS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "convolution": (fo.MatrixDims(), (6, 3, 2, 2)),
    "experts": (fo.MatrixDims(rows=-2, columns=-1), (3, 6, 5)),
    "heads": (fo.MatrixDims(split=2), (12, 5)),
    "query, key, value": (fo.MatrixDims(split=(8, 3, 3)), (14, 5)),
    "turned": (fo.MatrixDims(rows=1, columns=0), (4, 7)),
}


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrices(kind: str, x: Tensor) -> list[Tensor]:
    """The matrices of a tensor, written out for each kind."""
    if kind == "convolution":
        return [x.flatten(1)]
    if kind == "experts":
        return [*x]
    if kind == "turned":
        return [x.T]
    return [*x.split([6, 6] if kind == "heads" else [8, 3, 3])]


def run(opt: torch.optim.Optimizer, ps: list, grads: list[list[Tensor]]) -> None:
    for gs in grads:
        for p, g in zip(ps, gs, strict=True):
            p.grad = g.clone()
        opt.step()


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("kind", DIMS)
def test_every_matrix_is_as_if_it_were_alone(kind: str, scale: str) -> None:
    dims, shape = DIMS[kind]
    p = nn.Parameter(draw(shape, 0))
    parts = [nn.Parameter(x.clone()) for x in matrices(kind, p.detach())]
    grads = [draw(shape, 1 + i) for i in range(STEPS)]
    start = p.detach().clone()
    given = {**HYPER, "adjust_lr_fn": scale}
    run(fo.optim.Muon([p], dims=dims, **given), [p], [[g] for g in grads])
    run(torch.optim.Muon(parts, **given), parts, [matrices(kind, g) for g in grads])
    moved = (p.detach() - start).abs().max()
    for ours, theirs in zip(matrices(kind, p.detach()), parts, strict=True):
        # Newton-Schulz in bfloat16, of a batch and of one matrix.
        torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=0.02 * moved)


@pytest.mark.parametrize("compile", [False, True])
def test_a_group_has_its_own_dims_and_coefficients(compile: bool) -> None:
    """Equal to the functional rule with the same options."""
    shapes = [(6, 5), (6, 3, 2, 2)]
    params = [nn.Parameter(draw(shape, i)) for i, shape in enumerate(shapes)]
    second = {"dims": fo.MatrixDims(), "ns_coefficients": "polar_express"}
    groups = [{"params": params[:1]}, {"params": params[1:], **second}]
    given = {**HYPER, "ns_dtype": torch.float32}
    grads = [
        [draw(shape, 9 * i + j) for j, shape in enumerate(shapes)] for i in range(STEPS)
    ]
    run(fo.optim.Muon(groups, compile=compile, **given), params, grads)
    jordan = (3.4445, -4.775, 2.0315)
    for i, (coefficients, shape) in enumerate(
        zip((jordan, "polar_express"), shapes, strict=True)
    ):
        how = {"variant": "torch", "ns_dtype": torch.float32}
        rule = fo.scale_by_muon(coefficients, beta=0.9, eps=1e-7, **how)
        decay, rate = fo.add_decayed_weights(0.1), fo.scale_by_learning_rate(0.02)
        tx, q = fo.chain(rule, decay, rate), draw(shape, i)
        state = tx.init(q)
        for gs in grads:
            updates, state = tx.update(gs[i], state, q)
            q = fo.apply_updates(q, updates)
        torch.testing.assert_close(params[i].detach(), q, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_has_dims_as_a_plain_tuple() -> None:
    def made() -> tuple[nn.Parameter, fo.optim.Muon]:
        p = nn.Parameter(draw((12, 5), 0))
        return p, fo.optim.Muon([p], dims=fo.MatrixDims(split=(6, 6)), **HYPER)

    grads = [[draw((12, 5), 1 + i)] for i in range(STEPS)]
    p, opt = made()
    run(opt, [p], grads[:2])
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state["param_groups"][0]["dims"] == (0, None, (6, 6))
    q, again = made()
    with torch.no_grad():
        q.copy_(p)
    again.load_state_dict(state, strict=True)
    run(opt, [p], grads[2:])
    run(again, [q], grads[2:])
    assert torch.equal(p, q)


def test_a_checkpoint_of_torchs_class_is_loaded_as_it_was() -> None:
    """It has no dims: they stay what they are."""
    p, q = [nn.Parameter(draw((12, 5), 0)) for _ in range(2)]
    theirs, ours = torch.optim.Muon([p], **HYPER), fo.optim.Muon([q], **HYPER)
    run(theirs, [p], [[draw((12, 5), 1)]])
    with torch.no_grad():
        q.copy_(p)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["dims"] is None
    run(theirs, [p], [[draw((12, 5), 2)]])
    run(ours, [q], [[draw((12, 5), 2)]])
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "shape", "error", "says"),
    [
        ({}, (3, 3, 3), ValueError, r"only supports 2D .*dims=functorch_opt\.MatrixDims"),
        ({"dims": 5}, (3, 3), TypeError, r"must be a MatrixDims.* got int 5"),
        (
            {"dims": (0, 1)},
            (3, 3),
            TypeError,
            r"must be a MatrixDims.* got tuple \(0, 1\)",
        ),
        ({"dims": fo.MatrixDims()}, (3,), ValueError, "with 1 dims is no matrix"),
        ({"dims": fo.MatrixDims(split=2)}, (3, 3), ValueError, "3 rows cannot be split"),
        ({"ns_coefficients": "none"}, (3, 3), ValueError, "must be one of"),
        ({"ns_coefficients": 5}, (3, 3), ValueError, "three numbers"),
    ],
)
def test_what_cannot_be_is_an_error(
    given: dict, shape: tuple, error: type, says: str
) -> None:
    p = nn.Parameter(torch.zeros(shape))
    with pytest.raises(error, match=says):
        fo.optim.Muon([p], **given)
    opt = fo.optim.Muon([nn.Parameter(torch.zeros(3, 3))])
    with pytest.raises(error, match=says):
        opt.add_param_group({"params": [p], **given})
    assert len(opt.param_groups) == 1
