"""The gradient noise scale, beside covariances that are written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import functorch_opt as fo


def draw(n: int, seed: int = 0, dtype=torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> Tensor:
        return (1 + torch.randn(n, *shape, generator=generator, dtype=torch.float64)).to(
            dtype
        )

    return {"w": tensor(3, 2), "b": tensor(2), "c": tensor()}


def flat(grads: dict[str, Tensor]) -> Tensor:
    """[B, elements]."""
    return torch.cat(
        [x.flatten(1) if x.dim() > 1 else x[:, None] for x in grads.values()], 1
    )


@pytest.mark.parametrize("n", [2, 5, 32])
def test_it_is_the_trace_of_the_covariance(n: int) -> None:
    grads = draw(n)
    found, rows = fo.gradient_noise_scale(grads), flat(grads)
    trace = torch.cov(rows.T).diagonal().sum()
    mean = rows.mean(0)
    torch.testing.assert_close(found.noise, trace, rtol=1e-12, atol=0)
    signal = mean @ mean - trace / n
    torch.testing.assert_close(found.signal, signal, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.scale, trace / signal, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("b", "B"), [(1, 8), (2, 8), (4, 32)])
def test_two_batch_sizes(b: int, B: int) -> None:
    """With b = 1 it is that of single examples; and app. A.1, in its own letters."""
    rows = flat(draw(B))
    means = rows.view(B // b, b, -1).mean(1)
    small = means.square().sum(1).mean()
    big = rows.mean(0).square().sum()
    found = fo.noise_scale_of_norms(small, big, b, B)
    g2 = 1 / (B - b) * (B * big - b * small)
    s = 1 / (1 / b - 1 / B) * (small - big)
    torch.testing.assert_close(found.signal, g2)
    torch.testing.assert_close(found.noise, s)
    if b == 1:
        torch.testing.assert_close(found.noise, fo.gradient_noise_scale(draw(B)).noise)
        torch.testing.assert_close(found.signal, fo.gradient_noise_scale(draw(B)).signal)


def test_the_estimates_are_without_bias() -> None:
    """Of a gradient (3, 4) with noise of variance 4 in each of two elements."""
    generator = torch.Generator().manual_seed(0)
    noise = 2 * torch.randn(4000, 6, 2, generator=generator, dtype=torch.float64)
    found = torch.vmap(fo.gradient_noise_scale)(torch.tensor([3.0, 4.0]) + noise)
    assert found.noise.shape == (4000,)
    assert found.noise.mean().item() == pytest.approx(8.0, rel=0.02)
    assert found.signal.mean().item() == pytest.approx(25.0, rel=0.02)


def test_each_model_has_its_own() -> None:
    many = [draw(6, seed) for seed in range(3)]
    stacked = {name: torch.stack([of[name] for of in many]) for name in many[0]}
    found = torch.vmap(fo.gradient_noise_scale)(stacked)
    for i, of in enumerate(many):
        torch.testing.assert_close(found.scale[i], fo.gradient_noise_scale(of).scale)


def test_other_dtypes() -> None:
    wide = fo.gradient_noise_scale(draw(16))
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        narrow = fo.gradient_noise_scale(draw(16, dtype=dtype))
        assert narrow.noise.dtype == torch.float64
        assert narrow.noise.item() == pytest.approx(wide.noise.item(), rel=near)
    z = torch.complex(draw(8)["w"], draw(8, 1)["w"])
    pairs = torch.view_as_real(z)
    torch.testing.assert_close(
        fo.gradient_noise_scale([z]), fo.gradient_noise_scale([pairs])
    )


def test_of_a_model_and_in_a_report() -> None:
    """Per-example gradients of a regression; the report has the scale of all and of each layer."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(20, generator=generator, dtype=torch.float64)
    params = {"b": torch.ones((), dtype=torch.float64), "w": x.new_ones(3)}

    def loss(params, x, y):
        return ((x @ params["w"] + params["b"] - y) ** 2).mean()

    each = fo.per_example_grads(loss)(params, x, y)
    residual = 2 * (x @ params["w"] + params["b"] - y)
    by_hand = residual[:, None] * torch.cat([torch.ones_like(x[:, :1]), x], 1)
    trace = torch.cov(by_hand.T).diagonal().sum()
    mean = by_hand.mean(0)
    tx, state = fo.adam(0.1), fo.adam(0.1).init(params)
    grads = torch.func.grad(loss)(params, x, y)
    found = fo.report(tx, grads, state, params, per_example=each)
    torch.testing.assert_close(found["noise"], trace)
    torch.testing.assert_close(found["signal"], mean @ mean - trace / 20)
    torch.testing.assert_close(found["noise_scale"], found["noise"] / found["signal"])
    of_w = fo.gradient_noise_scale(each["w"]).scale
    assert found["noise_scale/w"] == of_w and "noise_scale/b" in found
    assert "noise_scale" not in fo.report(tx, grads, state, params)

    ps = {name: nn.Parameter(p.clone()) for name, p in params.items()}
    optimizer = fo.optim.Adam([*ps.items()], lr=0.1)
    for name, p in ps.items():
        p.grad = grads[name]
    assert optimizer.report(per_example=each)["noise_scale"] == found["noise_scale"]
    assert "noise_scale" not in optimizer.report()


@pytest.mark.parametrize(
    "grads",
    [
        {},
        {"w": torch.ones(1, 2)},
        {"w": torch.ones(3), "b": torch.ones(2)},
        torch.ones(()),
    ],
)
def test_what_has_no_noise(grads) -> None:
    with pytest.raises(
        ValueError, match=r"tensors \[B, ...\] of the same B, 2 or greater"
    ):
        fo.gradient_noise_scale(grads)


@pytest.mark.parametrize(("b", "B"), [(4, 4), (8, 4), (0, 4)])
def test_batch_sizes_that_say_nothing(b: int, B: int) -> None:
    with pytest.raises(ValueError, match="b must be between 0 and B"):
        fo.noise_scale_of_norms(1.0, 1.0, b, B)
