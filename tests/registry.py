"""One row for each transformation and optimizer.

Every law in `test_laws.py` runs over every row. What a row cannot do is a column of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import functorch_opt as fo


@dataclass(frozen=True)
class Row:
    name: str
    make: Callable[..., fo.GradientTransformation]
    """Builds the transformation from its numeric hyperparameters, given by name."""
    hyper: dict[str, float] = field(default_factory=dict)
    """Hyperparameters that may be tensors: vmapped over, differentiated, changed without
    recompiling.
    """
    variants: tuple[dict[str, Any], ...] = ({},)
    """Other ways to call `make`: options that change what is computed."""
    smooth: bool = True
    """Whether finite differences mean anything at a random point."""
    slope_at_zero: bool = True
    """Whether derivatives at zero gradients are finite. A matrix of zeros has no eigenvectors with a
    slope, and no orthonormal columns; the slope of MuonH is so large that float32 has no such number.
    """
    lr_is_all: bool = True
    """Whether nothing moves where the group option ``lr`` is 0; the decay of SPlus comes after it."""
    keyed: bool = False
    """Whether it draws noise, from a `key` argument."""
    rounds: bool = False
    """Whether it does something for low-precision parameters only."""
    reads_shape: bool = False
    """Whether it looks at the shape of a tensor, so that a complex one is not just pairs of
    reals.
    """
    passes_none: bool = True
    """Whether it leaves parameters without gradient alone; a function of whole trees does as it
    likes.
    """
    slots_rest: bool = True
    """Whether the slots of a parameter without gradient stay; the memory of L-BFGS moves on for all
    parameters together.
    """
    unrolls: bool = False
    """Whether compiled code unrolls its loop, which takes long: `test_line_search.py` compiles a
    small one.
    """
    shards: bool = True
    """Whether it takes sharded tensors; otherwise it raises an error that says so."""
    apart: bool = False
    """Whether it is not made of rules, so that a compiled step runs it eagerly, and says so."""
    written: bool = True
    """Whether `make` is the public function itself, so that what it builds prints as one call and
    pickles.
    """

    @property
    def id(self) -> str:
        return self.name

    def build(
        self, variant: dict[str, Any] | None = None, **hyper: Any
    ) -> fo.GradientTransformation:
        return self.make(
            **{
                **({"key": 7} if self.keyed else {}),
                **self.hyper,
                **(variant or {}),
                **hyper,
            }
        )


def on_a_bowl(tx: fo.GradientTransformation) -> fo.GradientTransformation:
    """`tx`, given what it reads: ``f(q) = 3 + <g, q - p> + |q - p|^2``, whose gradient at the
    params p is the g that comes in.
    """

    def update(updates, state, params):
        def value_fn(at):
            apart = fo.tree.map(
                lambda g, q, p: (g * (q - p).conj()).real + (q - p).abs() ** 2,
                updates,
                at,
                params,
            )
            return 3 + sum(fo.tree.whole(x).sum() for x in fo.tree.leaves(apart))

        extra = {"value": value_fn(params), "grad": updates, "value_fn": value_fn}
        extra["obj_fn"] = value_fn
        return tx.update(
            updates, state, params, **{name: extra[name] for name in tx.extra_args}
        )

    return fo.GradientTransformation(tx.init, update)


def with_logits(tx: fo.GradientTransformation) -> fo.GradientTransformation:
    """`tx`, given the largest attention logit of the only head of each layer."""

    def update(updates, state, params):
        logits = torch.tensor([80.0], dtype=torch.float64)
        named = dict.fromkeys(("conv", "w", "b", "o"), logits)
        return tx.update(updates, state, params, max_logits=named)

    return fo.GradientTransformation(tx.init, update)


def everywhere(path: str, p: torch.Tensor) -> bool:
    """Where slots are stored in a code, if small tensors are not left out."""
    return True


LR = {"learning_rate": 0.1}
RPROP = {
    "learning_rate": 0.1,
    "eta_minus": 0.5,
    "eta_plus": 1.2,
    "min_step_size": 1e-6,
    "max_step_size": 50.0,
}
ADAM = {"b1": 0.9, "b2": 0.99, "eps": 1e-3}
ADAN = {"b1": 0.9, "b2": 0.8, "b3": 0.95, "eps": 1e-3, "eps_root": 1e-3}
ADEMAMIX = {
    "b1": 0.9,
    "b2": 0.95,
    "b3": 0.99,
    "alpha": 2.0,
    "eps": 1e-3,
    "eps_root": 1e-3,
}
NOVOGRAD = {"b1": 0.9, "b2": 0.5, "eps": 1e-3, "eps_root": 1e-3, "weight_decay": 0.1}
CAME = {
    "b1": 0.9,
    "b2": 0.8,
    "b3": 0.7,
    "eps": 1e-3,
    "instability_eps": 1e-3,
    "clipping_threshold": 0.7,
}
FOCUS = {"b1": 0.9, "b2": 0.8, "gamma": 0.2, "weight_decay": 0.1}
SPAM = {"gamma1": 0.7, "gamma2": 0.8, "theta": 0.5}
decay_schedule = fo.exponential_decay(0.5, 3, 0.5)


def matrices(path, p):
    return p.ndim > 1


def kernels(path, p):
    return path.endswith("w")


def head_or_vector(path, p):
    return "head" if p.ndim == 2 else "vector"


def each_kind_of_block(path, p):
    if path.endswith("b"):
        return "element"
    return "tensor" if p.ndim < 2 else ("row" if len(p) % 2 else "head")


def on_its_matrices(make: Callable[..., Any]) -> Callable[..., Any]:
    """`make`, whose transformation gets the tensors with two dims or more."""

    def build(**options: Any) -> fo.GradientTransformation:
        return fo.masked(make(**options), matrices)

    return build


def of_three_examples(tx: fo.GradientTransformation) -> fo.GradientTransformation:
    """`tx`, which takes the gradient of every example, after a stage that makes three of one."""
    return fo.chain(
        fo.stateless(
            lambda updates, params: fo.tree.map(
                lambda u: torch.stack([u, -0.5 * u, 0.01 * u]), updates
            )
        ),
        tx,
    )


def refreshed_scale(decay: float) -> fo.GradientTransformation:
    """Divides by a mean of sizes that is brought up to date at every second step: a periodic
    rule.
    """

    def work(g, size, decay):
        return {"size": decay * size + (1 - decay) * (g * g)}

    def rule(g, size):
        return g / (size + 0.01).sqrt(), {"size": size}  # its slope at 0 is finite

    return fo.leafwise(
        rule,
        slots={"size": fo.tree.zeros_like},
        hyper={"decay": decay},
        every=fo.every(2, work),
    )


def distance_over_gradients(first_distance: float) -> fo.GradientTransformation:
    """DoG: the largest distance from the start so far, over the root of all squares: totals."""

    def prepare(moved, squares, distance, gathered, first_distance):
        distance = torch.maximum(distance, moved.to(distance.dtype))
        gathered = gathered + squares.to(gathered.dtype)
        rate = (distance + first_distance) / (gathered + 1e-8).sqrt()
        return {"rate": rate}, {"distance": distance, "gathered": gathered}

    def rule(g, start, rate):
        return -rate * g, {"start": start}

    return fo.leafwise(
        rule,
        prepare,
        slots={"start": torch.clone},
        shared={
            name: torch.zeros((), dtype=torch.float64)
            for name in ("distance", "gathered")
        },
        hyper={"first_distance": first_distance},
        totals={
            "moved": fo.largest(farthest),
            "squares": lambda g: g.square().sum(),
        },
    )


def farthest(p, start):
    """The largest distance of an element; 0 where there is none."""
    return (p - start).abs().amax() if p.numel() else p.new_zeros(())


def at_odd_steps(learning_rate: float, **options: Any) -> fo.GradientTransformation:
    """A gate: the decision is one that the host knows where it knows the count."""
    return fo.gate(fo.adam(learning_rate), lambda count: count % 2 == 1, **options)


def with_a_heavy_ball(learning_rate: float, decay: float) -> fo.GradientTransformation:
    """A wrap: the inner transformation sees other gradients and parameters; its update gets
    momentum.
    """

    def before(g, p, ball, decay):
        return g + decay * p, p + decay * ball

    def after(u, ball, decay):
        ball = u + decay * ball
        return ball, {"ball": ball}

    return fo.wrap(
        fo.adamw(learning_rate, weight_decay=0.1),
        slots={"ball": fo.tree.zeros_like},
        hyper={"decay": decay},
        before=before,
        after=after,
    )


def at_odd(count):
    return count % 2 == 1


def one_then_two(steps):
    return 1 + (steps > 0)


def skip_above_20(updates, gradient_step, params):
    return fo.skip_large_updates(updates, gradient_step, params, 20.0)


LAST_IS_ROWS = fo.MatrixDims(rows=-1)


def relative(u, p):
    return fo.tree.norm([u]) / (1 + fo.tree.norm([p]))


LAYERS = {"of_layer": lambda u: fo.tree.norm([u]), "relative": relative}
NESTEROV = fo.sgd(0.7, momentum=0.5, nesterov=True)
ASCENT = fo.chain(fo.normalize(), fo.sgd(0.1))
DP = {"l2_norm_clip": 0.5, "noise_multiplier": 0.7}

ROWS = [
    Row(
        "adaptive_grad_clip",
        fo.adaptive_grad_clip,
        {"clipping": 0.5, "eps": 0.4},
        ({}, {"clipping": 100.0}, {"axis": 0}),
        reads_shape=True,
    ),
    Row(
        "add_decayed_weights",
        fo.add_decayed_weights,
        {"weight_decay": 0.1},
        ({}, {"mask": lambda path, p: p.ndim > 1}, {"weight_decay": decay_schedule}),
    ),
    Row(
        "add_noise",
        fo.add_noise,
        {"eta": 0.1, "gamma": 0.5},
        ({}, {"gamma": 0.0}),
        keyed=True,
    ),
    Row(
        "cautious_weight_decay",
        fo.cautious_weight_decay,
        {"weight_decay": 0.1},
        ({}, {"mask": matrices}, {"weight_decay": decay_schedule}),
    ),
    Row("centralize", fo.centralize, reads_shape=True),
    Row("clip_spikes", fo.clip_spikes, {"decay": 0.5}, smooth=False),
    Row(
        "corrected_weight_decay",
        fo.corrected_weight_decay,
        {"weight_decay": 0.1, **LR},
        (
            {},
            {"learning_rate": decay_schedule},
            {"max_learning_rate": 0.5, "mask": matrices},
        ),
    ),
    Row(
        "chain",
        lambda max_norm, learning_rate: fo.chain(
            fo.clip_by_global_norm(max_norm), fo.adamw(learning_rate)
        ),
        {"max_norm": 0.5, **LR},
        written=False,
    ),
    Row("clip", fo.clip, {"max_delta": 0.7}),
    Row(
        "clip_by_block_rms",
        fo.clip_by_block_rms,
        {"threshold": 0.5},
        ({}, {"threshold": 1e6}),
    ),
    Row(
        "clip_by_global_norm",
        fo.clip_by_global_norm,
        {"max_norm": 0.5},
        ({}, {"max_norm": 1e6}),
    ),
    Row(
        "differentially_private_aggregate",
        lambda **given: of_three_examples(fo.differentially_private_aggregate(**given)),
        DP,
        ({}, {"expected_batch_size": 4.0}, {"noise_multiplier": decay_schedule}),
        keyed=True,
        written=False,
        apart=True,
    ),
    Row("ema", fo.ema, {"decay": 0.9}, ({}, {"debias": False})),
    Row("every", refreshed_scale, {"decay": 0.9}, written=False),
    Row("gate", at_odd_steps, LR, ({}, {"otherwise": "pass"}), written=False),
    Row("identity", fo.identity),
    Row(
        "inject_hyperparams",
        fo.inject_hyperparams(fo.adamw),
        {**LR, **ADAM},
        ({}, {"learning_rate": decay_schedule}),
    ),
    Row(
        "keep_error_bits",
        lambda learning_rate, bits=16: fo.keep_error_bits(
            fo.adamw(learning_rate, weight_decay=0.1), bits
        ),
        LR,
        ({}, {"bits": 8}),
        written=False,
    ),
    Row(
        "keep_master_weights",
        lambda learning_rate: fo.keep_master_weights(
            fo.adamw(learning_rate, weight_decay=0.1)
        ),
        LR,
        written=False,
    ),
    Row("keep_params_nonnegative", fo.keep_params_nonnegative),
    Row("largest", distance_over_gradients, {"first_distance": 0.01}, written=False),
    Row(
        "masked",
        lambda step_size, **v: fo.masked(
            fo.chain(fo.trace(0.9), fo.scale(step_size)),
            **{"mask": lambda path, p: p.ndim > 0, **v},
        ),
        {"step_size": -0.3},
        ({}, {"otherwise": "zero"}),
        reads_shape=True,
        written=False,
    ),
    Row(
        "normalize_by_update_norm",
        fo.normalize_by_update_norm,
        {"scale_factor": -0.5, "eps": 0.1},
    ),
    Row("normalize", fo.normalize),
    Row(
        "params_ema",
        fo.params_ema,
        {"decay": 0.9},
        (
            {},
            {"debias": False},
            {"decay": lambda count: 1 - 1 / (count.double() + 1), "debias": False},
        ),
    ),
    Row(
        "partition",
        lambda learning_rate: fo.partition(
            {
                "matrix": fo.chain(fo.clip_by_global_norm(0.5), fo.adam(learning_rate)),
                "rest": fo.sgd(0.2),
            },
            lambda path, p: "matrix" if p.ndim > 1 else "rest",
        ),
        LR,
        reads_shape=True,
        written=False,
    ),
    Row(
        "reduce_on_plateau",
        lambda **options: on_a_bowl(fo.reduce_on_plateau(**options)),
        {"factor": 0.5, "rtol": 0.1, "atol": 0.1, "min_scale": 0.1},
        (
            {"patience": 1},
            {"patience": 1, "cooldown": 1, "accumulation_size": 2},
        ),
        written=False,
        apart=True,
    ),
    Row(
        "qk_clip",
        lambda **options: with_logits(
            fo.qk_clip(**{"powers": {"*/w": 0.5, "conv/*": 1.0, "c*nv": 1.0}, **options})
        ),
        {"threshold": 50.0},
        ({}, {"powers": {"conv/*": 0.7}}),
        reads_shape=True,
        written=False,
        apart=True,
    ),
    Row("scale_by_param_size", fo.scale_by_param_size, {"eta": 0.1}),
    Row("scale", fo.scale, {"step_size": -0.3}),
    Row(
        "scale_to_usual_norm", fo.scale_to_usual_norm, {"b1": 0.7, "b2": 0.8, "eps": 0.1}
    ),
    Row(
        "stored",
        lambda learning_rate, b2, codes="8bit": fo.stored(
            fo.adamw(learning_rate, b2=b2, weight_decay=0.1),
            codes,
            where=everywhere,
        ),
        {"learning_rate": 0.1, "b2": 0.9},
        ({}, {"codes": "bfloat16"}, {"codes": {"nu": "8bit"}}),
        smooth=False,
        reads_shape=True,
        written=False,
    ),
    Row(
        "zclip",
        fo.zclip,
        {"decay": 0.9, "threshold": 0.2, "eps": 0.1},
        ({"warmup_steps": 2}, {"warmup_steps": 3}, {}),
    ),
    Row(
        "scale_by_acprop",
        fo.scale_by_acprop,
        {**ADAM, "eps_root": 1e-3},
        ({}, {"eps_root": 0.0}),
    ),
    Row("scale_by_adadelta", fo.scale_by_adadelta, {"rho": 0.9, "eps": 1e-3}),
    Row(
        "scale_by_adam",
        fo.scale_by_adam,
        ADAM,
        (
            {},
            {"nesterov": True},
            {"amsgrad": True},
            {"amsgrad": "torch"},
            {"eps_root": 1e-3},
        ),
    ),
    Row(
        "scale_by_adam_mini",
        fo.scale_by_adam_mini,
        ADAM,
        ({}, {"blocks": each_kind_of_block, "head_dim": 2}),
        reads_shape=True,
    ),
    Row("scale_by_adamax", fo.scale_by_adamax, ADAM),
    Row("scale_by_came", fo.scale_by_came, CAME, reads_shape=True),
    Row("scale_by_focus", fo.scale_by_focus, FOCUS, smooth=False),
    Row(
        "scale_by_stable_spam",
        fo.scale_by_stable_spam,
        {**ADAM, **SPAM},
        ({}, {"reset_period": 2}, {"reset_period": 0, "b1": decay_schedule}),
    ),
    Row("scale_by_adan", fo.scale_by_adan, ADAN, ({}, {"eps_root": 0.0})),
    Row(
        "scale_by_ademamix",
        fo.scale_by_ademamix,
        ADEMAMIX,
        ({}, {"eps_root": 0.0, "alpha": decay_schedule}),
    ),
    Row(
        "scale_by_adopt",
        fo.scale_by_adopt,
        {"b1": 0.9, "b2": 0.99, "eps": 0.3},
        (
            {},
            {"nesterov": True},
            {"use_clipping": False},
            {"clip_value_fn": lambda count: 0.5 * count},
        ),
    ),
    Row(
        "scale_by_backtracking_linesearch",
        lambda **options: on_a_bowl(
            fo.chain(fo.scale(-1.0), fo.scale_by_backtracking_linesearch(5, **options))
        ),
        {"decrease_factor": 0.7, "max_learning_rate": 3.0, "slope_rtol": 0.3},
        ({}, {"store_grad": True}, {"increase_factor": float("inf")}),
        unrolls=True,
        written=False,
        apart=True,
    ),
    Row(
        "scale_by_amsgrad",
        fo.scale_by_amsgrad,
        {**ADAM, "eps_root": 1e-3},
        ({}, {"bias_correction_mu": False}, {"bias_correction_nu": False}),
    ),
    Row(
        "scale_by_belief",
        fo.scale_by_belief,
        {**ADAM, "eps_root": 1e-3},
        ({}, {"eps_root": 0.0}, {"nesterov": True}),
    ),
    Row(
        "scale_by_laprop",
        fo.scale_by_laprop,
        {**ADAM, "eps_root": 1e-3},
        ({}, {"eps_root": 0.0}),
    ),
    Row("scale_by_grams", fo.scale_by_grams, ADAM, smooth=False),
    Row(
        "scale_by_lbfgs",
        fo.scale_by_lbfgs,
        {},
        ({}, {"memory_size": 2}, {"scale_init_precond": False}),
        slots_rest=False,
        apart=True,
    ),
    Row(
        "scale_by_learning_rate",
        fo.scale_by_learning_rate,
        LR,
        ({}, {"flip_sign": False}, {"learning_rate": decay_schedule}),
    ),
    Row("scale_by_cocob", fo.scale_by_cocob, {"alpha": 2.0, "eps": 0.1}),
    Row(
        "scale_by_distance_over_gradients",
        fo.scale_by_distance_over_gradients,
        {"reps_rel": 0.1, "eps": 0.1, "global_scale": -0.5},
    ),
    Row(
        "scale_by_dog",
        fo.scale_by_dog,
        {"eps": 0.1},
        (
            {"init_step": ("heuristic", 0.1)},
            {"init_step": ("distance", 0.2)},
            {"init_step": ("learning_rate", 0.3)},
        ),
    ),
    Row(
        "scale_by_dowg",
        fo.scale_by_dowg,
        {"init_estim_sq_dist": 0.04, "eps": 0.1},
        ({}, {"init_estim_sq_dist": None}),
    ),
    Row(
        "scale_by_factored_rms",
        fo.scale_by_factored_rms,
        {"decay_rate": 0.8},
        (
            {"min_dim_size_to_factor": 2, "epsilon": 1e-3},
            {"factored": False, "epsilon": 1e-3},
            {"variant": "torch"},
        ),
        reads_shape=True,
    ),
    Row(
        "scale_by_lion",
        fo.scale_by_lion,
        {"b1": 0.9, "b2": 0.99, "smooth_beta": 0.7},
        ({}, {"mode": "smooth"}, {"mode": "refined"}),
        smooth=False,
    ),
    Row(
        "scale_by_madgrad",
        fo.scale_by_madgrad,
        {**LR, "momentum": 0.9, "eps": 1e-3},
        ({}, {"learning_rate": decay_schedule}),
    ),
    Row("scale_by_mars", fo.scale_by_mars, {"b1": 0.9, "gamma": 0.05}),
    *[
        Row(
            name,
            on_its_matrices(make),
            {**ADAM, "scale": 0.5},
            ({"rank": 1, "update_proj_gap": 2}, {"rank": 2, **other}),
            smooth=False,
            slope_at_zero=False,
            keyed=name == "scale_by_apollo",
            reads_shape=True,
            written=False,
        )
        for name, make, other in (
            ("scale_by_galore", fo.scale_by_galore, {"dims": LAST_IS_ROWS}),
            ("scale_by_fira", fo.scale_by_fira, {"dims": LAST_IS_ROWS}),
            ("scale_by_apollo", fo.scale_by_apollo, {"scaling": "tensor"}),
        )
    ],
    Row(
        "scale_by_muon",
        on_its_matrices(fo.scale_by_muon),
        {"beta": 0.9},
        (
            {},
            {"nesterov": False, "consistent_rms": 0.2},
            {"ns_coeffs": "gram", "scaling": "rms_to_rms"},
            {"ns_coeffs": ((2.0, -1.5, 0.5), (3.0, -3.2, 1.2))},
        ),
        reads_shape=True,
        written=False,
    ),
    Row(
        "scale_by_nadam",
        fo.scale_by_nadam,
        {**ADAM, "momentum_decay": 4e-3},
        ({}, {"eps_root": 1e-3, "momentum_decay": 0.1}),
    ),
    Row("scale_by_novograd", fo.scale_by_novograd, NOVOGRAD, ({}, {"eps_root": 0.0})),
    Row(
        "scale_by_optimistic_gradient",
        fo.scale_by_optimistic_gradient,
        {"alpha": 0.7, "beta": 0.5},
        ({}, {"beta": decay_schedule}),
    ),
    Row("scale_by_param_block_norm", fo.scale_by_param_block_norm, {"min_scale": 3.0}),
    Row("scale_by_param_block_rms", fo.scale_by_param_block_rms, {"min_scale": 0.5}),
    Row(
        "scale_by_polyak",
        lambda **options: on_a_bowl(fo.scale_by_polyak(**options)),
        {"f_min": 0.1, "max_learning_rate": 1.0, "eps": 0.1},
        ({}, {"variant": "sps+"}),
        written=False,
        apart=True,
    ),
    Row(
        "scale_by_radam",
        fo.scale_by_radam,
        {"b1": 0.9, "b2": 0.99, "eps": 1e-3},
        (
            {},
            {"threshold": 4.0, "eps_root": 1e-3},
            {"threshold": 4.0, "nesterov": True},
            {"threshold": 4.0, "variant": "torch"},
        ),
    ),
    Row(
        "scale_by_rms",
        fo.scale_by_rms,
        {"decay": 0.9, "eps": 1e-3},
        ({}, {"eps_in_sqrt": False}, {"bias_correction": True}, {"initial_scale": 0.5}),
    ),
    Row("scale_by_rprop", fo.scale_by_rprop, RPROP, smooth=False),
    Row(
        "scale_by_rss",
        fo.scale_by_rss,
        {"eps": 1e-3},
        ({}, {"initial_accumulator_value": 0.0}, {"eps_in_sqrt": False}),
    ),
    Row(
        "scale_by_trust_ratio",
        fo.scale_by_trust_ratio,
        {"min_norm": 0.5, "trust_coefficient": 0.7, "eps": 1e-3},
        ({}, {"min_norm": 0.0, "eps": 0.0}),
    ),
    Row(
        "scale_by_norm_floor",
        fo.scale_by_norm_floor,
        {"floor": 0.8},
        ({}, {"rows": True}),
        reads_shape=True,
    ),
    Row("scale_by_schedule", lambda: fo.scale_by_schedule(decay_schedule), written=False),
    Row(
        "scale_by_simplified_ademamix",
        fo.scale_by_simplified_ademamix,
        {**ADAM, "alpha": 2.0, "eps_root": 1e-3},
        ({}, {"eps_root": 0.0, "alpha": decay_schedule}),
    ),
    Row(
        "scale_by_sm3",
        fo.scale_by_sm3,
        {"b1": 0.9, "b2": 0.95, "eps": 1e-3},
        ({}, {"b2": 1.0, "eps": 1e-8}),
        reads_shape=True,
    ),
    Row(
        "scale_by_sophia",
        lambda **options: on_a_bowl(fo.scale_by_sophia(**options)),
        {"b1": 0.9, "b2": 0.8, "eps": 0.1, "gamma": 0.5},
        ({"update_interval": 2}, {"clip_threshold": None, "update_interval": 1}),
        keyed=True,
        shards=False,
        written=False,
        apart=True,
    ),
    Row(
        "scale_by_stable_adamw",
        fo.scale_by_stable_adamw,
        {**ADAM, "weight_decay": 0.1},
        ({}, {"b2": 0.3}),
    ),
    Row(
        "scale_by_stddev",
        fo.scale_by_stddev,
        {"decay": 0.9, "eps": 1e-3},
        ({}, {"eps_in_sqrt": False}, {"bias_correction": True}),
    ),
    Row(
        "scale_by_yogi",
        fo.scale_by_yogi,
        {**ADAM, "eps_root": 1e-3, "initial_accumulator_value": 0.1},
        ({}, {"eps_root": 0.0}),
    ),
    Row(
        "scale_by_zoom_linesearch",
        lambda **options: on_a_bowl(
            fo.chain(fo.scale(-1.0), fo.scale_by_zoom_linesearch(5, **options))
        ),
        {"increase_factor": 2.0, "slope_rtol": 0.1, "curv_rtol": 0.2},
        (
            {},
            {"initial_guess_strategy": "one"},
            {"max_learning_rate": 0.3},
            {"approx_dec_rtol": None},
        ),
        unrolls=True,
        written=False,
        apart=True,
    ),
    Row(
        "scale_by_adamuon",
        on_its_matrices(fo.scale_by_adamuon),
        {"beta": 0.9, "eps": 1e-3},
        ({}, {"nesterov": False}),
        smooth=False,
        reads_shape=True,
        written=False,
    ),
    Row(
        "scale_by_dion",
        on_its_matrices(fo.scale_by_dion),
        {"beta": 0.9, "eps": 1e-3},
        ({}, {"rank": 1}),
        slope_at_zero=False,
        reads_shape=True,
        written=False,
    ),
    Row(
        "scale_by_mano",
        on_its_matrices(fo.scale_by_mano),
        {"beta": 0.9, "eps": 0.5},
        ({}, {"nesterov": True, "dims": fo.MatrixDims(-1, 0)}),
        reads_shape=True,
        written=False,
    ),
    Row(
        "scale_by_normuon",
        on_its_matrices(fo.scale_by_normuon),
        {"beta": 0.9, "b2": 0.8, "eps": 1e-3},
        ({}, {"nesterov": False, "axis": "short"}, {"dims": fo.MatrixDims(-1, 0)}),
        reads_shape=True,
        written=False,
    ),
    Row(
        "scale_by_scion",
        on_its_matrices(fo.scale_by_scion),
        {"b1": 0.9, "radius": 3.0},
        ({}, {"norm": "rms"}, {"norm": "column"}, {"norm": "row"}),
        reads_shape=True,
        written=False,
    ),
    Row("hyperball", fo.hyperball, LR),
    Row(
        "scale_by_soap",
        fo.scale_by_soap,
        {"b1": 0.9, "b2": 0.8, "eps": 1e-3},
        (
            {"frequency": 1},
            {"vectors": True, "blocks": True, "max_size": 2},
            {"merged": 3},
        ),
        smooth=False,
        slope_at_zero=False,
        reads_shape=True,
    ),
    Row(
        "scale_by_shampoo",
        fo.scale_by_shampoo,
        {"b1": 0.9, "b2": 0.8, "eps": 1e-2, "graft_b2": 0.9, "graft_eps": 1e-3},
        (
            {},
            {"frequency": 2, "grafting": "none", "max_size": 2},
            {"b2": 1.0, "grafting": "adagrad", "merged": 6},
        ),
        smooth=False,
        slope_at_zero=False,
        reads_shape=True,
    ),
    Row(
        "scale_by_kl_shampoo",
        fo.scale_by_kl_shampoo,
        {"b1": 0.9, "b2": 0.8, "eps": 1e-3},
        ({"frequency": 1}, {"blocks": True, "max_size": 2}),
        smooth=False,
        slope_at_zero=False,
        reads_shape=True,
    ),
    Row(
        "scale_by_kl_soap",
        fo.scale_by_kl_soap,
        {"b1": 0.9, "b2": 0.8, "eps": 1e-3},
        ({"frequency": 1}, {"max_size": 2, "init": 2.0}),
        smooth=False,
        slope_at_zero=False,
        reads_shape=True,
    ),
    Row(
        "scale_by_splus",
        fo.scale_by_splus,
        {"b1": 0.9, "b2": 0.8, "eps": 1e-3, "scale": 0.1},
        ({"frequency": 2}, {"max_size": 2}),
        smooth=False,
        slope_at_zero=False,
        reads_shape=True,
    ),
    Row(
        "scale_by_psgd_kron",
        fo.scale_by_psgd_kron,
        {"b1": 0.9, "precond_lr": 0.1},
        (
            {},
            {"probability": 0.5, "diagonals": "all"},
            {"max_size": 2, "balance_probability": 0.9},
        ),
        smooth=False,
        keyed=True,
        reads_shape=True,
    ),
    Row("set_to_zero", fo.set_to_zero),
    Row("scale_by_sign", fo.scale_by_sign, smooth=False),
    Row(
        "stateless",
        lambda: fo.stateless(
            lambda updates, params: fo.tree.map(lambda u: 2 * u, updates)
        ),
        passes_none=False,
        written=False,
        apart=True,
    ),
    Row(
        "stateless_with_tree_map",
        lambda: fo.stateless_with_tree_map(lambda u, p: 2 * u + 0.1 * p),
        written=False,
        apart=True,
    ),
    Row("stochastic_round", fo.stochastic_round, keyed=True, rounds=True),
    Row("trace", fo.trace, {"decay": 0.9}, ({}, {"nesterov": True}, {"dampening": 0.5})),
    Row(
        "with_extra_args_support",
        lambda learning_rate: fo.with_extra_args_support(fo.adam(learning_rate)),
        LR,
        written=False,
    ),
    Row("wrap", with_a_heavy_ball, {**LR, "decay": 0.5}, written=False),
    Row("zero_nans", fo.zero_nans),
    # wrappers
    Row(
        "MultiSteps",
        lambda learning_rate, **options: fo.MultiSteps(
            fo.adam(learning_rate), **{"every_k_schedule": 2, **options}
        ),
        LR,
        (
            {},
            {"use_grad_mean": False},
            {"every_k_schedule": 1},
            {"every_k_schedule": one_then_two},
            {"flushes": True, "should_skip_update_fn": skip_above_20},
            {"should_skip_update_fn": skip_above_20},
        ),
        written=False,
    ),
    Row("apply_every", lambda: fo.apply_every(2), written=False),
    Row(
        "conditionally_mask",
        lambda learning_rate: fo.conditionally_mask(fo.adam(learning_rate), at_odd),
        LR,
        written=False,
    ),
    Row(
        "conditionally_transform",
        lambda learning_rate: fo.conditionally_transform(fo.adam(learning_rate), at_odd),
        LR,
        written=False,
    ),
    Row("freeze", lambda: fo.freeze(matrices), reads_shape=True, written=False),
    Row(
        "selective_transform",
        lambda learning_rate: fo.selective_transform(
            fo.adam(learning_rate), freeze_mask=matrices
        ),
        LR,
        reads_shape=True,
        written=False,
    ),
    Row(
        "named_chain",
        lambda learning_rate: fo.named_chain(
            ("first", fo.trace(0.9)), ("second", fo.adam(learning_rate))
        ),
        LR,
        written=False,
    ),
    Row("snapshot", lambda: fo.snapshot("norm", fo.tree.norm), written=False),
    Row(
        "monitor",
        lambda **options: fo.monitor(
            {
                "norm": fo.tree.norm,
                "mean_norm": fo.measure_with_ema(fo.tree.norm, 0.9),
                "biased": fo.measure_with_ema(fo.tree.norm, 0.5, debias=False),
            },
            **options,
        ),
        variants=({}, {"layers": LAYERS}, {"layers": LAYERS, "every": 2}),
        written=False,
    ),
    Row(
        "apply_if_finite",
        lambda learning_rate, **options: fo.apply_if_finite(
            fo.adam(learning_rate), **{"max_consecutive_errors": 2, **options}
        ),
        LR,
        ({}, {"max_consecutive_errors": 0}),
        written=False,
    ),
    Row(
        "cautious",
        lambda learning_rate, **options: fo.cautious(
            fo.sgd(learning_rate, momentum=0.9), **options
        ),
        LR,
        ({}, {"flip_sign": False}),
        written=False,
    ),
    Row(
        "gradient_signs",
        lambda learning_rate, **options: fo.gradient_signs(
            fo.sgd(learning_rate, momentum=0.9), **options
        ),
        LR,
        ({}, {"flip_sign": False}),
        smooth=False,
        written=False,
    ),
    Row(
        "lookahead",
        lambda learning_rate, **options: fo.lookahead(
            fo.adam(learning_rate), 2, **{"slow_step_size": 0.5, **options}
        ),
        {**LR, "slow_step_size": 0.5},
        ({}, {"slow_step_size": decay_schedule}),
        written=False,
    ),
    Row(
        "mechanize",
        lambda learning_rate, **options: fo.mechanize(fo.adam(learning_rate), **options),
        {**LR, "weight_decay": 0.1, "eps": 1e-3, "s_init": 0.1},
        ({}, {"num_betas": 2}),
        written=False,
        apart=True,
    ),
    Row(
        "sam",
        lambda learning_rate, adv=ASCENT, **options: fo.sam(
            fo.adam(learning_rate), adv, **options
        ),
        LR,
        ({}, {"sync_period": 3}, {"sync_period": 1}),
        written=False,
    ),
    Row(
        "asam",
        lambda learning_rate, **options: fo.asam(fo.adam(learning_rate), **options),
        {**LR, "rho": 0.3, "eta": 0.1},
        ({}, {"sync_period": 3}, {"mask": matrices}),
        written=False,
    ),
    Row(
        "project_gradients",
        on_its_matrices(
            lambda b1, **options: fo.project_gradients(
                fo.scale_by_adam(b1, eps=1e-3), **options
            )
        ),
        {"b1": 0.9, "scale": 0.5},
        (
            {"rank": 1, "update_proj_gap": 2},
            {"rank": 2, "dims": LAST_IS_ROWS},
            {"rank": 1, "update_proj_gap": 2, "kind": "fira"},
            {"rank": 1, "update_proj_gap": 2, "kind": "apollo", "key": 3},
        ),
        smooth=False,
        slope_at_zero=False,
        reads_shape=True,
        shards=False,
        written=False,
        apart=True,
    ),
    Row(
        "outer_loop",
        lambda learning_rate, **options: fo.outer_loop(
            fo.adam(learning_rate), **{"outer": NESTEROV, "sync_period": 2, **options}
        ),
        LR,
        ({}, {"sync_period": 1}, {"sync_period": 3, "outer": fo.adam(decay_schedule)}),
        written=False,
    ),
    Row(
        "ema_nesterov",
        lambda learning_rate, **options: fo.ema_nesterov(
            fo.adam(learning_rate), **options
        ),
        {**LR, "beta": 0.3, "decay": 0.8},
        ({}, {"beta": decay_schedule}),
        written=False,
    ),
    Row(
        "flatten",
        lambda threshold: fo.flatten(fo.clip_by_block_rms(threshold)),
        {"threshold": 0.5},
        reads_shape=True,
        slots_rest=False,
        shards=False,
        written=False,
        apart=True,
    ),
    Row(
        "with_owners",
        lambda learning_rate: fo.with_owners(fo.adam(learning_rate)),
        LR,
        written=False,
        apart=True,
    ),
    Row(
        "split_real_and_imaginary",
        lambda threshold: fo.split_real_and_imaginary(fo.clip_by_block_rms(threshold)),
        {"threshold": 0.5},
        reads_shape=True,
        shards=False,
        written=False,
        apart=True,
    ),
    Row(
        "schedule_free",
        lambda learning_rate, **options: fo.schedule_free(
            fo.sgd(learning_rate), learning_rate, **options
        ),
        {**LR, "b1": 0.8, "weight_lr_power": 1.5},
        ({}, {"warmup_steps": 2, "r": 0.5}),
        written=False,
    ),
    # optimizers
    Row(
        "adabelief",
        fo.adabelief,
        {**LR, **ADAM},
        ({}, {"weight_decay": 0.1, "weight_decay_mask": kernels}, {"nesterov": True}),
    ),
    Row(
        "acprop",
        fo.acprop,
        {**LR, **ADAM, "eps_root": 1e-3, "weight_decay": 0.1},
        ({}, {"mask": matrices}),
    ),
    Row(
        "adafactor",
        fo.adafactor,
        {**LR, "decay_rate": 0.8, "clipping_threshold": 0.7},
        (
            {"min_dim_size_to_factor": 2, "eps": 1e-3},
            {"momentum": 0.9, "dtype_momentum": None, "eps": 1e-3},
            {
                "clipping_threshold": None,
                "multiply_by_parameter_scale": False,
                "eps": 1e-3,
            },
        ),
        reads_shape=True,
    ),
    Row(
        "adadelta", fo.adadelta, {"learning_rate": 1.0, "eps": 1e-3, "weight_decay": 0.1}
    ),
    Row("adagrad", fo.adagrad, {**LR, "eps": 1e-3}),
    Row("adam", fo.adam, {**LR, **ADAM}, ({}, {"learning_rate": decay_schedule})),
    Row(
        "adam_mini",
        fo.adam_mini,
        {**LR, **ADAM, "weight_decay": 0.1},
        ({}, {"blocks": each_kind_of_block, "head_dim": 2}, {"mask": matrices}),
        reads_shape=True,
    ),
    Row(
        "adamc",
        fo.adamc,
        {**LR, **ADAM, "weight_decay": 0.1},
        (
            {},
            {"learning_rate": decay_schedule},
            {"max_learning_rate": 0.5, "mask": matrices},
        ),
    ),
    Row("adamax", fo.adamax, {**LR, **ADAM}),
    Row(
        "adamaxw",
        fo.adamaxw,
        {**LR, **ADAM, "weight_decay": 0.1},
        ({}, {"mask": matrices}),
    ),
    Row(
        "adamw",
        fo.adamw,
        {**LR, **ADAM, "weight_decay": 0.1},
        ({}, {"mask": lambda path, p: p.ndim > 1}),
    ),
    Row("adan", fo.adan, {**LR, **ADAN, "weight_decay": 0.1}, ({}, {"mask": matrices})),
    Row(
        "ademamix",
        fo.ademamix,
        {**LR, **ADEMAMIX, "weight_decay": 0.1},
        ({}, {"mask": matrices}),
    ),
    Row("adopt", fo.adopt, {**LR, "b1": 0.9, "b2": 0.99, "eps": 0.3}),
    Row(
        "amsgrad",
        fo.amsgrad,
        {**LR, **ADAM},
        ({}, {"bias_correction_mu": False, "bias_correction_nu": False}),
    ),
    Row(
        "asgd", fo.asgd, {**LR, "lambd": 0.1, "alpha": 0.75, "t0": 0.5}, ({}, {"t0": 1e6})
    ),
    Row(
        "came",
        fo.came,
        {**LR, **CAME, "weight_decay": 0.1},
        ({}, {"mask": matrices}),
        reads_shape=True,
    ),
    Row(
        "cocob",
        fo.cocob,
        {"learning_rate": 0.5, "alpha": 2.0, "eps": 0.1, "weight_decay": 0.1},
        ({}, {"mask": matrices}),
    ),
    Row(
        "dadapt_adamw",
        fo.dadapt_adamw,
        {"learning_rate": 0.5, "eps": 0.1, "estim_lr0": 0.1, "weight_decay": 0.1},
        ({}, {"betas": (0.5, 0.9)}),
    ),
    Row(
        "dog",
        fo.dog,
        {**LR, "eps": 0.1, "weight_decay": 0.1},
        ({"init_step": ("distance", 0.2)}, {"mask": matrices}),
    ),
    Row(
        "dowg",
        fo.dowg,
        {**LR, "init_estim_sq_dist": 0.04, "eps": 0.1, "weight_decay": 0.1},
        ({}, {"mask": matrices}),
    ),
    Row("focus", fo.focus, {**LR, **FOCUS}, smooth=False),
    Row("fromage", fo.fromage, {**LR, "min_norm": 0.5}, ({}, {"min_norm": 0.0})),
    Row(
        "grams",
        fo.grams,
        {**LR, **ADAM, "weight_decay": 0.1},
        ({}, {"mask": matrices}),
        smooth=False,
    ),
    Row(
        "lbfgs",
        lambda **options: on_a_bowl(fo.lbfgs(**options)),
        variants=({}, {"linesearch": None, **LR}),
        slots_rest=False,
        unrolls=True,
        written=False,
        apart=True,
    ),
    Row(
        "lamb",
        fo.lamb,
        {**LR, **ADAM, "weight_decay": 0.1},
        ({}, {"mask": lambda path, p: p.ndim > 1}),
    ),
    Row(
        "laprop",
        fo.laprop,
        {**LR, **ADAM, "weight_decay": 0.1},
        ({}, {"mask": matrices}),
    ),
    Row(
        "lars",
        fo.lars,
        {
            **LR,
            "weight_decay": 0.1,
            "trust_coefficient": 0.5,
            "eps": 1e-3,
            "momentum": 0.9,
        },
        (
            {},
            {"nesterov": True},
            {"weight_decay_mask": matrices, "trust_ratio_mask": matrices},
        ),
        reads_shape=True,
    ),
    Row(
        "dp_adam",
        lambda **given: of_three_examples(fo.dp_adam(**given)),
        {**LR, **DP, **ADAM},
        keyed=True,
        written=False,
        apart=True,
    ),
    Row(
        "dpsgd",
        lambda **given: of_three_examples(fo.dpsgd(**given)),
        {**LR, **DP},
        ({}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}),
        keyed=True,
        written=False,
        apart=True,
    ),
    Row("lion", fo.lion, {**LR, "weight_decay": 0.1}, smooth=False),
    Row("madgrad", fo.madgrad, {**LR, "weight_decay": 0.1, "eps": 1e-3}),
    Row(
        "mars_adamw",
        fo.mars_adamw,
        {**LR, **ADAM, "weight_decay": 0.1, "gamma": 0.05},
        ({}, {"mask": matrices}),
    ),
    Row(
        "momo",
        lambda **options: on_a_bowl(fo.momo(**options)),
        {**LR, "beta": 0.9, "lower_bound": 0.5, "weight_decay": 0.1},
        ({}, {"adapt_lower_bound": True}, {"learning_rate": 100.0}),
        written=False,
        apart=True,
    ),
    Row(
        "momo_adam",
        lambda **options: on_a_bowl(fo.momo_adam(**options)),
        {**LR, **ADAM, "lower_bound": 0.5, "weight_decay": 0.1},
        ({}, {"adapt_lower_bound": True}, {"learning_rate": 100.0}),
        written=False,
        apart=True,
    ),
    Row(
        "muon",
        fo.muon,
        {**LR, "beta": 0.9, "weight_decay": 0.1},
        (
            {},
            {
                "nesterov": False,
                "weight_decay_mask": matrices,
                "adam_learning_rate": 0.01,
            },
            {"preconditioning": "schatten", "adaptive": True},
            {"preconditioning": "aol"},
        ),
        reads_shape=True,
    ),
    Row(
        "muon_with_adamw",
        fo.muon_with_adamw,
        {**LR, "adamw_learning_rate": 0.01, **ADAM, "weight_decay": 0.1, "beta": 0.9},
        (
            {"ns_coeffs": "polar_express"},
            {"dims": {"conv/w": fo.MatrixDims(-1, 1)}, "ns_coeffs": "cans"},
        ),
        reads_shape=True,
    ),
    Row("nadam", fo.nadam, {**LR, **ADAM}, ({}, {"momentum_decay": 4e-3})),
    Row(
        "nadamw",
        fo.nadamw,
        {**LR, **ADAM, "weight_decay": 0.1},
        ({}, {"mask": matrices}, {"momentum_decay": 4e-3}),
    ),
    Row("noisy_sgd", fo.noisy_sgd, {**LR, "eta": 0.1}, keyed=True),
    Row("novograd", fo.novograd, {**LR, **NOVOGRAD}),
    Row(
        "optimistic_gradient_descent",
        fo.optimistic_gradient_descent,
        {**LR, "alpha": 0.7, "beta": 0.5},
    ),
    Row(
        "optimistic_adam_v2",
        fo.optimistic_adam_v2,
        {**LR, **ADAM, "alpha": 0.7, "beta": 0.5},
        ({}, {"nesterov": False}),
    ),
    Row(
        "polyak_sgd",
        lambda **options: on_a_bowl(fo.polyak_sgd(**options)),
        {"max_learning_rate": 1.0, "scaling": 0.5},
        written=False,
        apart=True,
    ),
    Row(
        "prodigy",
        fo.prodigy,
        {
            "learning_rate": 0.5,
            "eps": 0.1,
            "estim_lr0": 0.1,
            "estim_lr_coef": 0.8,
            "weight_decay": 0.1,
        },
        (
            {},
            {"use_bias_correction": True, "growth_rate": 1.02},
            {"safeguard_warmup": True, "betas": (0.5, 0.9), "beta3": 0.7},
            {"weight_decay_mask": kernels},
        ),
    ),
    Row("radam", fo.radam, {**LR, **ADAM}, ({}, {"variant": "torch"})),
    Row(
        "rmsprop",
        fo.rmsprop,
        {**LR, "eps": 1e-3},
        ({}, {"centered": True, "momentum": 0.9}, {"momentum": 0.9, "nesterov": True}),
    ),
    Row("rprop", fo.rprop, RPROP, smooth=False),
    Row(
        "schedule_free_adamw",
        fo.schedule_free_adamw,
        {**LR, "b1": 0.8, "b2": 0.99, "eps": 1e-3, "weight_decay": 0.1},
        ({}, {"warmup_steps": 2, "mask": matrices}),
    ),
    Row(
        "schedule_free_sgd",
        fo.schedule_free_sgd,
        {**LR, "b1": 0.8, "weight_decay": 0.1},
        ({}, {"warmup_steps": 2, "mask": matrices}),
    ),
    Row(
        "schedule_free_prodigy",
        fo.schedule_free_prodigy,
        {
            "learning_rate": 0.5,
            "eps": 0.1,
            "estim_lr0": 0.1,
            "estim_lr_coef": 0.8,
            "weight_decay": 0.1,
            "weight_lr_power": 1.5,
        },
        (
            {"betas": (0.8, 0.99)},
            {"safeguard_warmup": True, "beta3": 0.7, "growth_rate": 1.02},
        ),
    ),
    Row(
        "schedule_free_radam",
        fo.schedule_free_radam,
        {**LR, "b1": 0.8, "b2": 0.9, "eps": 1e-3, "weight_decay": 0.1},
        ({}, {"silent_sgd_phase": False, "r": 0.5, "mask": matrices}),
    ),
    Row("sgd", fo.sgd, LR, ({}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True})),
    Row("sgld", fo.sgld, {**LR, "temperature": 0.5}, keyed=True),
    Row("sign_sgd", fo.sign_sgd, LR, smooth=False),
    Row("signum", fo.signum, {**LR, "beta": 0.9}, smooth=False),
    Row(
        "simplified_ademamix",
        fo.simplified_ademamix,
        {**LR, **ADAM, "alpha": 2.0, "weight_decay": 0.1},
        ({}, {"mask": matrices}),
    ),
    Row("sm3", fo.sm3, {**LR, "momentum": 0.9}, reads_shape=True),
    Row(
        "sophia",
        lambda **options: on_a_bowl(fo.sophia(**options)),
        {**LR, "b1": 0.9, "b2": 0.8, "eps": 0.1, "gamma": 0.5, "weight_decay": 0.1},
        ({"update_interval": 2}, {"weight_decay_mask": kernels}),
        keyed=True,
        shards=False,
        written=False,
        apart=True,
    ),
    Row(
        "stable_spam",
        fo.stable_spam,
        {**LR, **ADAM, **SPAM, "weight_decay": 0.1},
        ({}, {"reset_period": 2}, {"mask": matrices}),
    ),
    Row("stable_adamw", fo.stable_adamw, {**LR, **ADAM, "weight_decay": 0.1}),
    Row("yogi", fo.yogi, {**LR, **ADAM}),
    # optimizers of matrices
    Row(
        "psgd_kron",
        fo.psgd_kron,
        {**LR, "b1": 0.9, "weight_decay": 0.1, "precond_lr": 0.1},
        ({}, {"probability": 0.5, "diagonals": "larger", "mask": kernels}),
        smooth=False,
        keyed=True,
        reads_shape=True,
    ),
    *[
        Row(
            name,
            make,
            {**LR, **ADAM, "scale": 0.5, "weight_decay": 0.1},
            (
                {"rank": 1, "update_proj_gap": 2},
                {"rank": 2, "adam_learning_rate": 0.01},
                *others,
            ),
            smooth=False,
            slope_at_zero=False,
            keyed=name == "apollo",
            reads_shape=True,
        )
        for name, make, others in (
            ("galore", fo.galore, ()),
            ("fira", fo.fira, ()),
            ("apollo", fo.apollo, ({"rank": 1, "scaling": "tensor"},)),
        )
    ],
    Row(
        "shampoo",
        fo.shampoo,
        {**LR, "b1": 0.9, "b2": 0.8, "eps": 1e-2, "weight_decay": 0.1, "graft_eps": 1e-3},
        ({"frequency": 2}, {"grafting": "sgd", "mask": matrices}),
        smooth=False,
        slope_at_zero=False,
        reads_shape=True,
    ),
    Row(
        "kl_shampoo",
        fo.kl_shampoo,
        {**LR, "b1": 0.9, "b2": 0.8, "eps": 1e-3, "weight_decay": 0.1},
        ({"frequency": 1}, {"adam_learning_rate": 0.01}),
        smooth=False,
        slope_at_zero=False,
        reads_shape=True,
    ),
    Row(
        "kl_soap",
        fo.kl_soap,
        {**LR, "b1": 0.9, "b2": 0.8, "eps": 1e-3, "weight_decay": 0.1},
        ({"frequency": 1}, {"adam_learning_rate": 0.01}),
        smooth=False,
        slope_at_zero=False,
        reads_shape=True,
    ),
    Row(
        "splus",
        fo.splus,
        {**LR, "b1": 0.9, "b2": 0.8, "weight_decay": 0.1, "ema": 0.9, "scale": 0.1},
        ({"frequency": 2}, {"max_size": 2}),
        lr_is_all=False,
        smooth=False,
        slope_at_zero=False,
        reads_shape=True,
    ),
    Row(
        "soap",
        fo.soap,
        {**LR, "b1": 0.9, "b2": 0.8, "eps": 1e-3, "weight_decay": 0.1},
        ({"frequency": 1}, {"max_size": 2, "bias_correction": False}),
        smooth=False,
        slope_at_zero=False,
        reads_shape=True,
    ),
    Row(
        "adamuon",
        fo.adamuon,
        {**LR, "beta": 0.9, "eps": 1e-3, "weight_decay": 0.1, "adam_eps": 1e-3},
        ({}, {"nesterov": False, "adam_learning_rate": 0.01}),
        smooth=False,
        reads_shape=True,
    ),
    Row(
        "dion",
        fo.dion,
        {**LR, "beta": 0.9, "eps": 1e-3, "weight_decay": 0.1, "adam_eps": 1e-3},
        ({}, {"rank": 1, "adam_learning_rate": 0.01}),
        slope_at_zero=False,
        reads_shape=True,
    ),
    Row(
        "mano",
        fo.mano,
        {**LR, "beta": 0.9, "eps": 0.5, "weight_decay": 0.1, "adam_eps": 1e-3},
        ({}, {"nesterov": True, "adam_learning_rate": 0.01}),
        reads_shape=True,
    ),
    Row(
        "muonh",
        fo.muonh,
        {**LR, "beta": 0.9, "adam_eps": 1e-3},
        ({}, {"nesterov": False, "adam_learning_rate": 0.01}),
        slope_at_zero=False,
        reads_shape=True,
    ),
    Row(
        "normuon",
        fo.normuon,
        {
            **LR,
            "beta": 0.9,
            "b2": 0.8,
            "eps": 1e-3,
            "weight_decay": 0.1,
            "adam_eps": 1e-3,
        },
        ({}, {"axis": "short", "scaling": "spectral", "adam_learning_rate": 0.01}),
        reads_shape=True,
    ),
    Row(
        "scion",
        fo.scion,
        {**LR, "b1": 0.9, "radius": 2.0, "head_radius": 3.0, "vector_radius": 0.5},
        ({}, {"constrained": False, "labels": head_or_vector}),
        reads_shape=True,
    ),
]

NOT_TRANSFORMATIONS = {
    "ArrayTree",
    "ClippedSum",
    "Each",
    "EmptyState",
    "GradientTransformation",
    "GradientTransformationExtraArgs",
    "MaskOrFn",
    "MatrixDims",
    "MatrixLabels",
    "NoiseScale",
    "OptState",
    "Params",
    "Scalar",
    "ScalarOrSchedule",
    "Schedule",
    "StageState",
    "Sweep",
    "TransformInitFn",
    "TransformUpdateExtraArgsFn",
    "TransformUpdateFn",
    "Updates",
    "apply_updates",
    "clip_and_sum",
    "clipped_grad_sum",
    "compiled_step",
    "describe",
    "eval_params",
    "get",
    "large_matrices",
    "recoded",
    "global_norm",
    "gradient_noise_scale",
    "hutchinson_estimator_diag_hessian",
    "incremental_update",
    "init_empty_state",
    "leafwise",
    "load_state_dict",
    "matrix_labels",
    "measure_with_ema",
    "noise_for",
    "noise_scale_of_norms",
    "per_example_global_norm_clip",
    "per_example_grads",
    "per_example_layer_norm_clip",
    "periodic_update",
    "poisson_sample",
    "privacy_spent",
    "psgd_probability",
    "report",
    "report_plot",
    "report_table",
    "routing_table",
    "tree_map_params",
    "scale_gradient",
    "skip_large_updates",
    "skip_not_finite",
    "state_dict",
    "sweep",
    "transformation",
    "value_and_grad_from_state",
}
"""Public names that need no row here (schedules have their own table in `test_schedules.py`)."""
