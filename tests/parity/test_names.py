"""Every public name of optax, and what became of it: the table in docs/migrate.md.

``python tests/parity/test_names.py`` writes the table anew.
"""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import Any

import pytest

import functorch_opt as fo

optax = pytest.importorskip("optax", reason="the names are those of optax")

PAGE = Path(__file__).parents[2] / "docs" / "migrate.md"
HEAD = "| optax | here |\n|---|---|\n"
THE_SAME = "the same name, in `functorch_opt`"

LOSSES = "a loss, which is left out: torch has none"
STATES = "states are dicts by the name of the stage, and `StageState`: `get`, `describe`"
OURS_ARE_TREES = "no name: trees of tensors are `functorch_opt.tree.PyTree`"
OTHERS: dict[str, str] = {
    "GradientTransformationExtraArgs": "`GradientTransformation`: extra arguments are declared by naming them",
    "LookaheadParams": "`eval_params`: the slow weights are in the state",
    "MaskOrFn": "no name: a tree of bools, or a function of path and leaf",
    "MaskedNode": "no name: a part of a tree is a flat dict by path, without holes",
    "Schedule": "no name: any function of the count",
    "ShouldSkipUpdateFunction": "no name: see `MultiSteps`",
    "WrappedSchedule": "not needed: `inject_hyperparams` takes functions of the count, and schedules with a state",
    "dpsgd": "`dp_sgd`",
    "init_empty_state": "`lambda params: ()`",
    "inject_stateful_hyperparams": "`inject_hyperparams`",
    "matrix_inverse_pth_root": "`torch.linalg.eigh`",
    "microbatch": "`per_example_grads(loss, chunk_size)`, `clipped_grad_sum`, `MultiSteps`",
    "multi_normal": "`torch.distributions.MultivariateNormal`",
    "multi_transform": "`partition`",
    "nnls": "`scipy.optimize.nnls`",
    "optimistic_adam": "`optimistic_adam_v2`",
    "power_iteration": "`torch.linalg.eigh`",
    "safe_norm": "`functorch_opt.tree.norm`, whose derivative is finite at zero",
    "safe_root_mean_squares": "`(x.square().mean() + functorch_opt.tree.TINY).sqrt()`",
    "schedule_free_eval_params": "`eval_params`",
    "stateless_with_tree_map": "`leafwise`",
    "tree_map_params": "`functorch_opt.tree.map_params`",
    "with_extra_args_support": "not needed: a stage gets the extra arguments that it names",
    **dict.fromkeys(
        ("safe_increment", "safe_int32_increment"), "`count + 1`: counts are int64"
    ),
    **dict.fromkeys(
        (
            "bias_correction",
            "update_infinity_moment",
            "update_moment",
            "update_moment_per_elem_norm",
        ),
        "the same name, in `functorch_opt.tree`",
    ),
    **dict.fromkeys(("OptState", "Params", "Updates"), OURS_ARE_TREES),
    **dict.fromkeys(
        ("TransformInitFn", "TransformUpdateExtraArgsFn", "TransformUpdateFn"),
        "no name: plain functions",
    ),
    **dict.fromkeys(("ApplyEvery", "ZoomLinesearchInfo"), STATES),
    "MuonDimensionNumbers": "`MatrixDims`",
    "GaLoreDimensionNumbers": "`MatrixDims`",
    # losses
    "cosine_distance": "`1 - torch.nn.functional.cosine_similarity`",
    "cosine_similarity": "`torch.nn.functional.cosine_similarity`",
    "ctc_loss": "`torch.nn.functional.ctc_loss`",
    "huber_loss": "`torch.nn.functional.huber_loss`",
    "kl_divergence": "`torch.nn.functional.kl_div`",
    "l2_loss": "`torch.nn.functional.mse_loss`, of which it is half",
    "sigmoid_binary_cross_entropy": "`torch.nn.functional.binary_cross_entropy_with_logits`",
    "smooth_labels": "`torch.nn.functional.cross_entropy(..., label_smoothing=alpha)`",
    **dict.fromkeys(
        ("softmax_cross_entropy", "softmax_cross_entropy_with_integer_labels"),
        "`torch.nn.functional.cross_entropy`",
    ),
    "squared_error": "`torch.nn.functional.mse_loss`",
    **dict.fromkeys(
        (
            "convex_kl_divergence",
            "ctc_loss_with_forward_probs",
            "generalized_kl_divergence",
            "hinge_loss",
            "log_cosh",
            "ntxent",
            "safe_softmax_cross_entropy",
            "sigmoid_focal_loss",
        ),
        LOSSES,
    ),
}
"""Names that are not here under the same name."""

