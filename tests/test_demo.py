"""What the demo claims, on a small scale.

A run of the race is the run alone, functional equals stateful, and vmapped equals trained separately.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

for extra in ("rich", "matplotlib", "sklearn"):
    pytest.importorskip(extra)

from demo import __main__, digits, race, sweep  # noqa: E402


@pytest.fixture(scope="module")
def data() -> digits.Data:
    return digits.load()


def in_float64(data: digits.Data) -> digits.Data:
    return digits.Data(
        data.x_train.double(), data.y_train, data.x_test.double(), data.y_test
    )


# ---- 1. the race ---------------------------------------------------------------------------------


def test_an_optimizer_of_the_race_is_what_it_is_alone() -> None:
    """The curve at the best learning rate is that of plain loops from the same seeds."""
    steps = 5
    line = race.enter("Adam", steps)
    x, y = (part[race.VALIDATION :] for part in digits.load()[:2])
    curves = []
    for seed in range(race.SEEDS):
        torch.manual_seed(seed)
        net, losses = race.make_model(), []
        order = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(x), generator=order).split(digits.BATCH)[:steps]
        opt = torch.optim.Adam(net.parameters(), lr=line.rate)
        for batch in rows:
            opt.zero_grad()
            loss = torch.nn.functional.cross_entropy(net(x[batch]), y[batch])
            loss.backward()
            opt.step()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    torch.testing.assert_close(line.curve, torch.stack(curves).mean(0))
    assert line.held_out.shape == (race.SEEDS,)
    assert line.by_rate.argmin() == (line.rate == race.RATES).nonzero().item()


def test_the_standings_are_in_the_order_of_the_held_out_loss() -> None:
    def made(name: str, loss: float) -> race.Line:
        losses = torch.tensor([loss, loss])
        return race.Line(name, 0.1, losses, losses, losses, 1.0)

    grid = race.standings([made("worse", 2.0), made("better", 1.0)])
    assert [*grid.columns[0].cells] == ["better", "worse"]
    bars = [len(cell) for cell in grid.columns[3].cells]
    assert bars == [race.WIDTH // 2, race.WIDTH]


# ---- 2. digits -----------------------------------------------------------------------------------


def test_minibatches_are_seeded_and_see_every_image_once_an_epoch(
    data: digits.Data,
) -> None:
    numbered = data._replace(x_train=torch.arange(len(data.x_train)))
    first, again = (
        digits.minibatches(numbered, epochs=2),
        digits.minibatches(numbered, epochs=2),
    )
    assert all(
        torch.equal(x, x_again) for (x, _), (x_again, _) in zip(first, again, strict=True)
    )
    epoch = torch.cat([x for x, _ in first[: len(first) // 2]])
    assert len(epoch.unique()) == len(epoch) == 1437 // digits.BATCH * digits.BATCH


def train_digits(data: digits.Data, eta: float) -> dict[str, digits.Record]:
    steps = 12
    batches = digits.minibatches(data, epochs=1)[:steps]
    torch.manual_seed(0)
    models = [digits.ConvNet().to(data.x_train.dtype)]
    models += [copy.deepcopy(models[0]) for _ in range(2)]
    tx = digits.make_chain(steps, eta)
    return {
        "functional": digits.record(
            digits.functional(models[0], tx, batches), models[0], data
        ),
        "stateful": digits.record(
            digits.stateful(models[1], tx, batches), models[1], data
        ),
        "torch": digits.record(
            digits.torch_adamw(models[2], steps, batches), models[2], data
        ),
    }


def test_functional_equals_stateful(data: digits.Data) -> None:
    runs = train_digits(data, eta=1e-6)
    assert runs["functional"].losses[-1] < runs["functional"].losses[0]
    torch.testing.assert_close(runs["stateful"].trajectory, runs["functional"].trajectory)
    assert (
        digits.largest_difference(runs["functional"], runs["torch"]) > 1e-3
    )  # the noise is there


def test_without_noise_the_chain_is_torch_adamw(data: digits.Data) -> None:
    runs = train_digits(in_float64(data), eta=0.0)
    # clip_grad_norm_ adds 1e-6 to the norm, hence not to the last bit
    torch.testing.assert_close(
        runs["functional"].trajectory, runs["torch"].trajectory, rtol=1e-5, atol=1e-7
    )


# ---- 3. learning rates ---------------------------------------------------------------------------


def test_a_sweep_equals_training_one_after_another(data: digits.Data) -> None:
    data = in_float64(data)  # so that nothing hides behind rounding
    lrs = torch.tensor([1e-4, 1e-2, 1.0], dtype=torch.float64)
    result = sweep.sweep((data.x_train, data.y_train), lrs, epochs=1)
    for i, lr in enumerate(lrs.tolist()):
        net, losses = sweep.train_alone(lr, digits.minibatches(data, epochs=1))
        seen = ~result.curves[i].isnan()  # a diverged run ends early
        torch.testing.assert_close(
            result.curves[i][seen], losses[seen], rtol=1e-9, atol=1e-12
        )
        if not result.diverged[i]:
            torch.testing.assert_close(
                result.params_of(i),
                {k: p.detach() for k, p in net.named_parameters()},
                rtol=1e-8,
                atol=1e-10,
            )
    assert not result.diverged[:2].any()


# ---- the whole -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_sections_draw_their_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(race, "STEPS", 8)
    monkeypatch.setattr(digits, "EPOCHS", 1)
    monkeypatch.setattr(sweep, "EPOCHS", 1)
    monkeypatch.setattr(sweep, "MODELS", 6)
    for section in (race, digits, sweep):
        picture = section.run(tmp_path)
        assert picture.stat().st_size > 10_000
    assert "times as long" in capsys.readouterr().out


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["demo"])
    monkeypatch.setattr(
        __main__, "find_spec", lambda package: None if package == "rich" else object()
    )
    with pytest.raises(SystemExit, match=r"needs rich.*pip install .* --group demo"):
        __main__.main()
