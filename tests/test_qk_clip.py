"""QK-Clip, beside a loop over the heads; and its hook in an ordinary loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from parity_page import assert_near, compares
from test_authors import STEPS, plain_adam
from torch import Tensor, nn

import functorch_opt as fo

SHAPES = {
    "h.0.q": (4, 3),
    "h.0.k": (4, 3),
    "h.1.q": (6, 2),
    "h.1.k": (4, 2),
    "h.1.q_bias": (6,),
    "up": (2, 3),
}
POWERS = {"*.q": 0.5, "*.k": 0.5, "*.q_bias": 0.5}


def draw(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


def logits_at(t: int) -> dict[str, Tensor]:
    """Some are above 100, and some below."""
    generator = torch.Generator().manual_seed(1000 + t)
    return {
        name: 100 * 2 ** torch.randn(2, generator=generator, dtype=torch.float64)
        for name in ("h.0", "h.1")
    }


def plain_clip(
    name: str, p: Tensor, t: int, powers: dict[str, float], threshold: float
) -> Tensor:
    layer, _, last = name.rpartition(".")
    power = powers.get(f"*.{last}")
    if power is None:
        return p
    p, rows = p.clone(), len(p) // 2
    for head, largest in enumerate(logits_at(t)[layer].tolist()):
        gamma = threshold / max(largest, threshold)
        p[head * rows : (head + 1) * rows] *= gamma**power
    return p


@compares("qk_clip", reference="plain: the paper")
@pytest.mark.parametrize(
    ("powers", "threshold"),
    [(POWERS, 100.0), (POWERS, 30.0), ({"*.q": 1.0}, 100.0), ({"*.k": 0.3}, 150.0)],
)
def test_qk_clip_is_that_of_the_paper(powers: dict, threshold: float) -> None:
    tx = fo.chain(fo.adam(0.05, 0.9, 0.99, 1e-3), fo.qk_clip(powers, threshold))
    ours = theirs = draw(0)
    state = tx.init(ours)
    adams = {name: plain_adam(0.9, 0.99, 1e-3) for name in theirs}
    for t in range(1, STEPS + 1):
        gs = draw(t)
        updates, state = tx.update(gs, state, ours, max_logits=logits_at(t))
        ours = fo.apply_updates(ours, updates)
        for name, p in theirs.items():
            stepped = p - 0.05 * adams[name](t, gs[name])
            theirs = {**theirs, name: plain_clip(name, stepped, t, powers, threshold)}
    for name, p in theirs.items():
        assert_near(ours[name], p, 1e-10, name)


def test_compiled_steps_clip_too() -> None:
    tx = fo.chain(fo.adam(0.05), fo.qk_clip(POWERS))
    step, params, mine = fo.compiled_step(tx, donate=False), draw(0), draw(0)
    state, ours = tx.init(params), tx.init(mine)
    for t in range(1, 4):
        updates, state = tx.update(draw(t), state, params, max_logits=logits_at(t))
        params = fo.apply_updates(params, updates)
        mine, ours = step(mine, draw(t), ours, max_logits=logits_at(t))
    for name, p in params.items():
        torch.testing.assert_close(mine[name], p, rtol=1e-12, atol=1e-12)


class Attention(nn.Module):
    """Two heads, which remember their largest logits."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (nn.Linear(3, 4, bias=False) for _ in range(2))
        self.largest = torch.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (f(x).unflatten(-1, (2, 2)).transpose(0, 1) for f in (self.q, self.k))
        logits = q @ k.mT
        self.largest = logits.detach().abs().amax((1, 2))
        return logits


@pytest.mark.parametrize(
    "make",
    [torch.optim.SGD, fo.optim.SGD, fo.optim.AdamW],
    ids=lambda make: make.__module__,
)
def test_the_hook_bounds_the_logits_of_the_next_pass(make: Callable) -> None:
    """With powers that add up to 1, logits are multiplied by gamma."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": Attention()})
    x = 50 * torch.randn(5, 3)
    opt = make(model.parameters(), lr=0.0)
    hook = fo.optim.qk_clip_hook(
        model,
        lambda: {"attn": model["attn"].largest},
        {"*.q.weight": 0.5, "*.k.weight": 0.5},
        threshold=20.0,
    )
    opt.register_step_post_hook(hook)
    model["attn"](x).sum().backward()
    before = model["attn"].largest
    assert (before > 20).all()
    opt.step()
    model["attn"](x)
    torch.testing.assert_close(model["attn"].largest, torch.full((2,), 20.0))


def test_logits_that_are_not_finite_do_nothing() -> None:
    tx, params = fo.qk_clip({"*.q": 1.0}), {"a.q": torch.ones(3, 2)}
    logits = torch.tensor([float("nan"), float("inf"), 200.0])
    updates, _ = tx.update(
        {"a.q": torch.zeros(3, 2)}, tx.init(params), params, max_logits={"a": logits}
    )
    assert torch.equal(updates["a.q"][:, 0], torch.tensor([0.0, 0.0, -0.5]))


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match=r"'q_proj' must have one \*"):
        fo.qk_clip({"q_proj": 0.5})
    tx, params = fo.qk_clip({"*.q": 1.0}), {"a.q": torch.ones(3, 2)}
    state = tx.init(params)
    with pytest.raises(
        ValueError, match=r"max_logits has nothing for 'a', to which 'a.q'"
    ):
        tx.update(params, state, params, max_logits={"b": torch.ones(3)})
    with pytest.raises(
        ValueError, match=r"the 3 rows of 'a.q' cannot be those of 2 heads"
    ):
        tx.update(params, state, params, max_logits={"a": torch.ones(2)})
    with pytest.raises(ValueError, match=r"no parameter fits \['\*.q_proj'\]"):
        fo.optim.qk_clip_hook(nn.Linear(1, 1), dict, {"*.q_proj": 1.0})
