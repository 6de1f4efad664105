"""The race keeps its protocol. No result is tested, only that it is what the page says it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

for extra in ("rich", "matplotlib", "sklearn"):
    pytest.importorskip(extra)

import functorch_opt as fo  # noqa: E402
from benchmarks import __main__  # noqa: E402
from benchmarks import race as command  # noqa: E402
from benchmarks.race import check, entries, judge, page, pair, pictures, runner  # noqa: E402
from benchmarks.race.tasks import TASKS  # noqa: E402

TINY = pair.Budget((1e-3, 1e-1), 1, 2, timed_steps=1, most_steps=4)


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(command, "QUICK", TINY)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def raced(folder: Path, *more: str, processes: int = 1) -> dict[str, Any]:
    """A race of SGD and AdamW on the regression."""
    chosen = ["--rows", "regression", "--optimizers", "sgd"]
    few = ["--quick", "--processes", str(processes), "--out", str(folder)]
    return __main__.main(["race", *chosen, *few, *more])


# ---- who takes part ------------------------------------------------------------------------------


def test_every_optimizer_takes_part_or_has_a_reason() -> None:
    known = {*entries.competitors(), *entries.LEFT_OUT}
    assert entries.everything() == known
    assert {"adamw", "muon", "soap", "prodigy", "schedule_free_adamw"} <= known
    assert len(entries.competitors()) > 60


def test_what_is_tried_beside_the_learning_rate_has_two_values_each() -> None:
    for name, other in entries.OTHER.items():
        assert name in entries.competitors()
        assert [len(values) for values in other.values()] == [2]


def test_a_class_of_a_ready_made_optimizer_is_in_the_race() -> None:
    names = {factory.__name__ for factory in fo.optim.ready.ready_made()}
    assert names <= entries.competitors().keys()


OWN = """
import functorch_opt as fo

def own(learning_rate):
    return fo.chain(fo.clip_by_global_norm(1.0), fo.sgd(learning_rate))

def failing(learning_rate):
    def update(updates, state, params=None):
        raise RuntimeError("broken on purpose")

    return fo.GradientTransformation(lambda params: (), update)

def no_optimizer(learning_rate):
    return learning_rate
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "own_optimizers.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_optimizers"
    sys.modules.pop("own_optimizers", None)


