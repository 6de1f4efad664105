"""The gallery: every ready-made optimizer is in it once, its rules are true, its pages up to date."""

from __future__ import annotations

import inspect
import json
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import functorch_opt as fo
from benchmarks.gallery.__main__ import DOCS, PICTURES
from benchmarks.gallery.draw import draw
from benchmarks.gallery.entries import ENTRIES, FAMILIES, Entry
from benchmarks.gallery.loops import LOOPS, ORTHOGONAL
from benchmarks.gallery.pages import pages
from benchmarks.gallery.race import Race
from benchmarks.gallery.rules import WIDTH, docstring

STEPS = 12


def is_ready_made(name: str) -> bool:
    """Whether a public name is an optimizer: its first argument is the learning rate. `hyperball` is
    a last stage."""
    function = getattr(fo, name)
    if not inspect.isfunction(function) or name.startswith("scale_by_"):
        return False
    first = next(iter(inspect.signature(function).parameters), None)
    return first in ("learning_rate", "max_learning_rate") and name != "hyperball"


def test_every_ready_made_optimizer_is_in_the_gallery_once() -> None:
    names = [entry.name for entry in ENTRIES]
    assert sorted(names) == sorted(filter(is_ready_made, fo.__all__))
    pages = [family.page for family in FAMILIES]
    assert {entry.family for entry in ENTRIES} == set(pages)
    assert len(set(pages)) == len(pages)
    assert LOOPS.keys() <= set(names)


def norm(x: Tensor, dim: int | None = None) -> Tensor:
    return torch.linalg.vector_norm(x, dim=dim, keepdim=dim is not None)


def rms(x: Tensor) -> Tensor:
    return (x**2).mean().sqrt()


NAMES = (
    "sqrt",
    "sign",
    "abs",
    "maximum",
    "minimum",
    "clip",
    "mean",
    "where",
    "amax",
    "argsort",
)
KNOWN = {name: getattr(torch, name) for name in NAMES}
KNOWN |= {"norm": norm, "rms": rms, "qr": torch.linalg.qr, "eigh": torch.linalg.eigh}
KNOWN |= {"eye": lambda n: torch.eye(n, dtype=torch.float64)}
KNOWN |= {"svd": lambda x: torch.linalg.svd(x, full_matrices=False)}


