"""The benchmarks measure what they say. No times are tested.

The shapes are those of the models, the contenders agree, and the results are complete.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

for extra in ("rich", "matplotlib"):
    pytest.importorskip(extra)

import functorch_opt as fo  # noqa: E402
from benchmarks import (  # noqa: E402
    __main__,
    chains,
    compile_time,
    contenders,
    cpu,
    fewer_steps,
    floor,
    gpu,
    many_models,
    memory,
    monitored,
    ordinary,
    per_example,
    report,
    shapes,
    slot_bytes,
    timing,
)
from functorch_opt.codecs.codec import CODECS  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # those of the peers are not ours


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("NPROC", "PJRT_NPROC"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
        monkeypatch.delenv(name)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# ---- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of", "tensors", "total"),
    [
        (shapes.NANOGPT, 76, 12_318_720),
        (
            shapes.GPT2,
            148,
            124_439_808,
        ),  # what transformers' GPT2LMHeadModel has, head tied
        (shapes.RESNET50, 161, 25_557_032),  # torchvision's documentation
        (shapes.VIT_B16, 152, 86_567_656),
        (shapes.SMALL, 150, 75 * 64 * 65),
        (shapes.MANY, 1000, 256_000),
    ],
    ids=["nanogpt", "gpt2", "resnet50", "vit_b16", "small", "many"],
)
def test_shapes_are_those_of_the_models(
    of: shapes.Shapes, tensors: int, total: int
) -> None:
    assert (len(of), shapes.numel(of)) == (tensors, total)


def test_small_sets_have_the_size_asked_for() -> None:
    assert [len(shapes.small(n)) for n in (6, 20, 150, 1000)] == [6, 20, 150, 1000]


# ---- contenders ----------------------------------------------------------------------------------


def after_three_steps(make: type[contenders.Contender]) -> list[torch.Tensor]:
    contender = make(
        contenders.draw(shapes.TINY, 0, scale=0.02), contenders.gradients(shapes.TINY, 1)
    )
    for seed in (1, 2, 3):
        contender.feed(contenders.gradients(shapes.TINY, seed))
        contender.step()
    return contender.read()


EAGER = [
    (
        contenders.Fused,
        (
            contenders.Eager,
            contenders.Foreach,
            contenders.ForLoop,
            contenders.Optax,
            contenders.TorchOpt,
        ),
    ),
    (ordinary.TorchAdamW, (ordinary.DefaultAdamW,)),
    (ordinary.TorchSGD, (ordinary.DefaultSGD,)),
    (chains.EmaTorch, (chains.EmaEager, ordinary.Chain)),
    (chains.ResearchTorch, (chains.ResearchEager,)),
]


@pytest.mark.parametrize(
    ("first", "second"), [(first, second) for first, others in EAGER for second in others]
)
def test_contenders_compute_the_same(
    first: type[contenders.Contender], second: type[contenders.Contender]
) -> None:
    if second is contenders.Optax:
        pytest.importorskip("optax")
    if second is contenders.TorchOpt:
        pytest.importorskip("torchopt")
    assert contenders.same([after_three_steps(first), after_three_steps(second)]) <= 1


def test_same_sees_one_wrong_element() -> None:
    good, bad = (
        [torch.ones(3), torch.ones(2)],
        [torch.ones(3), torch.tensor([1.0, 1.001])],
    )
    assert contenders.same([good, good]) == 0
    assert contenders.same([good, bad]) > 1


def test_a_missing_peer_and_a_failing_contender_have_their_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    class Failing(contenders.Contender):
        name = "functorch_opt failing"

        def step(self) -> None:
            raise RuntimeError("broken")

    monkeypatch.setitem(sys.modules, "torchopt", None)
    row = cpu.Row(
        "row",
        shapes.TINY,
        (contenders.Eager, contenders.TorchOpt, Failing),
        contenders.Eager.name,
        None,
    )
    result = cpu.measure("row", row, rounds=2, seconds=60)
    assert (
        result["results"][contenders.TorchOpt.name]["note"] == "not installed (torchopt)"
    )
    assert "broken" in result["results"][Failing.name]["note"]
    assert __main__.wrong({"rows": [result]}) == [
        "row: functorch_opt failing: failed: RuntimeError: broken"
    ]
    cpu.show(result)
    assert "not installed (torchopt)" in capsys.readouterr().out


# ---- measuring -----------------------------------------------------------------------------------


def test_ratios_are_medians_of_paired_rounds() -> None:
    found = timing.summary(
        {"a": [2.0, 4.0, 9.0], "b": [1.0, 4.0, 3.0], "floor": [1.0, 1.0, 1.0]},
        against="b",
    )
    assert (found["a"]["ratio"], found["b"]["ratio"], found["a"]["over_floor"]) == (
        2.0,
        1.0,
        4.0,
    )


def test_every_contender_has_every_round() -> None:
    seen: list[str] = []
    times = timing.in_turns(
        {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")},
        3,
        "turns",
        turn=0.0,
    )
    assert {name: len(of) for name, of in times.items()} == {"a": 3, "b": 3}


def test_the_floor_leaves_numbers_finite_and_counts_its_bytes() -> None:
    run, size = floor.adamw(100, slots=3, norm=True)
    run()
    assert size == 100 * 4 * (4 + 2 * 3)


def test_allocations_are_exact() -> None:
    def step() -> None:
        a = torch.empty(1000)
        del a
        b = torch.empty(500)
        del b

    assert memory.allocations(step) == (6000, 4000)


def test_tables_without_rich_and_pictures_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(report, "console", None)
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    report.table("Title", ["", "ms"], [["fused", "1.5"]])
    assert (
        report.bars(Path("nowhere.png"), [("row", [("fused", 1.0)], None)], "ms") is None
    )
    assert list(report.track([1, 2], "steps")) == [1, 2]
    out = capsys.readouterr().out
    assert "fused  1.5" in out
    assert "matplotlib is not installed" in out


# ---- the program, in small -----------------------------------------------------------------------


def run(out: Path, command: str, *options: str) -> dict:
    __main__.main([command, "--quick", "--out", str(out), *options])
    file = out / f"{command.replace('-', '_')}.json"
    result = json.loads(file.read_text())
    assert result["versions"]["torch"] == torch.__version__
    assert result["versions"].keys() >= {
        "python",
        "optree",
        "jax",
        "optax",
        "torchopt",
        "heavyball",
    }
    assert (
        result["machine"]["cores"]
        and result["date"]
        and result["command"].startswith("python -m benchmarks")
    )
    assert __main__.wrong(result) == []
    assert f"torch {torch.__version__}" in file.with_suffix(".md").read_text()
    return result


def test_cpu_without_compiling(tmp_path: Path) -> None:
    result = run(
        tmp_path, "cpu", "--rows", "eager", "default-gpt", "sgd-many", "--threads", "1"
    )
    assert result["rows"][0]["results"]["functorch_opt eager"]["ms"] > 0
    assert (tmp_path / "cpu.png").exists()


def test_gpu_without_a_gpu_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="rehearse"):
        __main__.main(["gpu", "--out", str(tmp_path)])


def test_an_error_in_a_check_on_a_device_is_one_of_the_program() -> None:
    """What differs in numbers is shown, for matrix optimizers differ between devices."""
    fails = {"name": "lion", "dtype": "fp32", "error": "RuntimeError: no", "warning": []}
    differs = {"name": "soap", "dtype": "bf16", "eager": 3.0, "warning": []}
    result = {"rows": [], "check": {"found": [fails, differs]}}
    assert __main__.wrong(result) == ["check of lion, fp32: RuntimeError: no"]


def test_an_unknown_row_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        __main__.main(["cpu", "--rows", "nonsense", "--out", str(tmp_path)])
    assert "nonsense" in capsys.readouterr().err


@pytest.mark.slow
def test_cpu(tmp_path: Path) -> None:
    result = run(
        tmp_path,
        "cpu",
        "--rows",
        "small",
        "ema",
        "research",
        "noise",
        "python",
        "--threads",
        "1",
    )
    assert [row["row"] for row in result["rows"]] == ["small", "ema", "research", "noise"]
    for row in result["rows"]:
        assert row["results"][contenders.OURS]["ms"] > 0
        assert row["results"]["floor"]["ms"] > 0
    python = result["python"][0]
    assert 0 < python["kernels_us"] < python["step_us"]
    assert python["profile"]


@pytest.mark.slow
def test_memory(tmp_path: Path) -> None:
    result = run(tmp_path, "memory", "--rows", "adamw")
    assert {row["name"]: row.get("allocated") for row in result["rows"]}[
        "torch foreach"
    ] > 0.5
    assert (tmp_path / "memory.png").exists()


@pytest.mark.slow
def test_random_numbers(tmp_path: Path) -> None:
    result = run(tmp_path, "random", "--rows", "normal")
    assert all(entry["ms"] > 0 for entry in result["rows"][0]["results"].values())
    assert result["rows"][0]["results"]["torch.randn"]["ratio"] == 1
    assert (tmp_path / "random.png").exists()


@pytest.mark.slow
def test_many_models(tmp_path: Path) -> None:
    row = run(tmp_path, "many-models", "--rows", "64")["rows"][0]
    assert row["results"].keys() == {
        many_models.OURS,
        many_models.COMPILED,
        many_models.EAGER,
        many_models.GRADIENTS,
        many_models.LOOP,
        "floor",
    }
    assert all(
        0 < row["results"][name]["difference"] < 1e-5
        for name in (many_models.OURS, many_models.COMPILED, many_models.EAGER)
    )
    assert row["operations"] == 3 * 2 * 64 * (64 * 32 * 2 + 32 * 10 * 3)
    assert (tmp_path / "many_models.png").exists()


@pytest.mark.slow
def test_compile_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(
        Path(compile_time.__file__).parents[1]
    )  # the first steps run in processes of their own
    result = run(tmp_path, "compile-time", "--rows", "ours")
    assert all(
        row[key]["seconds"] > 0 for row in result["rows"] for key in compile_time.TARGET
    )


@pytest.mark.slow
@pytest.mark.parametrize("row", ["resnet50-fp32", "resnet50-bf16", "matrices-fp32"])
def test_rehearsal_of_the_gpu_program(tmp_path: Path, row: str) -> None:
    result = run(tmp_path, "gpu", "--device", "cpu", "--rows", row)["rows"][0]
    assert row in gpu.ROWS
    assert result["results"][contenders.OURS]["difference_over_tolerance"] <= 1
    assert "CUDA" in result["results"][gpu.CompiledGraph.name]["note"]


@pytest.mark.slow
def test_rehearsal_of_its_short_mode(tmp_path: Path) -> None:
    options = ("--device", "cpu", "--short", "--rows", "huge-fp32")
    found = run(tmp_path, "gpu", *options)["rows"][0]["results"]
    assert set(found) == {make.name for make in gpu.SHORTLY}


def test_clipped_gradients_on_a_device_are_those_of_a_loop() -> None:
    found = per_example.on_device("cpu", 4, gpu.milliseconds)
    assert found["difference"] < 1e-4 and "note" not in found
    assert not __main__.wrong({"rows": [], "per_example": found})
    wrong = __main__.wrong({"rows": [], "per_example": found | {"note": "DIFFERENT"}})
    assert wrong == ["per-example: functorch_opt: DIFFERENT"]


def test_through(tmp_path: Path) -> None:
    pytest.importorskip(
        "torchopt", reason="the comparison needs torchopt: pip install torchopt"
    )
    result = run(tmp_path, "through", "--rows", "small")
    assert not __main__.wrong(result)
    assert set(result["rows"][0]["results"]) == {
        "torchopt",
        "functorch_opt",
        "functorch_opt, checkpoints",
    }
    assert not any("note" in entry for entry in result["rows"][0]["results"].values())


# ---- fewer steps ---------------------------------------------------------------------------------


def test_the_gpt_sees_no_later_character() -> None:
    torch.manual_seed(0)
    model = fewer_steps.GPT(vocabulary=11)
    tokens = torch.randint(11, (2, 32))
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 11
    before, after = model(tokens)[:, :20], model(changed)[:, :20]
    torch.testing.assert_close(before, after)
    assert not torch.allclose(model(tokens)[:, 20], model(changed)[:, 20])


def test_a_target_of_the_text_is_the_next_character() -> None:
    x, y = fewer_steps.text().data
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(x[1:, 0], y[:-1, -1])


@pytest.mark.slow
def test_rehearsal_of_fewer_steps(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits need it: the group demo")
    found = run(tmp_path, "fewer-steps", "--rows", "digits")["rows"][0]["results"]
    assert [*found] == [*fewer_steps.OPTIMIZERS]
    assert (
        1 <= found["AdamW"]["steps"] <= 25
    )  # it reaches its own loss at its end, or before
    assert all(0 < entry["loss"] < 2.31 for entry in found.values())


# ---- monitor -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rehearsal_of_monitor(tmp_path: Path) -> None:
    found = run(tmp_path, "monitor", "--rows", "mlp")["rows"][0]["results"]
    labels = ["training step", *monitored.EVERY]
    kinds = ("eager", "compiled")
    assert {*found} == {f"{kind}, {label}" for kind in kinds for label in labels}
    assert found["compiled, without a monitor"]["share"] == 0.0
    assert all(entry["ms"] > 0 for entry in found.values())


def test_what_is_measured_as_on_is_on() -> None:
    params = {"w": torch.ones(2)}
    for label, every in monitored.EVERY.items():
        tx = monitored.chain(every)
        _, state = tx.update(params, tx.init(params), params)
        kept = "ratio" in str(fo.state_dict(state).keys())
        assert kept == (label != monitored.NONE)


@pytest.mark.slow
def test_rehearsal_of_codecs(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits need it: the group demo")
    found = run(tmp_path, "codecs", "--rows", "AdamW")
    rows = {row["state"]: row for row in found["rows"]}
    assert rows.keys() >= {"float32", *CODECS}
    for state in CODECS:
        row = rows[state]
        assert row["bytes"] == pytest.approx(row["predicted"], rel=0.01)
        assert row["digits"]["loss"] < 3
    for entry in found["bytes"][0].values():
        if entry != "AdamW":
            assert entry["bytes"] == pytest.approx(entry["predicted"], rel=0.01)


def test_the_bytes_of_every_optimizer_are_those_that_are_predicted() -> None:
    """A code for which an optimizer has no slot is an error, and its cell is empty."""
    classes = slot_bytes.every_class()
    assert {"AdamW", "Muon", "SOAP", "Lion"} < classes.keys()
    (soap,) = slot_bytes.measured(("float32", "8bit"), ["SOAP"])
    assert soap["8bit"]["bytes"] == pytest.approx(soap["8bit"]["predicted"])
    assert soap["8bit"]["bytes"] == pytest.approx(16 + 2 * (1 + 4 / 256))
    (sgd,) = slot_bytes.measured(("8bit",), ["SGD"])
    assert sgd["8bit"]["bytes"] is None
    assert slot_bytes.cell(predicted=2.0, bytes=3.0) == "3.00 (2.00 predicted)"