FOLDERS = {
    "assignment": "left out: `scipy.optimize.linear_sum_assignment`",
    "experimental": "left out; of single examples: `per_example_grads`",
    "losses": "left out, but for those above",
    "microbatching": "`per_example_grads(loss, chunk_size)`, `clipped_grad_sum`, `MultiSteps`",
    "perturbations": "left out: they are no optimizers",
    "projections": "the same names, in `functorch_opt.projections`",
    "second_order": "`torch.func.jvp`, `torch.func.hessian`",
    "tree": "the same names, in `functorch_opt.tree`; `split_key_like`: `functorch_opt.random.split`; "
    "`get`: `functorch_opt.get`; `zeros_like`: `tree.full_like(tree, 0)`",
    "tree_utils": "as `optax.tree`",
}
"""Modules of optax whose names have their own tests, or are left out as a whole."""


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
            what = THE_SAME
        elif name in OTHERS:
            what = OTHERS[name]
        elif name.endswith("State"):
            what = STATES
        else:
            what = "?"
        groups.setdefault(what, set()).add(name)
    return groups


def table() -> str:
    rows = [
        f"| {', '.join(f'`{name}`' for name in sorted(of))} | {what} |\n"
        for what, of in sorted(became().items(), key=lambda row: (-len(row[1]), row[0]))
    ]
    rows += [f"| `optax.{name}` | {what} |\n" for name, what in FOLDERS.items()]
    return HEAD + "".join(rows)


def with_table(page: str) -> str:
    """The page, with the table as it has to be."""
    before, _, after = page.partition(HEAD)
    rest = re.sub(r"\A(\|.*\n)*", "", after)
    return before + table() + rest


def test_the_page_has_every_name() -> None:
    page = PAGE.read_text()
    assert HEAD in page
    assert page == with_table(page), "run python tests/parity/test_names.py"


def test_nothing_is_forgotten() -> None:
    assert became().get("?") is None
    assert not deprecated() - names() - {"__getattr__"}
    here = OTHERS.keys() & set(dir(fo))
    assert not here, f"they are here: take them out of OTHERS, {here}"
    gone = OTHERS.keys() - names()
    assert not gone, f"optax has no such name: {gone}"


def test_what_the_table_names_exists() -> None:
    said = " ".join([*OTHERS.values(), *FOLDERS.values()])
    for path in re.findall(r"`(functorch_opt[\w.]*)", said):
        value: Any = fo
        for part in path.split(".")[1:]:
            value = getattr(value, part)
    for name in re.findall(r"`(\w+)[`(]", said):
        assert name in dir(fo) or name in (
            "count",
            "zeros_like",
            "get",
            "split_key_like",
        ), name
    import torch

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
    elsewhere = {"contrib", "schedules", "transforms"}
    assert folders == FOLDERS.keys() | elsewhere
    for folder in elsewhere - {"contrib"}:
        functions = {
            name
            for name in public(getattr(optax, folder))
            if isinstance(getattr(getattr(optax, folder), name), types.FunctionType)
        }
        assert functions - names() <= {"unitwise_clip", "unitwise_norm"}, folder


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