class Problem:
    """A bowl with noise in its gradients, the same for whoever steps through it."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        draw = {"generator": generator, "dtype": torch.float64}
        self.first = torch.randn(4, 3, **draw)
        self.curvature = torch.rand(4, 3, **draw) * 3 + 0.2
        self.noise = torch.randn(STEPS, 4, 3, **draw)
        self.step = 0

    def loss(self, p: Tensor) -> Tensor:
        return 3 + (self.curvature * p**2).sum() / 2

    def grad(self, p: Tensor) -> Tensor:
        noise = self.noise[self.step]
        self.step += 1
        return self.curvature * p + noise


def changed(name: str, value: float) -> float:
    """Another value of a hyperparameter, so that one which a loop forgets is found out."""
    if "eps" in name:
        return 1e-3
    if value == 0:
        return 0.05
    return value * 0.95 if value <= 1 else value * 1.1


def hyperparameters(entry: Entry, other: bool) -> dict[str, object]:
    parameters = inspect.signature(getattr(fo, entry.name)).parameters.values()
    given = {p.name: p.default for p in parameters if p.default is not p.empty}
    if not entry.free:
        given["learning_rate"] = 0.1
    given |= entry.settings
    if not other:
        return given
    words = set(entry.loop.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return {
        name: changed(name, value)
        if isinstance(value, float) and name in words
        else value
        for name, value in given.items()
    }


@pytest.mark.parametrize("other", [False, True], ids=["defaults", "others"])
@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.loop], ids=lambda e: e.name)
def test_the_loop_of_the_page_makes_the_steps_of_the_library(entry, other) -> None:
    hyper = hyperparameters(entry, other)
    own = Problem()
    names = KNOWN | hyper | {"p": own.first, "grad": own.grad, "loss": own.loss}
    names["steps"] = range(1, STEPS + 1)
    exec(ORTHOGONAL if "orthogonal" in entry.loop else "", names)
    exec(entry.loop, names)

    problem, tx = Problem(), getattr(fo, entry.name)(**hyper)
    params = {"w": problem.first}
    state, path = tx.init(params), [problem.first]
    for _ in range(STEPS):
        extra = {"value": problem.loss(params["w"])} if "value" in tx.extra_args else {}
        grads = {"w": problem.grad(params["w"])}
        updates, state = tx.update(grads, state, params, **extra)
        params = fo.apply_updates(params, updates)
        path.append(params["w"])
    moved = sum(float(norm(b - a)) for a, b in pairwise(path))
    assert moved > 0
    assert math.isfinite(moved)
    assert float(norm(names["p"] - params["w"])) < 1e-8 * moved


@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    return pages(Race(), PICTURES)


def test_the_pages_are_what_make_gallery_writes(written) -> None:
    """Their names, numbers of bytes and rules are those of the code, and of docs/race.json."""
    old = [name for name, text in written.items() if (DOCS / name).read_text() != text]
    assert not old, f"{old}: python -m benchmarks.gallery --pages writes them anew"
    kept = {f"gallery/{path.name}" for path in (DOCS / "gallery").glob("*.md")}
    assert kept == {name for name in written if name.startswith("gallery/")}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_page_shows_each_formula_of_the_docstring(entry, written) -> None:
    """To the letter, but for spaces."""
    shown = " ".join(written[f"gallery/{entry.family}.md"].split())
    lines = [line for name in entry.rule for line in docstring(name).body.split("\n")]
    formulas = [" ".join(line.split()) for line in lines if line.startswith("    ")]
    assert not [formula for formula in formulas if formula not in shown]
    assert formulas or any("`" in line for line in lines)


def test_a_formula_is_not_cut_off_by_the_page(written) -> None:
    blocks = "\n".join(written.values()).split("```")[1::2]
    lines = [line for block in blocks for line in block.split("\n")]
    assert len(blocks) > 40
    assert max(map(len, lines)) <= WIDTH
    of_loops = [line for loop in LOOPS.values() for line in loop.split("\n")]
    assert max(map(len, of_loops)) <= WIDTH + 6  # they are in a smaller script


def test_every_optimizer_has_a_picture_and_all_are_light() -> None:
    drawn = {path.stem for path in PICTURES.glob("*.png")}
    assert {entry.name for entry in ENTRIES} | {"all"} <= drawn
    assert sum(path.stat().st_size for path in PICTURES.iterdir()) < 3.2e6


@pytest.mark.slow
def test_make_gallery_draws_a_vector_and_a_matrix(tmp_path) -> None:
    draw(["sgd", "muon"], tmp_path / "pictures", Race())
    drawn = {path.name: path.stat().st_size for path in (tmp_path / "pictures").iterdir()}
    assert drawn.keys() == {"sgd.png", "sgd-race.png", "muon.png", "muon-race.png"}
    assert all(8_000 < size < 60_000 for size in drawn.values())


def test_a_rehearsal_of_the_race_counts_as_none(tmp_path) -> None:
    file = tmp_path / "race.json"
    line = {
        "task": "text-gpt",
        "optimizer": "adam",
        "steps_to_target": 7,
        "curve": [[1, 2.0]],
    }
    race = {"protocol": {"quick": True}, "tasks": {"text-gpt": {"title": "text"}}}
    race["results"] = [
        line,
        {**line, "optimizer": "sgd", "curve": [], "steps_to_target": None},
    ]
    file.write_text(json.dumps(race))
    assert not Race(file)
    assert not Race(tmp_path / "missing.json")
    found = Race(file, rehearsal=True)
    assert found.tasks == ["text-gpt"]
    assert (found.has("adam"), found.has("sgd")) == (True, False)
    assert found.steps("text-gpt", "adam") == 7
    assert found.steps("text-gpt", "sgd") is None