def test_an_optimizer_of_ones_own_enters_by_one_argument(
    own_module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = ["--add", f"{own_module}:own", "--optimizers", "own"]
    result = raced(tmp_path / "race", *added)
    assert [line["optimizer"] for line in result["results"]] == ["adamw", "own"]
    monkeypatch.setattr(entries, "ADDED", [f"{own_module}:own"])
    assert "own" in entries.competitors()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("own_optimizers:missing", "no attribute 'missing'.*Give module:function"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("own_optimizers:no_optimizer", "is no transformation"),
        ("functorch_opt:adam", "there is an optimizer called adam already"),
    ],
)
def test_what_cannot_enter_is_told_why(own_module: str, what: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        entries.competitors([what])


# ---- running -------------------------------------------------------------------------------------


def test_a_pair_is_the_best_setting_trained_with_other_seeds(tmp_path: Path) -> None:
    """By hand: choose by the second part of the data, report the third."""
    task, entry = TASKS["regression"](), entries.competitors()["sgd"]
    found = pair.race(task, entry, TINY)
    assert len(found["settings"]) == len(found["validation"]) == 2 * 2
    best = found["settings"][found["validation"].index(min(found["validation"]))]
    assert found["best"] == best
    losses = []
    for seed in (100, 101):
        torch.manual_seed(seed)
        model, order = task.model(), torch.Generator().manual_seed(seed)
        tx = fo.sgd(**best)
        opt = fo.optim.Optimizer(model.parameters(), tx)
        x, y = task.train
        batches = [
            b for _ in range(2) for b in torch.randperm(369, generator=order).split(123)
        ]
        for rows in batches[:4]:
            opt.zero_grad()
            task.loss(model(x[rows]), y[rows]).backward()
            opt.step()
        with torch.no_grad():
            losses.append(float(task.loss(model(task.test[0]), task.test[1])))
    assert found["held_out"] == pytest.approx(losses, rel=1e-4)
    assert len(found["curve"]) == 4


def test_memory_is_that_of_the_slots() -> None:
    model = torch.nn.Linear(3, 2)
    assert pair.state_bytes(model, fo.adam(0.1)) == 8
    assert pair.state_bytes(model, fo.sgd(0.1)) == 0


def test_an_interrupted_race_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[runner.Pair] = []

    def counted(of: runner.Pair, *rest: Any) -> dict[str, Any]:
        calls.append(of)
        return run_one(of, *rest)

    run_one = runner.run_one
    monkeypatch.setattr(runner, "run_one", counted)
    first = raced(tmp_path)
    assert calls == [runner.Pair("regression", name) for name in ("adamw", "sgd")]
    (tmp_path / "pairs" / "regression.sgd.json").unlink()
    (tmp_path / "pairs" / "regression.adamw.part").write_text("{")  # half written
    calls.clear()
    again = raced(tmp_path)
    assert calls == [runner.Pair("regression", "sgd")]
    untimed = ("seconds_to_target", "step_seconds")
    for a, b in zip(first["results"], again["results"], strict=True):
        assert {k: v for k, v in a.items() if k not in untimed} == {
            k: v for k, v in b.items() if k not in untimed
        }
    calls.clear()
    monkeypatch.setattr(command, "QUICK", TINY.__class__((1e-2,), 1, 2, 1, 4))
    raced(tmp_path)
    assert len(calls) == 2  # another budget
    calls.clear()
    monkeypatch.setitem(entries.OTHER, "sgd", {"momentum": (0.5, 0.8)})
    raced(tmp_path)
    assert calls == [runner.Pair("regression", "sgd")]  # other values to try


def test_a_failing_pair_is_reported_and_the_others_go_on(
    own_module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    added = ["--add", f"{own_module}:failing", "--optimizers", "failing", "sgd"]
    result = raced(tmp_path / "race", *added)
    assert [line["optimizer"] for line in result["results"]] == ["adamw", "sgd"]
    (failed,) = result["failed"]
    assert failed["optimizer"] == "failing"
    assert "broken on purpose" in failed["error"]
    assert "FAILED failing on regression" in capsys.readouterr().out
    assert "broken on purpose" in __main__.wrong(result)[0]
    pair_of = runner.Pair("regression", "failing")
    under = runner.conditions(pair_of, TINY)
    assert (
        runner.read(pair_of.file(tmp_path / "race"), under) is None
    )  # it is tried again


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    one, two = raced(tmp_path / "1"), raced(tmp_path / "2", processes=2)
    for a, b in zip(one["results"], two["results"], strict=True):
        assert a["held_out"] == b["held_out"]
        assert a["learning_rate"] == b["learning_rate"]


def test_no_optimizer_is_forgotten_by_a_wrong_name(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no optimizer nadma"):
        raced(tmp_path, "--optimizers", "nadma")


# ---- verdicts ------------------------------------------------------------------------------------


def line(name: str, losses: list[float], task: str = "t") -> dict[str, Any]:
    mean, sd = judge.moments(losses)
    about = {"task": task, "optimizer": name, "held_out": losses, "seeds": len(losses)}
    return about | {"held_out_mean": mean, "held_out_sd": sd}


def test_a_win_is_beyond_two_standard_errors() -> None:
    """Sd sqrt(2) with two seeds: the error of a difference is sqrt(2), so 2.83 is the limit."""
    one = line("one", [0.0, 2.0])
    assert one["held_out_sd"] == pytest.approx(2**0.5)
    near, far = line("near", [1.9, 3.9]), line("far", [3.0, 5.0])
    assert not judge.differ(one, near)
    assert judge.differ(one, far)
    assert judge.leaders([far, one]) == ["one"]
    assert judge.leaders([far, near, one]) == ["one", "near"]


def test_a_large_spread_does_not_make_an_optimizer_good() -> None:
    good, wild = line("good", [1.0, 1.1, 1.2]), line("wild", [2.0, 3.0, 1e6])
    assert judge.leaders([wild, good]) == ["good"]


def test_a_diverged_seed_has_no_place() -> None:
    lost, fine = line("lost", [0.1, None]), line("fine", [1.0, 1.0])
    assert lost["held_out_mean"] is None
    assert judge.leaders([lost, fine]) == ["fine"]
    first, last = judge.overall([lost, fine], {"t": {}})
    assert (first["optimizer"], first["places"]["t"], first["among_the_best"]) == (
        "fine",
        1,
        1,
    )
    assert (last["optimizer"], last["places"]["t"], last["among_the_best"]) == (
        "lost",
        2,
        0,
    )


def test_the_target_is_the_loss_at_half_of_the_steps() -> None:
    assert judge.target_of([4.0, 3.0, 2.0, 1.0]) == 3.0
    assert judge.steps_to([4.0, 3.0, 2.0, 1.0], 3.0) == 2
    assert judge.steps_to([4.0, None, 3.5], 3.0) is None
    assert judge.steps_to([4.0], None) is None


def test_curves_are_means_over_seeds_and_the_last_steps() -> None:
    curves = torch.stack([torch.arange(40.0), torch.arange(40.0) + 2])
    smooth = pair.smoothed(curves)  # a window of two
    torch.testing.assert_close(smooth[:3], torch.tensor([1.0, 1.5, 2.5]))
    thin = judge.thinned([float(i) for i in range(120)])
    assert len(thin) <= judge.POINTS and thin[-1] == [120, 119.0]


def found(losses: list[float | None], momentum: float = 0.0) -> dict[str, Any]:
    """Five learning rates, and beside them those of another momentum, which are all perfect."""
    rates = [1e-3, 1e-2, 1e-1, 1.0, 10.0]
    settings = [{"learning_rate": rate, "momentum": momentum} for rate in rates]
    others = [{"learning_rate": rate, "momentum": 0.5} for rate in rates]
    at = min(range(5), key=lambda i: losses[i] or 99)
    return {
        "settings": settings + others,
        "validation": [*losses, *[0.0] * 5],
        "start": 2.0,
        "best": settings[at],
    }


def test_good_learning_rates_lose_a_tenth_of_the_progress_and_have_no_gap() -> None:
    """The progress is 1, from 2 to 1, so 1.1 is the limit."""
    assert judge.good_range(found([1.05, 1.2, 1.0, 1.1, None])) == [1e-1, 1.0]
    assert judge.good_range(found([1.05, 1.1, 1.0, 1.3, 1.0])) == [1e-3, 1e-1]
    assert judge.good_range(found([2.0, 2.0, 1.0, None, None])) == [1e-1, 1e-1]


def test_an_optimizer_that_never_ends_is_listed(tmp_path: Path) -> None:
    lost = {"best": None, "settings": [], "validation": []}
    row = judge.result("t", "lost", lost, 1.0)
    assert row["held_out_mean"] is None and row["learning_rate"] is None


# ---- check, page, pictures -----------------------------------------------------------------------


def test_runs_of_the_race_are_those_of_torch_alone() -> None:
    for name, apart in check.differences(steps=4).items():
        assert apart <= check.tolerance(name), name


def test_the_check_sees_another_rule(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = {"adam": (fo.adamax, torch.optim.Adam), "sgd": (fo.sgd, torch.optim.SGD)}
    monkeypatch.setattr(check, "SAME", pairs)
    monkeypatch.setattr(check, "STEPS", 3)
    assert check.run()["wrong"] == ["adam"]
    assert "DIFFERENT" in capsys.readouterr().out


def test_the_page_has_the_results_of_the_json() -> None:
    result = json.loads((page.DOCS / "race.json").read_text())
    text = (page.DOCS / "race.md").read_text()
    assert page.updated(text, result) == text
    assert (page.DOCS / "race.json").stat().st_size < 350_000
    assert page.compact(result)["results"] == result["results"]


def test_the_page_names_all_that_is_fixed() -> None:
    text = (page.DOCS / "race.md").read_text()
    for name in (*entries.LEFT_OUT, *entries.OTHER):
        assert f"`{name}`" in text, name
    for of in TASKS.values():
        assert f"| {of().title} |" in text
    assert "13 learning rates" in text and len(pair.FULL.rates) == 13
    assert "eight other seeds, 100 to 107" in text and pair.FULL.reported_seeds == 8


def test_a_page_is_written_from_a_race(tmp_path: Path) -> None:
    result = raced(tmp_path / "race")
    (tmp_path / "pictures").mkdir()
    text = f"# The race\n\n{page.BEGIN}\nstale figures\n{page.END}\n\nend\n"
    (tmp_path / "race.md").write_text(text)
    page.write(result, tmp_path)
    new = (tmp_path / "race.md").read_text()
    assert "stale figures" not in new and new.endswith("end\n")
    assert "| adamw" in new and "no results" in new
    copy = json.loads((tmp_path / "race.json").read_text())
    assert page.updated(new, copy) == new
    assert str(tmp_path) not in json.dumps(copy)
    for name in pictures.PICTURES:
        assert (tmp_path / "pictures" / f"{name}.png").stat().st_size > 5_000
