"""Every public name of optax, and what became of it: the table in docs/migrate.md.

``python tests/parity/test_names.py`` writes the table anew.
"""

from __future__ import annotations

import importlib
import inspect
import re
import types
import typing
from pathlib import Path
from typing import Any

import pytest
import torch

import functorch_opt as fo
from functorch_opt._elsewhere import FOLDERS, NAMES, OF_TREE, SAME, STATES, missing

optax = pytest.importorskip("optax", reason="the names are those of optax")

PAGE = Path(__file__).parents[2] / "docs" / "migrate.md"
HEAD = "| optax | here |\n|---|---|\n"
ARGUMENTS_HEAD = "| name | arguments |\n|---|---|\n"
AS_NOISE = "the key has no default, and comes after `*`; no deprecated `seed=`"
NONE_IS_ZERO = "`weight_decay=0.0` in place of None, so that a group can set it"
NO_IS_LEAF = "no `is_leaf=`: what a leaf is does not change"
NO_VERBOSE = "nothing is printed: no `verbose=`"
OF_AUTHORS = (
    "`growth_rate=` and `use_bias_correction=` are ours: they are the authors'; "
    "`weight_decay_mask=` is that of optax after 0.2.8"
)
OF_GALORE = (
    "the scale and eps are the authors'; Adam is part of the rule, and for any other "
    "optimizer there is `project_gradients`; `dims=` stands for the dimension numbers"
)
OF_TORCH = "`variant=` is ours, for torch's numbers"
POSITIONAL = "the stages are `*{}`, not `*args`: nobody names them"

ARGUMENTS = {
    "GradientTransformation": "`extra_args=` and `last=` are ours: what the stages declare",
    "GradientTransformationExtraArgs": "as `GradientTransformation`",
    "MultiSteps": "no `accumulator_dtype=`: at least float32; `weighted=` and `flushes=` are ours",
    "adabelief": "`weight_decay=` and its mask are those of optax after 0.2.8",
    "adafactor": "`eps=None` stands for 1e-30",
    "add_noise": "the key has no default, for two stages would draw the same noise; no deprecated `seed=`",
    "chain": POSITIONAL.format("stages"),
    "differentially_private_aggregate": "as `add_noise`; `expected_batch_size=` is ours",
    "dog": NONE_IS_ZERO,
    "dowg": NONE_IS_ZERO,
    "dpsgd": "as `differentially_private_aggregate`",
    "galore": OF_GALORE,
    "hutchinson_estimator_diag_hessian": "a function of the loss, the params and a key, and no transformation",
    "inject_hyperparams": "no `hyperparam_dtype=`: numbers are float64",
    "lbfgs": "the line search has the same arguments, but is another object",
    "masked": "`otherwise=` is ours, `'zero'` freezes; no extra argument has the form of the params, so none is masked",
    "measure_with_ema": "no `accumulator_dtype=`: at least float32",
    "monitor": "`measures=` has a default; `layers=`, `trees=` and `every=` are ours",
    "muon": "`consistent_rms=` comes earlier; `dims=` stands for the dimension numbers; "
    "`scaling=`, `ns_dtype=` and `variant=` are ours",
    "nadam": "`nesterov=True` cannot be switched off: that is `adam`; `momentum_decay=` is ours, for torch's numbers",
    "nadamw": "as `nadam`",
    "named_chain": POSITIONAL.format("transforms"),
    "noisy_sgd": AS_NOISE,
    "partition": "extra arguments as in `masked`",
    "prodigy": OF_AUTHORS,
    "radam": OF_TORCH,
    "sam": "no `batch_axis_name=`: ranks average themselves",
    "scale_by_adam": "`amsgrad=` and `nu_dtype=` are ours",
    "scale_by_backtracking_linesearch": NO_VERBOSE,
    "scale_by_distance_over_gradients": "no `param_dtype=`: at least float32",
    "scale_by_factored_rms": "`epsilon=None` stands for 1e-30; no `decay_rate_fn=`; "
    + OF_TORCH,
    "scale_by_galore": OF_GALORE,
    "scale_by_muon": "as `muon`; the factor of the shape is no stage of its own",
    "scale_by_radam": OF_TORCH,
    "scale_by_rss": "`eps_in_sqrt=` is ours, for torch's numbers",
    "scale_by_zoom_linesearch": NO_VERBOSE,
    "schedule_free": "`warmup_steps=` and `r=` are ours: they are the authors'",
    "schedule_free_adamw": "`r=` is the authors', `mask=` is ours",
    "schedule_free_sgd": "as `schedule_free_adamw`; " + NONE_IS_ZERO,
    "snapshot": "`is_tree=` is ours: the form of a state is known before the first update",
    "sophia": "`key=` is ours, `hessian_diagonal_fn=` is a plain function, and nothing is printed",
    "trace": "`dampening=` is ours, for torch's numbers",
    "tree.get": "a name that nothing has is an error without a `default=`",
    "tree.map_params": NO_IS_LEAF,
    "tree_map_params": NO_IS_LEAF,
    "tree.sum": "no `associative_reduction=`, which is for another compiler",
    "tree.zeros_like": "a function of one tensor",
}
"""Functions whose arguments are not optax's, and why; a default of `adopt` is a function of each."""


