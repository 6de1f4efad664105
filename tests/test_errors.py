"""Bad input to the functional layer.

Every row is an error, whose message says where it is, what was given, and what to write instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from registry import ROWS, Row
from torch import Tensor, nn, ones

import functorch_opt as fo
from functorch_opt import tree

NAN, INF = float("nan"), float("inf")


class Pair(NamedTuple):
    w: Tensor
    b: Tensor


class Case(NamedTuple):
    """``call()`` returns the bad call as a partial, so that its arguments can be checked
    afterwards.
    """

    id: str
    call: Callable[[], partial]
    error: type[Exception]
    where: str
    given: str
    instead: str


def params(**changed: Any) -> dict:
    return {"enc": {"w": ones(2, 3), "b": ones(3)}, "head": ones(3), **changed}


def without_head(**changed: Any) -> dict:
    return {"enc": {"w": ones(2, 3), "b": ones(3)}, **changed}


def update(
    tx: fo.GradientTransformation,
    updates: Any,
    ps: Any = "same",
    state: Any = None,
    **extra: Any,
) -> partial:
    """One update from a state after one good step; with `ps` None, without params."""
    if state is None:
        needed = {name: 1.0 for name, required in tx.extra_args.items() if required}
        _, state = tx.update(params(), tx.init(params()), params(), **needed)
    return partial(
        tx.update, updates, state, params() if isinstance(ps, str) else ps, **extra
    )


def sparse() -> Tensor:
    return torch.sparse_coo_tensor([[0, 2]], [1.0, 1.0], (3,), check_invariants=True)


def embedding() -> partial:
    layer = nn.Embedding(4, 2, sparse=True)
    layer(torch.tensor([1])).sum().backward()
    tx, ps = fo.adam(0.1), {"emb": layer.weight.detach()}
    return partial(tx.update, {"emb": layer.weight.grad}, tx.init(ps), ps)


def exhausted() -> partial:
    generator = nn.Linear(1, 1).parameters()
    list(generator)
    return partial(fo.adam(0.1).init, generator)


def reads_value() -> fo.GradientTransformation:
    return fo.chain(
        fo.scale(1.0),
        fo.leafwise(
            lambda g, value: g * value, lambda *, value, flag=1: {"value": value}
        ),
    )


def wrong_rule(rule: Any, prepare: Any = None, **kwargs: Any) -> Callable[[], partial]:
    return lambda: partial(fo.leafwise, rule, prepare, **kwargs)


def bad_step(rule: Any, prepare: Any = None, **kwargs: Any) -> Callable[[], partial]:
    def call() -> partial:
        tx = fo.leafwise(rule, prepare, **kwargs)
        return partial(tx.update, params(), tx.init(params()), params())

    return call


def masked(mask: Any, **kwargs: Any) -> fo.GradientTransformation:
    return fo.masked(fo.trace(0.9), mask, **kwargs)


def partition(labels: Any) -> fo.GradientTransformation:
    return fo.partition({"slow": fo.trace(0.9), "fast": fo.scale(1.0)}, labels)


def a_state(*stages: fo.GradientTransformation) -> Any:
    return fo.chain(*stages).init(params())


def saved(**changed: Any) -> dict:
    flat = fo.state_dict(fo.trace(0.9).init(params()))
    return {
        **{path: value for path, value in flat.items() if path not in changed},
        **{p: v for p, v in changed.items() if v is not None},
    }


def loading(state_dict: Any) -> partial:
    return partial(fo.load_state_dict, fo.trace(0.9).init(params()), state_dict)


def hyper(
    factory: Callable,
    name: str,
    given: Any,
    error: type[Exception],
    instead: str,
    **others: Any,
) -> Case:
    """A hyperparameter that the factory itself refuses."""
    return Case(
        f"{factory.__name__}-{name}-{type(given).__name__}-{given if isinstance(given, (int, float, str)) else ''}",
        lambda: partial(factory, **others, **{name: given}),
        error,
        rf"\b{name}\b",
        re.escape(str(given))
        if not isinstance(given, Tensor)
        else re.escape(str(tuple(given.shape))),
        instead,
    )


SAME = "Give both the same structure; write None where a parameter has no gradient"
OWN = "[Uu]se (what|the state that) its own init or update returned"
DENSE = "must be dense and floating or complex .*sparse=False"
PREFIX = "Write one value for each, or one for all"
SLOT = {"mu": torch.zeros_like}
HEAD = "slots/trace/head"

# fmt: off
STRUCTURE = [
    Case("key-missing", lambda: update(fo.adam(0.1), without_head()),
         ValueError, "at 'head'", "updates has nothing", SAME),
    Case("key-extra", lambda: update(fo.adam(0.1), params(tail=ones(2))),
         ValueError, "at 'tail'", "params has nothing", SAME),
    Case("key-missing-stateless", lambda: update(fo.sgd(0.1), without_head()),
         ValueError, "at 'head'", "updates has nothing", SAME),
    Case("list-for-dict", lambda: update(fo.adam(0.1), params(enc=[ones(2, 3), ones(3)])),
         ValueError, "at 'enc'", "updates has list", SAME),
    Case("tuple-for-list", lambda: update(fo.sgd(0.1), (ones(2),), [ones(2)]),
         ValueError, "the root", "tuple .* list", SAME),
    Case("leaf-for-subtree", lambda: update(fo.adam(0.1), params(enc=ones(2))),
         ValueError, "at 'enc'", r"tensor of shape \(2,\)", SAME),
    Case("subtree-for-leaf", lambda: update(fo.adam(0.1), params(head={"x": ones(3)})),
         ValueError, "at 'head'", r"dict of \['x'\]", SAME),
    Case("namedtuple-for-dict", lambda: update(fo.sgd(0.1), params(enc=Pair(ones(2, 3), ones(3)))),
         ValueError, "at 'enc'", "Pair .* dict", SAME),
    Case("dict-for-namedtuple", lambda: update(fo.sgd(0.1), params(), params(enc=Pair(ones(2, 3), ones(3)))),
         ValueError, "at 'enc'", "dict .* Pair", SAME),
    Case("no-updates", lambda: update(fo.adam(0.1), None), ValueError, "at the root", "updates has None", SAME),
    Case("masked-key-missing", lambda: update(masked(lambda path, p: True), without_head()),
         ValueError, "at 'head'", "updates has nothing", SAME),
    Case("partition-key-extra", lambda: update(partition(lambda path, p: "slow"), params(x=ones(1))),
         ValueError, "at 'x'", "params has nothing", SAME),
    Case("without-params-the-state-tells", lambda: update(fo.trace(0.9), without_head(), None),
         ValueError, "at 'head'", "updates has nothing", SAME),
    Case("number-for-gradient", lambda: update(fo.adam(0.1), params(head=1.0)),
         TypeError, "'head'", "updates holds float 1.0", "must be a tensor or None"),
    Case("number-for-gradient-global-norm", lambda: update(fo.clip_by_global_norm(1.0), params(head=1.0)),
         TypeError, "'head'", "float 1.0", "must be a tensor"),
    Case("number-for-gradient-masked-out", lambda: update(masked(False), params(head=1.0)),
         TypeError, "'head'", "float 1.0", "must be a tensor"),
    Case("number-for-param", lambda: update(fo.adam(0.1), params(), params(head=1.0)),
         TypeError, "'head'", "params holds float 1.0", "must be a tensor"),
    Case("gradient-of-no-param", lambda: update(fo.sgd(0.1), params(), params(head=None)),
         ValueError, "'head'", "params has None", "Give None for the update"),
    Case("gradient-of-no-slot", lambda: update(fo.trace(0.9), params(), state=fo.trace(0.9).init(params(head=None))),
         ValueError, "'head'", "the state has None", "init with this parameter"),
    Case("init-number", lambda: partial(fo.adam(0.1).init, params(head=1.0)),
         TypeError, "'head'", "params holds float 1.0", "must be a tensor or None"),
    Case("init-array", lambda: partial(fo.adam(0.1).init, {"w": ones(2).numpy()}),
         TypeError, "'w'", "ndarray", "must be a tensor or None"),
    Case("init-empty", lambda: partial(fo.adam(0.1).init, {}),
         ValueError, "params", "holds no tensor", "generator .* used up"),
    Case("init-none", lambda: partial(fo.adam(0.1).init, {"w": None}),
         ValueError, "params", "holds no tensor", "nothing to optimize"),
    Case("init-generator-used-up", exhausted,
         TypeError, "params", "generator", r"dict\(model.named_parameters\(\)\) or a list"),
    Case("init-module", lambda: partial(fo.adam(0.1).init, nn.Linear(1, 1)),
         TypeError, "params", "Linear", r"dict\(model.named_parameters\(\)\)"),
]
# fmt: on

# fmt: off
SHAPES_AND_DTYPES = [
    Case("shape", lambda: update(fo.adam(0.1), params(head=ones(1))),
         ValueError, "'head'", r"\(1,\) and its parameter \(3,\)", "nothing is broadcast"),
    Case("shape-0-dim", lambda: update(fo.sgd(0.1), params(head=ones(()))),
         ValueError, "'head'", r"\(\) and its parameter \(3,\)", "must be equal"),
    Case("shape-more-dims", lambda: update(fo.adamw(0.1), params(head=ones(2, 3))),
         ValueError, "'head'", r"\(2, 3\) .*\(3,\)", "must be equal"),
    Case("shape-global-norm", lambda: update(fo.clip_by_global_norm(1.0), params(head=ones(1))),
         ValueError, "'head'", r"\(1,\)", "must be equal"),
    Case("shape-noise", lambda: update(fo.add_noise(0.1, 0.0, 0), params(head=ones(1))),
         ValueError, "'head'", r"\(1,\)", "must be equal"),
    Case("shape-of-state-smaller", lambda: update(fo.trace(0.9), params(head=ones(2, 3)), None),
         ValueError, "'head'", r"\(2, 3\)", "state that of other params"),
    Case("shape-of-state-larger", lambda: update(fo.trace(0.9), params(head=ones(1)), None),
         ValueError, "'head'", r"\(1,\).*\(3,\)", "state that of other params"),
    Case("shape-of-state-clash", lambda: update(fo.trace(0.9), params(head=ones(2)), None),
         ValueError, "'head'", r"\(2,\).*\(3,\)", "state that of other params"),
    Case("int-params", lambda: partial(fo.adam(0.1).init, params(head=torch.arange(3))),
         TypeError, "'head'", "torch.int64", "Leave it out with masked or partition"),
    Case("int-gradient", lambda: update(fo.sgd(0.1), params(head=torch.arange(3))),
         ValueError, "'head'", "torch.int64", DENSE),
    Case("int-gradient-global-norm", lambda: update(fo.clip_by_global_norm(1.0), params(head=torch.arange(3))),
         ValueError, "'head'", "torch.int64", DENSE),
    Case("sparse-gradient", lambda: update(fo.adam(0.1), params(head=sparse())),
         ValueError, "'head'", "torch.sparse_coo", DENSE),
    Case("sparse-gradient-global-norm", lambda: update(fo.clip_by_global_norm(1.0), params(head=sparse())),
         ValueError, "'head'", "torch.sparse_coo", DENSE),
    Case("sparse-embedding", embedding, ValueError, "'emb'", "torch.sparse_coo", DENSE),
    Case("complex-gradient", lambda: update(fo.sgd(0.1), params(head=ones(3) + 1j)),
         ValueError, "'head'", "torch.complex64 .* torch.float32", "real part"),
    Case("complex-gradient-noise", lambda: update(fo.add_noise(0.1, 0.0, 0), params(head=ones(3) + 1j)),
         ValueError, "'head'", "complex64", "real part"),
    Case("complex-gradient-real-state", lambda: update(fo.trace(0.9), params(head=ones(3) + 1j), None),
         ValueError, "'head'", "complex64", "state that of other"),
    Case("int-moment", lambda: partial(fo.adam(0.1, mu_dtype=torch.int32).init, params()),
         TypeError, "slot", "torch.int32", "give a floating dtype"),
    Case("real-moment-of-complex", lambda: partial(fo.adam(0.1, mu_dtype=torch.float32).init, [ones(1) + 1j]),
         TypeError, "slot", "float32", "give a complex dtype"),
    Case("apply-missing", lambda: partial(fo.apply_updates, params(), without_head()),
         ValueError, "at 'head'", "updates has nothing", SAME),
    Case("apply-shape", lambda: partial(fo.apply_updates, params(), params(head=ones(1))),
         ValueError, "'head'", r"\(1,\).*\(3,\)", "nothing is broadcast"),
    Case("apply-number", lambda: partial(fo.apply_updates, params(), params(head=1.0)),
         TypeError, "'head'", "updates holds float", "must be a tensor or None"),
    Case("apply-to-number", lambda: partial(fo.apply_updates, params(head=1.0), params()),
         TypeError, "'head'", "params holds float", "must be a tensor or None"),
    Case("apply-to-none", lambda: partial(fo.apply_updates, params(head=None), params()),
         ValueError, "'head'", "its parameter None", "nothing is"),
    Case("apply-complex", lambda: partial(fo.apply_updates, params(), params(head=ones(3) + 1j)),
         ValueError, "'head'", "complex64", "nothing is .* cut off"),
    Case("apply-to-int", lambda: partial(fo.apply_updates, [torch.arange(3)], [ones(3)]),
         ValueError, "'0'", "int64", "nothing is .* cut off"),
    Case("apply-all-of-the-pair", lambda: partial(fo.apply_updates, params(), (params(), ())),
         ValueError, "the root", "tuple", SAME),
]
# fmt: on

# fmt: off
ARGUMENTS = [
    Case("no-params", lambda: update(fo.add_decayed_weights(0.1), params(), None),
         ValueError, "add_decayed_weights", "reads the parameters", r"call update\(.*params\)"),
    Case("no-params-in-a-chain", lambda: update(fo.adamw(0.1), params(), None),
         ValueError, "add_decayed_weights", "reads the parameters", r"call update\(.*params\)"),
    Case("no-params-in-a-mask", lambda: update(fo.adamw(0.1, mask=True), params(), None),
         ValueError, "add_decayed_weights", "reads", r"call update\(.*params\)"),
    Case("extra-undeclared", lambda: update(reads_value(), params(), values=1, value=1),
         TypeError, "chain", "values", "Declared extra arguments: flag, value"),
    Case("extra-undeclared-none", lambda: update(fo.adam(0.1), params(), value=1),
         TypeError, "adam", "got value", "Declared extra arguments: none"),
    Case("extra-support", lambda: partial(fo.with_extra_args_support, fo.adam),
         TypeError, "takes a transformation", "function", r"e\.g\. adamw"),
    Case("extra-handed-on", lambda: partial(fo.GradientTransformationExtraArgs, fo.init_empty_state,
                                            lambda u, s, p=None, **rest: fo.adam(0.1).update(u, s, p, **rest)),
         TypeError, r"hands on \*\*rest", "nothing says", r"extra_args=inner\.extra_args"),
    Case("extra-missing", lambda: update(reads_value(), params(), flag=1),
         TypeError, "chain", "reads value", r"value=\.\.\."),
    Case("extra-missing-masked", lambda: update(fo.masked(reads_value(), True), params()),
         TypeError, "masked", "reads value", r"value=\.\.\."),
    Case("noise-none-gradient", lambda: update(fo.add_noise(0.1, 0.0, 0), params(head=None), None),
         ValueError, "add_noise", "None", r"call update\(.*params\)"),
    Case("mask-none-gradient", lambda: update(masked(lambda path, p: True), params(head=None), None),
         ValueError, "mask", "at 'head' is None", r"call update\(.*params\)"),
    Case("labels-none-gradient", lambda: update(partition(lambda path, p: "slow"), params(head=None), None),
         ValueError, "labels", "'head'", r"call update\("),
]
# fmt: on

NUMBER = "must be a number, a 0-dim tensor or a schedule"
# fmt: off
HYPERPARAMETERS = [
    hyper(fo.sgd, "learning_rate", -0.1, ValueError, r"must be in \[0, inf\)"),
    hyper(fo.sgd, "learning_rate", NAN, ValueError, r"must be in \[0, inf\)"),
    hyper(fo.sgd, "learning_rate", INF, ValueError, r"must be in \[0, inf\)"),
    hyper(fo.sgd, "learning_rate", True, TypeError, NUMBER),
    hyper(fo.sgd, "learning_rate", "0.1", TypeError, NUMBER),
    hyper(fo.sgd, "learning_rate", ones(2, 2), TypeError, "vmap over it"),
    hyper(fo.sgd, "learning_rate", fo.scale(1.0), TypeError, NUMBER),
    hyper(fo.sgd, "momentum", -0.1, ValueError, r"must be in \[0, inf\)", learning_rate=0.1),
    hyper(fo.adam, "b1", 1.0, ValueError, r"must be in \[0, 1\)", learning_rate=0.1),
    hyper(fo.adam, "b1", (0.9, 0.99), TypeError, NUMBER, learning_rate=0.1),
    hyper(fo.adam, "b2", -0.1, ValueError, r"must be in \[0, 1\)", learning_rate=0.1),
    hyper(fo.adam, "eps", -1e-8, ValueError, r"must be in \[0, inf\)", learning_rate=0.1),
    hyper(fo.scale_by_adam, "eps_root", -1, ValueError, r"must be in \[0, inf\)"),
    hyper(fo.scale_by_adam, "amsgrad", "Torch", ValueError, "must be True, False or 'torch'"),
    hyper(fo.scale_by_radam, "threshold", 3.0, ValueError, r"must be in \[4, inf\)"),
    hyper(fo.scale_by_radam, "variant", "Torch", ValueError, "must be 'optax' or 'torch'"),
    hyper(fo.scale_by_nadam, "momentum_decay", -1.0, ValueError, r"must be in \[0, inf\)"),
    hyper(fo.rprop, "eta_plus", 1.0, ValueError, r"must be in \(1, inf\)", learning_rate=0.1),
    hyper(fo.rprop, "eta_minus", 0.0, ValueError, r"must be in \(0, 1\)", learning_rate=0.1),
    hyper(fo.adabelief, "b2", 1.0, ValueError, r"must be in \[0, 1\)", learning_rate=0.1),
    hyper(fo.scale_by_belief, "eps_root", -1e-8, ValueError, r"must be in \[0, inf\)"),
    hyper(fo.adamaxw, "weight_decay", -0.1, ValueError, r"must be in \[0, inf\)", learning_rate=0.1),
    hyper(fo.nadamw, "momentum_decay", -1.0, ValueError, r"must be in \[0, inf\)", learning_rate=0.1),
    hyper(fo.scale_by_yogi, "initial_accumulator_value", -1.0, ValueError, r"must be in \[0, inf\)"),
    hyper(fo.novograd, "weight_decay", -0.1, ValueError, r"must be in \[0, inf\)", learning_rate=0.1),
    hyper(fo.fromage, "learning_rate", -0.1, ValueError, r"must be in \[0, inf\)"),
    hyper(fo.scale_by_optimistic_gradient, "alpha", NAN, ValueError, r"must be in \[-inf, inf\)"),
    hyper(fo.scale_by_sm3, "b2", 1.5, ValueError, r"must be in \[0, 1\]"),
    hyper(fo.sm3, "momentum", 1.0, ValueError, r"must be in \[0, 1\)", learning_rate=0.1),
    hyper(fo.scale_by_adan, "b3", 1.0, ValueError, r"must be in \[0, 1\)"),
    hyper(fo.signum, "beta", 1.0, ValueError, r"must be in \[0, 1\)", learning_rate=0.1),
    hyper(fo.ademamix, "alpha", -1.0, ValueError, r"must be in \[0, inf\)", learning_rate=0.1),
    hyper(fo.simplified_ademamix, "b1", 1.0, ValueError, r"must be in \[0, 1\)", learning_rate=0.1),
    hyper(fo.adopt, "eps", 0.0, ValueError, r"must be in \(0, inf\)", learning_rate=0.1),
    hyper(fo.madgrad, "momentum", 1.0, ValueError, r"must be in \[0, 1\)", learning_rate=0.1),
    Case(
        "cautious-number",
        lambda: partial(fo.cautious, 0.1),
        TypeError,
        "takes a transformation",
        "float 0.1",
        r"adamw\(1e-3\)",
    ),
    hyper(fo.grams, "b1", 1.0, ValueError, r"must be in \[0, 1\)", learning_rate=0.1),
    hyper(fo.cautious_weight_decay, "weight_decay", -0.1, ValueError, r"must be in \[0, inf\)"),
    hyper(fo.scale_by_laprop, "eps", -1.0, ValueError, r"must be in \[0, inf\)"),
    hyper(fo.stable_adamw, "eps", 0.0, ValueError, r"must be in \(0, inf\)", learning_rate=0.1),
    hyper(fo.scale_by_mars, "b1", 1.0, ValueError, r"must be in \[0, 1\)"),
    hyper(fo.schedule_free_adamw, "b1", 0.0, ValueError, r"must be in \(0, 1\)"),
    hyper(fo.schedule_free_radam, "b1", 1.0, ValueError, r"must be in \(0, 1\)"),
    hyper(fo.schedule_free_radam, "b2", 1.0, ValueError, r"must be in \[0, 1\)"),
    hyper(fo.muon, "preconditioning", "none", ValueError, "must be", learning_rate=0.1),
    hyper(fo.acprop, "eps_root", -1.0, ValueError, r"must be in \[0, inf\)", learning_rate=0.1),
    hyper(fo.dog, "init_step", ("step", 1.0), ValueError, "must be a pair of one of"),
    hyper(fo.dowg, "eps", 0.0, ValueError, r"must be in \(0, inf\)"),
    hyper(fo.prodigy, "estim_lr0", 0.0, ValueError, r"must be in \(0, inf\)"),
    hyper(fo.momo, "beta", 1.0, ValueError, r"must be in \[0, 1\)"),
    hyper(fo.momo_adam, "eps", 0.0, ValueError, r"must be in \(0, inf\)"),
    hyper(fo.normalize_by_update_norm, "eps", -1.0, ValueError, r"must be in \[0, inf\)"),
    hyper(fo.scale_by_param_block_norm, "min_scale", NAN, ValueError, r"must be in \[0, inf\)"),
    hyper(fo.adaptive_grad_clip, "clipping", -0.1, ValueError, r"must be in \[0, inf\)"),
    hyper(fo.asgd, "t0", NAN, ValueError, r"must be in \[-inf, inf\)", learning_rate=0.1),
    hyper(fo.scale_by_factored_rms, "decay_rate", -0.8, ValueError, r"must be in \[0, inf\)"),
    hyper(fo.clip_by_block_rms, "threshold", 0.0, ValueError, r"must be in \(0, inf\)"),
    hyper(fo.muon, "ns_steps", 100, ValueError, r"must be in \[0, 100\)", learning_rate=0.1),
    hyper(fo.muon, "ns_coeffs", (1.0, 2.0), ValueError, "must be three numbers", learning_rate=0.1),
    hyper(fo.scale_by_muon, "ns_coeffs", (), ValueError, "must be three numbers, or three"),
    hyper(fo.scale_by_muon, "ns_coeffs", 3.0, ValueError, "must be three numbers, or three"),
    hyper(fo.scale_by_muon, "ns_coeffs", None, ValueError, "must be three numbers, or three"),
    hyper(fo.scale_by_muon, "ns_steps", 2.5, ValueError, "must be a whole number from 0"),
    hyper(fo.scale_by_soap, "frequency", 1.5, ValueError, "must be a whole number from 1"),
    hyper(fo.scale_by_shampoo, "frequency", 1.5, ValueError, "must be a whole number from 1"),
    hyper(fo.scale_by_kl_soap, "frequency", 1.5, ValueError, "must be a whole number from 1"),
    hyper(fo.scale_by_kl_shampoo, "frequency", 1.5, ValueError, "must be a whole number from 1"),
    hyper(fo.scale_by_splus, "frequency", 1.5, ValueError, "must be a whole number from 1"),
    hyper(fo.scale_by_soap, "merged", -1, ValueError, "must be a whole number from 0"),
    hyper(fo.scale_by_kl_soap, "merged", -1, ValueError, "must be a whole number from 0"),
    hyper(fo.scale_by_shampoo, "merged", -1, ValueError, "must be a whole number from 0"),
    hyper(fo.scale_by_shampoo, "start", 0, ValueError, "must be a whole number from 1"),
    hyper(fo.scale_by_shampoo, "b2", 1.5, ValueError, r"must be in \[0, 1\]"),
    hyper(fo.scale_by_shampoo, "max_size", 2.5, ValueError, "must be a whole number from 1"),
    hyper(fo.scale_by_dion, "rank", 1.5, ValueError, "must be a whole number from 1"),
    hyper(fo.scale_by_galore, "rank", 1.5, ValueError, "must be a whole number from 1"),
    hyper(fo.scale_by_fira, "update_proj_gap", 0, ValueError, "must be a whole number from 1"),
    hyper(fo.scale_by_adam_mini, "head_dim", 1.5, ValueError, "must be a whole number from 1"),
    hyper(fo.scale_by_psgd_kron, "init_scale", 0.0, ValueError, r"must be in \(0, inf\)", key=0),
    hyper(fo.scale_by_psgd_kron, "balance_probability", 2.0, ValueError, r"must be in \[0, 1\]", key=0),
    hyper(fo.scale_by_psgd_kron, "probability", 1.5, ValueError, r"must be in \(0, 1\]", key=0),
    hyper(fo.scale_by_psgd_kron, "max_size", -1, ValueError, "must be a whole number from 0", key=0),
    hyper(fo.schedule_free_adamw, "warmup_steps", 1.5, ValueError, "must be a whole number from 0"),
    hyper(fo.adamw, "weight_decay", -0.1, ValueError, r"must be in \[0, inf\)", learning_rate=0.1),
    hyper(fo.lion, "b2", 1, ValueError, r"must be in \[0, 1\)", learning_rate=0.1),
    hyper(fo.trace, "decay", -0.1, ValueError, r"must be in \[0, inf\)"),
    hyper(fo.trace, "decay", None, TypeError, NUMBER),
    hyper(fo.ema, "decay", 1.0, ValueError, r"must be in \[0, 1\)"),
    hyper(fo.rmsprop, "momentum", NAN, ValueError, r"must be in \[0, inf\)", learning_rate=0.1),
    hyper(fo.rmsprop, "initial_scale", -1.0, ValueError, r"must be in \[0, inf\)", learning_rate=0.1),
    hyper(fo.adadelta, "eps", 0.0, ValueError, r"must be in \(0, inf\)"),
    hyper(fo.clip, "max_delta", -1.0, ValueError, r"must be in \[0, inf\)"),
    hyper(fo.clip_by_global_norm, "max_norm", 0, ValueError, r"must be in \(0, inf\)"),
    hyper(fo.clip_by_global_norm, "max_norm", True, TypeError, NUMBER),
    hyper(fo.scale, "step_size", NAN, ValueError, r"must be in \[-inf, inf\)"),
    hyper(fo.scale, "step_size", "x", TypeError, NUMBER),
    Case("scale_by_schedule-number", lambda: partial(fo.scale_by_schedule, 0.1),
         TypeError, "scale_by_schedule", r"got 0\.1", "For a number use scale"),
    hyper(fo.add_noise, "eta", -0.1, ValueError, r"must be in \[0, inf\)", gamma=0.0, key=0),
    hyper(fo.add_noise, "gamma", NAN, ValueError, r"must be in \[0, inf\)", eta=0.1, key=0),
    Case("nesterov-amsgrad", lambda: partial(fo.scale_by_adam, nesterov=True, amsgrad=True),
         ValueError, "nesterov=True", "amsgrad=True", "leave one of them out"),
    Case("dampened-nesterov", lambda: partial(fo.trace, 0.9, nesterov=True, dampening=0.1),
         ValueError, "dampening", r"0\.1", "of zero"),
    Case("1-dim-learning-rate", lambda: update(fo.sgd(ones(2)), params(), state=fo.sgd(1.0).init(params())),
         ValueError, "learning_rate", "2 entries for 3", "vmap over it"),
    Case("1-dim-b1", lambda: update(fo.adam(0.1, b1=ones(2) / 2), params(), state=fo.adam(0.1).init(params())),
         ValueError, r"\bb1\b", "2 entries for 3", "vmap"),
    Case("schedule-returns-none", lambda: partial(fo.sgd(lambda count: None).update, params(), fo.sgd(abs).init(params())),
         TypeError, "learning_rate", "NoneType", "a number or a 0-dim tensor"),
    Case("schedule-returns-matrix", lambda: partial(fo.sgd(lambda count: ones(2, 2)).update, params(), fo.sgd(abs).init(params())),
         TypeError, "learning_rate", r"\(2, 2\)", "a 0-dim tensor"),
]
# fmt: on

OTHER = "this is not a state of"
# fmt: off
STATES = [
    Case("state-of-another-chain", lambda: update(fo.adam(0.1), params(), state=fo.adamax(0.1).init(params())),
         ValueError, OTHER, "scale_by_adamax", OWN),
    Case("state-of-a-longer-chain", lambda: update(fo.adam(0.1), params(), state=fo.adamw(0.1).init(params())),
         ValueError, OTHER, "add_decayed_weights", OWN),
    Case("state-of-another-stage", lambda: update(fo.trace(0.9), params(), state=fo.scale_by_adam().init(params())),
         ValueError, "state of trace", "'mu', 'nu'", OWN),
    Case("state-tuple", lambda: update(fo.adam(0.1), params(), state=(1, 2)), ValueError, OTHER, "tuple", OWN),
    Case("state-dict-for-stage", lambda: update(fo.trace(0.9), params(), state={"trace": params()}),
         ValueError, "state of trace", "dict", OWN),
    Case("state-none", lambda: partial(fo.adam(0.1).update, params(), None, params()),
         ValueError, OTHER, "NoneType", OWN),
    Case("state-none-masked", lambda: partial(masked(True).update, params(), None, params()),
         ValueError, "'inner'", "NoneType", OWN),
    Case("state-of-other-params", lambda: update(fo.adam(0.1), params(), state=fo.adam(0.1).init(without_head())),
         ValueError, "at 'head'", "the state's mu has nothing", SAME),
    Case("state-of-other-labels", lambda: update(partition("slow"), params(), state=partition("fast").init(params())),
         ValueError, "'slow'", r"\['fast'\]", OWN),
    Case("arguments-swapped", lambda: partial(fo.adam(0.1).update, fo.adam(0.1).init(params()), params()),
         ValueError, OTHER, "'enc', 'head'", OWN),
    Case("inject-state-of-inner", lambda: update(fo.inject_hyperparams(fo.sgd)(0.1), params(), state=fo.sgd(0.1).init(params())),
         ValueError, OTHER, "scale_by_learning_rate", OWN),
    Case("inject-state-none", lambda: partial(fo.inject_hyperparams(fo.sgd)(0.1).update, params(), None),
         ValueError, OTHER, "NoneType", OWN),
    Case("inject-state-lacks", lambda: update(fo.inject_hyperparams(fo.sgd)(0.1), params(), state={"hyperparams": {"learning_rate": 1.0}}),
         ValueError, OTHER, r"\['hyperparams'\]", OWN),
    Case("get-ambiguous", lambda: partial(fo.get, a_state(fo.adam(0.1), fo.nadam(0.1)), "mu"),
         KeyError, "'mu' is ambiguous", "'adam/scale_by_adam/mu', 'nadam/scale_by_adam/mu'", "Give one of these paths"),
    Case("get-unknown", lambda: partial(fo.get, a_state(fo.trace(0.9)), "momentum"),
         KeyError, "'momentum'", "nothing is called", "it holds 'trace', 'trace/trace'"),
    Case("load-missing", lambda: loading(saved(**{HEAD: None})),
         KeyError, HEAD, "missing", "the state of the same transformation and params"),
    Case("load-extra", lambda: loading(saved(tail=ones(1))),
         KeyError, "tail", "not expected", "the state of the same transformation and params"),
    Case("load-shape", lambda: loading(saved(**{HEAD: ones(1)})),
         ValueError, HEAD, r"\(1,\) .* \(3,\)", "Load it into the state of the params"),
    Case("load-number", lambda: loading(saved(**{HEAD: 1.0})), TypeError, HEAD, "float 1.0", "must be a tensor"),
    Case("load-state", lambda: loading(fo.trace(0.9).init(params())),
         TypeError, "state dict", "StageState", "as state_dict gives"),
    Case("save-colliding-paths", lambda: partial(fo.state_dict, {"a/b": ones(1), "a": {"b": ones(1)}}),
         ValueError, "'a/b'", "two leaves", "rename a dict key"),
    Case("save-number-beside-string", lambda: partial(fo.state_dict, {0: ones(1), "0": ones(1)}),
         ValueError, "'0'", "two leaves", "rename a dict key"),
    Case("save-number", lambda: partial(fo.state_dict, {"count": 1}),
         TypeError, "'count'", "state holds int 1", "must be a tensor or None"),
    Case("describe-number", lambda: partial(fo.describe, {"count": 1}),
         TypeError, "'count'", "int 1", "must be a tensor or None"),
]
# fmt: on

# fmt: off
COMBINING = [
    Case("chain-number", lambda: partial(fo.chain, fo.scale(1.0), 0.1),
         TypeError, "stage 1", "float 0.1", r"a transformation, e\.g\. scale_by_adam\(\)"),
    Case("chain-list", lambda: partial(fo.chain, [fo.scale(1.0)]),
         TypeError, "stage 0", "list", "must be a transformation"),
    Case("chain-factory", lambda: partial(fo.chain, fo.scale_by_adam),
         TypeError, "stage 0", "function", r"e\.g\. scale_by_adam\(\)"),
    Case("masked-factory", lambda: partial(fo.masked, fo.adam, True),
         TypeError, "'inner'", "function", "must be a transformation"),
    Case("partition-number", lambda: partial(fo.partition, {"a": 0.1}, "a"),
         TypeError, "'a'", "float 0.1", "must be a transformation"),
    Case("partition-list", lambda: partial(fo.partition, [fo.scale(1.0)], "a"),
         TypeError, "transforms", "list", "must be a dict from label"),
    Case("mask-missing", lambda: partial(masked({"enc": True}).init, params()),
         ValueError, "at 'head'", "mask has nothing", PREFIX),
    Case("mask-extra", lambda: partial(masked({"enc": True, "head": True, "x": True}).init, params()),
         ValueError, "at 'x'", "params has nothing", PREFIX),
    Case("mask-list-for-dict", lambda: partial(masked({"enc": [True, True], "head": True}).init, params()),
         ValueError, "at 'enc'", "mask has list", PREFIX),
    Case("mask-tuple-for-list", lambda: partial(masked((True, False)).init, [ones(1), ones(1)]),
         ValueError, "the root", "mask has tuple", PREFIX),
    Case("mask-deeper", lambda: partial(masked({"enc": True, "head": {"x": True}}).init, params()),
         ValueError, "at 'head'", "mask has dict", PREFIX),
    Case("mask-shows-what-was-written", lambda: partial(masked({"tail": False}).init, {"w": ones(1)}),
         ValueError, "at 'tail'", "mask has False", PREFIX),
    Case("mask-int", lambda: partial(fo.masked, fo.scale(1.0), {"enc": 1, "head": 0}),
         TypeError, "mask", "int 1", "must hold True and False"),
    Case("mask-tensor", lambda: partial(fo.masked, fo.scale(1.0), {"w": torch.tensor(True)}),
         TypeError, "mask", "Tensor", "must hold True and False"),
    Case("mask-predicate-tensor", lambda: partial(masked(lambda path, p: (p > 0).any()).init, params()),
         TypeError, "mask", "Tensor", "must hold True and False"),
    Case("mask-predicate-none", lambda: partial(masked(lambda path, p: None).init, params()),
         TypeError, "mask", "NoneType", "must hold True and False"),
    Case("mask-otherwise", lambda: partial(masked, True, otherwise="drop"),
         ValueError, "otherwise", "'drop'", "must be 'pass' or 'zero'"),
    Case("mask-colliding-paths", lambda: partial(masked(True).init, {"a/b": ones(1), "a": {"b": ones(1)}}),
         ValueError, "'a/b'", "two leaves", "rename a dict key"),
    Case("mask-of-the-tree", lambda: partial(masked(lambda params: True).init, params()),
         TypeError, "mask", "of 1 argument", r"lambda path, p: .*give that tree itself"),
    Case("mask-of-the-tree-of-adamw", lambda: partial(fo.adamw(0.1, mask=lambda params: True).init, params()),
         TypeError, "mask", "of 1 argument", r"lambda path, p: .*give that tree itself"),
    Case("freeze-of-the-tree", lambda: partial(fo.freeze(lambda params: True).init, params()),
         TypeError, "mask", "of 1 argument", r"lambda path, p: .*give that tree itself"),
    Case("labels-of-the-tree", lambda: partial(partition(lambda params: "slow").init, params()),
         TypeError, "labels", "of 1 argument", r"lambda path, p: .*give that tree itself"),
    Case("label-unknown", lambda: partial(partition(lambda path, p: "quick").init, params()),
         ValueError, "at 'head'", "'quick'", r"\['slow', 'fast'\]"),
    Case("label-unknown-in-tree", lambda: partial(partition({"enc": "quick", "head": "slow"}).init, params()),
         ValueError, "at 'enc", "'quick'", r"\['slow', 'fast'\]"),
    Case("label-none", lambda: partial(partition(lambda path, p: None).init, params()),
         ValueError, "labels", "None", r"\['slow', 'fast'\]"),
    Case("label-unhashable", lambda: partial(partition(lambda path, p: ["slow"]).init, params()),
         ValueError, "labels", r"\['slow'\]", "mend the label"),
    Case("labels-missing", lambda: partial(partition({"enc": "slow"}).init, params()),
         ValueError, "at 'head'", "labels has nothing", PREFIX),
    Case("labels-list-for-dict", lambda: partial(partition({"enc": ["slow", "fast"], "head": "slow"}).init, params()),
         ValueError, "at 'enc'", "labels has list", PREFIX),
    Case("inject-unknown", lambda: partial(fo.inject_hyperparams(fo.adam), 0.1, beta=0.9),
         TypeError, "adam", "'beta'", "its arguments are .*'b1'"),
    Case("inject-other-name", lambda: partial(fo.inject_hyperparams(fo.adam), lr=0.1),
         TypeError, "'learning_rate'", "lr=", "its arguments are .*'b1'"),
    Case("inject-star-args", lambda: partial(fo.inject_hyperparams(fo.chain), fo.scale(1.0)),
         TypeError, "chain", r"\*stages", "Wrap it in a function that names them"),
    Case("inject-a-transformation", lambda: partial(fo.inject_hyperparams, fo.scale(1.0)),
         TypeError, "inject_hyperparams", r"scale\(1\.0\)", r"Write inject_hyperparams\(adamw\)\("),
    Case("inject-no-transformation", lambda: partial(fo.inject_hyperparams(lambda lr: lr), 0.1),
         TypeError, "<lambda>", r"float 0\.1", "must return a transformation"),
    Case("inject-static-unknown", lambda: partial(fo.inject_hyperparams, fo.sgd, ("lr",)),
         TypeError, "static_args", "'lr'", "names among .*'learning_rate'"),
    Case("inject-static-string", lambda: partial(fo.inject_hyperparams, fo.sgd, "moment"),
         TypeError, "static_args", "'moment'", "names among .*'momentum'"),
]
# fmt: on


class Halve:
    def __call__(self, g: Tensor) -> Tensor:
        return g / 2


NAMED = "must be named|must be a plain function"
# fmt: off
RULES = [
    Case("rule-unknown", wrong_rule(lambda g, beta: g), TypeError, "rule", "beta", "not among count, g, p"),
    Case("rule-default", wrong_rule(lambda g, beta=0.9: g), TypeError, "rule", "beta", "not among count, g, p"),
    Case("prepare-unknown", wrong_rule(lambda g: g, lambda g: {}),
         TypeError, "prepare", "reads g", "not among count, params, updates"),
    Case("rule-star-args", wrong_rule(lambda g, *rest: g), TypeError, "lambda", r"\*args", NAMED),
    Case("rule-kwargs", wrong_rule(lambda g, **rest: g), TypeError, "lambda", r"\*\*kwargs", NAMED),
    Case("rule-keyword-only", wrong_rule(lambda g, *, value: g), TypeError, "rule", "value", "Let prepare take it"),
    Case("prepare-kwargs", wrong_rule(lambda g: g, lambda **extra: {}), TypeError, "lambda", r"\*\*kwargs", NAMED),
    Case("rule-partial", wrong_rule(partial(torch.mul, other=2)), TypeError, "partial", "partial", NAMED),
    Case("rule-object", wrong_rule(Halve()), TypeError, "Halve", "Halve", NAMED),
    Case("rule-builtin", wrong_rule(torch.sign), TypeError, "sign", "built-in", NAMED),
    Case("rule-number", wrong_rule(0.5), TypeError, "0.5", "0.5", NAMED),
    Case("rule-kind", wrong_rule(lambda g: g, kind="treewise"),
         ValueError, "kind", "'treewise'", "'elementwise' or 'tensorwise'"),
    Case("sum-tensorwise", wrong_rule(lambda g, total: g, sums={"total": lambda g: g.sum()}, kind="tensorwise"),
         ValueError, "sums", "tensorwise", "works them out itself"),
    Case("sum-unknown", wrong_rule(lambda g, total: g, sums={"total": lambda q: q.sum()}),
         TypeError, "sum total", "reads q", "not among count, g, p"),
    Case("sum-of-sums", wrong_rule(lambda g, a, b: g, sums={"a": lambda g: g.sum(), "b": lambda a: a}),
         TypeError, "sum b", "reads a", "not among count, g, p"),
    Case("sum-missing", bad_step(lambda g, a: g, lambda count: {}, sums={"a": lambda q: q.sum()}),
         TypeError, "reads q", "q", "which prepare did not return"),
    Case("sum-shape", bad_step(lambda g, total: g, sums={"total": lambda g: g * g}),
         TypeError, "sum total", r"\(3,\)", "a 0-dim tensor: a sum over all elements"),
    Case("names-twice", wrong_rule(lambda g, mu: g, slots=SLOT, hyper={"mu": 0.9}),
         TypeError, "slots, shared, hyper, sums, totals", r"\['mu', 'mu'\]", "different names"),
    Case("name-reserved", wrong_rule(lambda g, p: g, hyper={"p": 2.0}),
         TypeError, "hyper", r"\['p'\]", "none of them g, p"),
    Case("slot-not-a-function", wrong_rule(lambda g, mu: g, slots={"mu": ones(1)}),
         TypeError, "slot mu", "Tensor", r"a function .* torch\.zeros_like"),
    Case("shared-not-a-tensor", wrong_rule(lambda g, key: g, shared={"key": 1}),
         TypeError, "shared key", "int 1", "must be a tensor"),
    Case("hyper-list", wrong_rule(lambda g, a: g, hyper={"a": [1.0]}), TypeError, r"\ba\b", "list", NUMBER),
    Case("rule-slots-missing", bad_step(lambda g, mu: (g, {}), slots=SLOT),
         TypeError, "rule", r"a dict of \[\]", r"slots \['mu'\]"),
    Case("rule-slots-other", bad_step(lambda g, mu: (g, {"nu": mu}), slots=SLOT),
         TypeError, "rule", r"\['nu'\]", r"slots \['mu'\]"),
    Case("rule-no-slots", bad_step(lambda g, mu: g, slots=SLOT),
         TypeError, "rule", "it returned Tensor", r"\(update, \{slot: new value\}\)"),
    Case("rule-slots-tuple", bad_step(lambda g, mu: (g, mu), slots=SLOT),
         TypeError, "rule", r"\(Tensor, Tensor\)", r"\(update, \{slot: new value\}\)"),
    Case("rule-slot-none", bad_step(lambda g, mu: (g, {"mu": None}), slots=SLOT),
         TypeError, "slot mu", "NoneType", "must be a tensor"),
    Case("rule-returns-none", bad_step(lambda g: None), TypeError, "the update", "NoneType", "must be a tensor"),
    Case("rule-returns-pair-without-slots", bad_step(lambda g: (g, {})),
         TypeError, "the update", "tuple", "must be a tensor"),
    Case("rule-changes-shape", bad_step(lambda g: g.sum()),
         ValueError, "'enc/b'", r"\(3,\).* of shape \(\)", "Is the state that of other params"),
    Case("slot-starts-as-number", lambda: partial(fo.leafwise(lambda g, a: (g, {"a": a}), slots={"a": lambda p: 0.0}).init, params()),
         TypeError, "slot a .*'enc/b'", "float 0.0", "must be a tensor"),
    Case("prepare-lacks", bad_step(lambda g, a: g * a, lambda count: {"b": 1.0}),
         TypeError, "rule reads a", "did not return", "prepare"),
    Case("prepare-none", bad_step(lambda g: g, lambda count: None),
         TypeError, "prepare", "NoneType", r"must return \{name: value\}"),
    Case("prepare-shared-unknown", bad_step(lambda g: g, lambda k: ({}, {"z": k}), shared={"k": ones(())}),
         TypeError, "prepare", r"\['z'\]", r"among \['k'\]"),
    Case("prepare-shared-undeclared", bad_step(lambda g: g, lambda count: ({}, {"z": count})),
         TypeError, "prepare", r"\['z'\]", r"among \[\]"),
    Case("prepare-matrix", bad_step(lambda g, a: g * a, lambda count: {"a": ones(2, 3)}),
         TypeError, r"\ba\b", r"\(2, 3\)", "a number, a 0-dim tensor, .*Each"),
    Case("prepare-tree", bad_step(lambda g, a: g * a, lambda updates: {"a": updates}),
         TypeError, r"\ba\b", "dict of", r"Each\("),
    Case("prepare-vector", bad_step(lambda g, a: g * a, lambda count: {"a": ones(2)}),
         ValueError, r"\ba\b", "2 entries for 3 leaves", "vmap over it"),
    Case("prepare-each-other-tree", bad_step(lambda g, a: g * a, lambda count: {"a": fo.Each(without_head())}),
         ValueError, "at 'head'", "a has nothing", SAME),
    Case("update-kwargs", lambda: partial(fo.GradientTransformation, lambda ps: (), lambda us, s, ps, **extra: (us, s)),
         TypeError, "lambda", r"\*\*extra", r"name the extra .* or pass extra_args="),
    Case("update-partial", lambda: partial(fo.GradientTransformation, lambda ps: (), partial(max)),
         TypeError, "partial", "partial", NAMED),
]
# fmt: on

KEY = r"an int64 tensor of shape \(2,\), as random\.key\(seed\) gives"
# fmt: off
RANDOM = [
    Case("seed-float", lambda: partial(fo.random.key, 1.5),
         TypeError, "seed", r"float 1\.5", "must be a whole number"),
    Case("seed-bool", lambda: partial(fo.random.key, True), TypeError, "seed", "bool True", "must be a whole number"),
    Case("noise-seed-float", lambda: partial(fo.add_noise, 0.1, 0.0, 1.5),
         TypeError, "seed", r"float 1\.5", "must be a whole number"),
    Case("noise-generator", lambda: partial(fo.add_noise, 0.1, 0.0, torch.Generator()),
         TypeError, "seed", "Generator", "must be a whole number"),
    Case("noise-no-key", lambda: partial(fo.add_noise, 0.1, 0.0), TypeError, "add_noise", "missing", "'key'"),
    Case("noise-key-dtype", lambda: partial(fo.add_noise, 0.1, 0.0, torch.zeros(2)),
         TypeError, "key", r"torch\.float32", KEY),
    Case("noise-key-shape", lambda: partial(fo.add_noise, 0.1, 0.0, fo.random.split(fo.random.key(0), 3)),
         TypeError, "key", r"\(3, 2\)", "vmap over the keys"),
    Case("split-keys", lambda: partial(fo.random.split, fo.random.split(fo.random.key(0))),
         TypeError, "key", r"\(2, 2\)", "vmap over the keys"),
    Case("split-seed", lambda: partial(fo.random.split, 7), TypeError, "key", "int 7", KEY),
    Case("split-negative", lambda: partial(fo.random.split, fo.random.key(0), -1),
         ValueError, "num", "-1", "0 or greater"),
    Case("normal-key", lambda: partial(fo.random.normal, torch.zeros(3, dtype=torch.int64), (2,)),
         TypeError, "key", r"\(3,\)", KEY),
    Case("normal-shape", lambda: partial(fo.random.normal, fo.random.key(0), 3),
         TypeError, "shape", "int 3", r"a tuple of sizes, e\.g\. \(3,\)"),
    Case("fold-in-float", lambda: partial(fo.random.fold_in, fo.random.key(0), 1.5),
         TypeError, "data", r"1\.5", "must be a whole number"),
    Case("fold-in-negative", lambda: partial(fo.random.fold_in, fo.random.key(0), -1),
         ValueError, "data", "-1", "0 or greater"),
]
# fmt: on

CASES = [
    *STRUCTURE,
    *SHAPES_AND_DTYPES,
    *ARGUMENTS,
    *HYPERPARAMETERS,
    *STATES,
    *COMBINING,
    *RULES,
    *RANDOM,
]


def snapshot(call: partial) -> Any:
    """All that a call is given: structure, values, and how often each tensor was written to."""
    leaves, spec = tree.flatten([*call.args, call.keywords])
    shown = [
        (x.dtype, x.layout, x.to_dense().tolist(), x._version)
        if isinstance(x, Tensor)
        else repr(x)
        for x in leaves
    ]
    return str(spec), shown


HERE = {"every", "largest", "wrap", "gate"}
"""Rows whose transformation is written in the tests, with no check of its ranges."""
BAD: list[tuple[Any, type[Exception]]] = [
    (NAN, ValueError),
    ("0.1", TypeError),
    (True, TypeError),
    (ones(2, 2), TypeError),
]


@pytest.mark.parametrize(("bad", "error"), BAD, ids=["nan", "str", "bool", "matrix"])
@pytest.mark.parametrize(
    ("row", "name"),
    [
        pytest.param(row, name, id=f"{row.id}-{name}")
        for row in ROWS
        for name in row.hyper
        if row.name not in HERE
    ],
)
def test_every_hyperparameter_has_an_error_with_its_name(
    row: Row, name: str, bad: Any, error: type[Exception]
) -> None:
    """And not the name of an argument of a stage inside, which the user has not written."""
    with pytest.raises(error) as caught:
        row.build(**{name: bad})
    message = str(caught.value)
    assert type(caught.value) is error
    assert re.search(rf"\b{name}\b", message) and "must be" in message
    assert len(message) < 300


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_bad_input(case: Case) -> None:
    call = case.call()
    before = snapshot(call)
    with pytest.raises(case.error) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is case.error
    for said in (case.where, case.given, case.instead):
        assert re.search(said, message), f"{said!r} is not in: {message}"
    assert len(message) < 500
    assert snapshot(call) == before


def test_the_table() -> None:
    assert len({case.id for case in CASES}) == len(CASES) >= 50


@pytest.mark.parametrize(
    "tx",
    [fo.adamw(0.1), fo.inject_hyperparams(fo.adam)(0.1), masked(True), partition("slow")],
    ids=repr,
)
def test_training_goes_on_after_an_error(tx: fo.GradientTransformation) -> None:
    """An error leaves no trace in the transformation either."""
    state = tx.init(params())
    expected = tx.update(params(), state, params())
    for bad in (
        params(head=ones(1)),
        without_head(),
        params(enc={"w": ones(2, 3), "b": sparse()}),
    ):
        with pytest.raises(ValueError, match=r"head|enc/b"):
            tx.update(bad, state, params())
    again = tx.update(params(), state, params())
    assert tree.paths(again) == tree.paths(expected)
    assert all(
        torch.equal(a, b)
        for a, b in zip(tree.leaves(again), tree.leaves(expected), strict=True)
    )


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError, torch.linalg.LinAlgError, RuntimeError]
)
def test_an_error_of_a_rule_comes_out_as_it_is(error: type, stateful: bool) -> None:
    """Also beside a slot of another shape than the parameter, if that is its own shape."""
    calls = []

    def rule(g, factor):
        calls.append(1)
        if len(calls) > 4:
            raise error("from the rule")
        return g, {"factor": factor}

    slots = {"factor": lambda p: torch.eye(p.shape[0])}
    tx = fo.leafwise(rule, slots=slots, kind="tensorwise")
    w = torch.nn.Parameter(torch.ones(3, 2))
    opt = fo.optim.Optimizer([w], tx)

    def train(state) -> None:
        for _ in range(12):
            w.grad = torch.ones(3, 2)
            if stateful:
                opt.step()
            else:
                _, state = tx.update([w.grad], state)

    with pytest.raises(error, match="from the rule"):
        train(tx.init([w.detach()]))
