"""Names of optax that are not here, and what there is in place of them.

Who ports a script by its import meets them one by one, as errors. docs/migrate.md has all of them.
"""

from __future__ import annotations

from functorch_opt._names import NAMES as _HERE

SAME = "the same name, in `functorch_opt`"
_SAME_NAMES = "the same names, in `functorch_opt`"
STATES = "states are dicts by the name of the stage, and `StageState`: `get`, `describe`"
_LOSS = "a loss, which is left out: torch has none"
_OF_TREES = "the same name, in `functorch_opt.tree`"
_COUNTS = "`count + 1`: counts are int64"
_CROSS_ENTROPY = "`torch.nn.functional.cross_entropy`"

NAMES = {
    "ApplyEvery": STATES,
    "GaLoreDimensionNumbers": "`MatrixDims`",
    "LookaheadParams": "`eval_params`: the slow weights are in the state",
    "MaskedNode": "no name: a part of a tree is a flat dict by path, without holes",
    "MuonDimensionNumbers": "`MatrixDims`",
    "ShouldSkipUpdateFunction": "no name: see `MultiSteps`",
    "WrappedSchedule": "not needed: `inject_hyperparams` takes functions of the count, and schedules with a state",
    "ZoomLinesearchInfo": STATES,
    "bias_correction": _OF_TREES,
    "convex_kl_divergence": _LOSS,
    "cosine_distance": "`1 - torch.nn.functional.cosine_similarity`",
    "cosine_similarity": "`torch.nn.functional.cosine_similarity`",
    "ctc_loss": "`torch.nn.functional.ctc_loss`",
    "ctc_loss_with_forward_probs": _LOSS,
    "generalized_kl_divergence": _LOSS,
    "hinge_loss": _LOSS,
    "huber_loss": "`torch.nn.functional.huber_loss`",
    "inject_stateful_hyperparams": "`inject_hyperparams`",
    "kl_divergence": "`torch.nn.functional.kl_div`",
    "l2_loss": "`torch.nn.functional.mse_loss`, of which it is half",
    "log_cosh": _LOSS,
    "matrix_inverse_pth_root": "`torch.linalg.eigh`",
    "microbatch": "`per_example_grads(loss, chunk_size)`, `clipped_grad_sum`, `MultiSteps`",
    "multi_normal": "`torch.distributions.MultivariateNormal`",
    "multi_transform": "`partition`",
    "nnls": "`scipy.optimize.nnls`",
    "ntxent": _LOSS,
    "optimistic_adam": "`optimistic_adam_v2`",
    "power_iteration": "`torch.linalg.eigh`",
    "safe_increment": _COUNTS,
    "safe_int32_increment": _COUNTS,
    "safe_norm": "`functorch_opt.tree.norm`, whose derivative is finite at zero",
    "safe_root_mean_squares": "`(x.square().mean() + functorch_opt.tree.TINY).sqrt()`",
    "safe_softmax_cross_entropy": _LOSS,
    "schedule_free_eval_params": "`eval_params(tx, state, params)`: a decay that it needs is not in the state",
    "sigmoid_binary_cross_entropy": "`torch.nn.functional.binary_cross_entropy_with_logits`",
    "sigmoid_focal_loss": _LOSS,
    "smooth_labels": "`torch.nn.functional.cross_entropy(..., label_smoothing=alpha)`",
    "softmax_cross_entropy": _CROSS_ENTROPY,
    "softmax_cross_entropy_with_integer_labels": _CROSS_ENTROPY,
    "squared_error": "`torch.nn.functional.mse_loss`",
    "update_infinity_moment": _OF_TREES,
    "update_moment": _OF_TREES,
    "update_moment_per_elem_norm": _OF_TREES,
}
"""Names of ``optax`` and ``optax.contrib``; the names of states end in ``State``."""

FOLDERS = {
    "assignment": "left out: `scipy.optimize.linear_sum_assignment`",
    "contrib": _SAME_NAMES,
    "experimental": "left out; of single examples: `per_example_grads`",
    "losses": "left out, but for those that the table names",
    "microbatching": NAMES["microbatch"],
    "perturbations": "left out: they are no optimizers",
    "projections": "the same names, in `functorch_opt.projections`",
    "schedules": _SAME_NAMES,
    "second_order": "`torch.func.jvp`, `torch.func.hessian`",
    "transforms": _SAME_NAMES,
    "tree": "the same names, in `functorch_opt.tree`, but for those below",
    "tree_utils": "the same names without their prefix, in `functorch_opt.tree`",
}
"""Modules of optax."""

OF_TREE = {
    "dtype": "each leaf has its own: `leaf.dtype`",
    "get_all_with_path": "`functorch_opt.state_dict`, all values by path",
    "split_key_like": "`functorch_opt.random.split`",
    "unwrap_random_key_data": "not needed: a key is a tensor",
    "zeros_like": "`full_like(tree, 0)`: `zeros_like` is a function of one tensor here",
}
"""Names of ``optax.tree`` that are not in `functorch_opt.tree`, or are something else there."""


def missing(module: str, name: str) -> AttributeError:
    """The error for a name that a module has not; of a name of optax it says what there is here."""
    said = f"module {module!r} has no attribute {name!r}"
    of_tree = module.endswith("tree")
    if of_tree and name.startswith("tree_"):
        bare = name.removeprefix("tree_")
        return AttributeError(
            f"{said}. Write functorch_opt.tree.{bare}, without a prefix."
        )
    if not of_tree and any(name in names for names in _HERE.values()):
        return AttributeError(f"{said}. Write functorch_opt.{name}.")
    known = OF_TREE if of_tree else {**FOLDERS, **NAMES}
    here = STATES if name.endswith("State") else known.get(name)
    if here is None:
        return AttributeError(said)
    here = here.replace("`", "")
    return AttributeError(f"{said}. Of optax's {name} docs/migrate.md says: {here}.")