def public(module: Any) -> set[str]:
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }


def deprecated() -> set[str]:
    """Names that optax makes when they are asked for, with a warning."""
    return set(dir(optax)) - set(vars(optax))


def names() -> set[str]:
    return public(optax) | public(optax.contrib)


def became() -> dict[str, set[str]]:
    """``{what became of them: names}``."""
    groups: dict[str, set[str]] = {}
    for name in names():
        if name in dir(fo):
            what = SAME
        elif name in NAMES:
            what = NAMES[name]
        elif name.endswith("State"):
            what = STATES
        else:
            what = "?"
        groups.setdefault(what, set()).add(name)
    return groups


def rows_of_names() -> list[str]:
    rows = [
        f"| {', '.join(f'`{name}`' for name in sorted(of))} | {what} |\n"
        for what, of in sorted(became().items(), key=lambda row: (-len(row[1]), row[0]))
    ]
    rows += [f"| `optax.{name}` | {what} |\n" for name, what in FOLDERS.items()]
    rows += [f"| `optax.tree.{name}` | {what} |\n" for name, what in OF_TREE.items()]
    return rows


def rows_of_arguments() -> list[str]:
    groups: dict[str, list[str]] = {}
    for name, what in ARGUMENTS.items():
        groups.setdefault(what, []).append(f"`{name}`")
    return [f"| {', '.join(of)} | {what} |\n" for what, of in groups.items()]


def with_table(page: str, head: str, rows: list[str]) -> str:
    """The page, with a table as it has to be."""
    before, _, after = page.partition(head)
    rest = re.sub(r"\A(\|.*\n)*", "", after)
    return before + head + "".join(rows) + rest


def with_tables(page: str) -> str:
    page = with_table(page, HEAD, rows_of_names())
    return with_table(page, ARGUMENTS_HEAD, rows_of_arguments())


def test_the_page_has_every_name() -> None:
    page = PAGE.read_text()
    assert HEAD in page
    assert ARGUMENTS_HEAD in page
    assert page == with_tables(page), "run python tests/parity/test_names.py"


def test_nothing_is_forgotten() -> None:
    assert became().get("?") is None
    assert not deprecated() - names() - {"__getattr__"}
    here = NAMES.keys() & set(dir(fo))
    assert not here, f"they are here: take them out of NAMES, {here}"
    gone = NAMES.keys() - names()
    assert not gone, f"optax has no such name: {gone}"


def test_what_the_table_names_exists() -> None:
    said = " ".join([*NAMES.values(), *FOLDERS.values(), *OF_TREE.values()])
    for path in re.findall(r"`(functorch_opt[\w.]*)", said):
        value: Any = fo
        for part in path.split(".")[1:]:
            value = getattr(value, part)
    for name in re.findall(r"`(\w+)[`(]", said):
        assert name in {"functorch_opt", "count", *dir(fo), *dir(fo.tree)}, name
    for path in re.findall(r"`(?:1 - )?torch\.([\w.]+)", said):
        value = torch
        for part in path.split("."):
            value = getattr(value, part)


def test_every_folder_of_optax_is_here() -> None:
    folders = {
        name
        for name, value in vars(optax).items()
        if isinstance(value, types.ModuleType) and not name.startswith("_")
    }
    assert folders == FOLDERS.keys()
    for folder in ("schedules", "transforms"):
        functions = {
            name
            for name in public(getattr(optax, folder))
            if isinstance(getattr(getattr(optax, folder), name), types.FunctionType)
        }
        assert functions - names() <= {"unitwise_clip", "unitwise_norm"}, folder


# ---- who ports a script meets the table as errors --------------------------------------------------


def not_here(module: Any, table: dict[str, str]) -> list[str]:
    """Without `transforms`, which is a folder here too, and has a test of its own."""
    return sorted(table.keys() - {*dir(module), "transforms"})


@pytest.mark.parametrize("name", ["AddNoiseState", *not_here(fo, {**NAMES, **FOLDERS})])
def test_a_name_of_optax_says_what_there_is_here(name: str) -> None:
    with pytest.raises(AttributeError, match=f"Of optax's {name} docs/migrate.md says: "):
        getattr(fo, name)


@pytest.mark.parametrize("name", not_here(fo.tree, OF_TREE))
def test_a_tree_function_of_optax_says_what_there_is_here(name: str) -> None:
    with pytest.raises(AttributeError, match=f"Of optax's {name} docs/migrate.md says: "):
        getattr(fo.tree, name)


INSIDE = {"ConditionFn", "StatefulSchedule", "unitwise_clip", "unitwise_norm"}
"""Names that optax has in a folder only."""
FILES = {"clip", "monitor"}
"""Names that are files of the folder here, so that the folder has them."""


@pytest.mark.parametrize("folder", ["schedules", "transforms"])
def test_a_folder_of_optax_that_is_a_folder_here_says_where_its_names_are(
    folder: str,
) -> None:
    here = importlib.import_module(f"functorch_opt.{folder}")
    theirs = public(getattr(optax, folder)) - INSIDE - FILES
    for name in theirs - {*dir(here)}:
        said = (
            f"Write functorch_opt.{name}." if name in dir(fo) else "docs/migrate.md says"
        )
        with pytest.raises(AttributeError, match=re.escape(said)):
            getattr(here, name)
    assert not hasattr(here, "adan_w")


def test_names_of_trees_with_the_prefix_of_optax_say_what_to_write() -> None:
    for name in public(optax.tree_utils) - {"NamedTupleKey"}:
        said = f"Write functorch_opt.tree.{name.removeprefix('tree_')}, without a prefix."
        with pytest.raises(AttributeError, match=re.escape(said)):
            getattr(fo.tree, name)


def test_another_name_is_just_not_there() -> None:
    assert str(missing("functorch_opt", "adan_w")).endswith("has no attribute 'adan_w'")
    assert not hasattr(fo.tree, "adan_w")


# ---- arguments -------------------------------------------------------------------------------------


def pairs() -> dict[str, tuple[Any, Any]]:
    """``{name: (ours, theirs)}`` of all functions and classes that both have."""
    found = {}
    for module in (optax, optax.contrib):
        for name in public(module):
            if name in dir(fo):
                found[name] = getattr(fo, name), getattr(module, name)
    for folder in ("projections", "tree"):
        ours, theirs = getattr(fo, folder), getattr(optax, folder)
        for name in public(theirs) & {*dir(ours)}:
            found[f"{folder}.{name}"] = getattr(ours, name), getattr(theirs, name)
    return {
        name: both
        for name, both in found.items()
        if all(map(callable, both)) and not is_type_alias(both[0])
    }


def is_type_alias(value: Any) -> bool:
    return value is Any or typing.get_origin(value) is not None


def arguments(f: Any) -> list[tuple]:
    """Names, kinds and defaults; dtypes by their names, and functions as such."""
    return [
        (p.name, p.kind, plain(p.default))
        for p in inspect.signature(f).parameters.values()
    ]


def plain(default: Any) -> Any:
    if isinstance(default, (type, torch.dtype)):
        return getattr(default, "__name__", str(default)).removeprefix("torch.")
    return "a function" if isinstance(default, types.FunctionType) else default


PAIRS = pairs()


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_arguments_are_those_of_optax(name: str) -> None:
    ours, theirs = map(arguments, PAIRS[name])
    assert (ours == theirs) == (name not in ARGUMENTS), (ours, theirs)


def test_arguments_that_differ_are_of_what_both_have() -> None:
    assert not ARGUMENTS.keys() - PAIRS.keys()


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
