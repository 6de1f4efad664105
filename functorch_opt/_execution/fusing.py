"""What may run as one pass: which stages of a transformation an execution can take together."""

from __future__ import annotations

from torch import Tensor

from functorch_opt._core.chain import Chain
from functorch_opt._core.gate import Gate
from functorch_opt._core.groups import Groups
from functorch_opt._core.inject import Injected
from functorch_opt._core.rule import Leafwise
from functorch_opt._core.transformation import GradientTransformation
from functorch_opt._core.wrap import Wrap


def rules_of(tx: GradientTransformation) -> list[GradientTransformation]:
    """The stages of `tx`, those of chains in it too."""
    if isinstance(tx, Chain):
        return [rule for stage in tx.stages.values() for rule in rules_of(stage)]
    return [tx]


def looks_first(tx: GradientTransformation) -> bool:
    """Whether the first rule in `tx` has to see all updates before it sees one."""
    while isinstance(tx, Gate):
        tx = tx.inner
    first = rules_of(tx)[:1]
    return any(isinstance(rule, Leafwise) and rule.looks_around for rule in first)


def can_be_fused(tx: Wrap, sharded: bool) -> bool:
    """Whether nothing inside a wrapper has to see whole trees of what only the wrapper shows it."""
    if "updates" in tx.once.reads:
        return False
    return fits_inside(tx.inner, tx.changes_g, tx.changes_p, sharded)


def gate_fits(tx: Gate, sharded: bool) -> bool:
    """Whether the stages behind a gate can be taken apart where only the device knows its decision.

    Where the update is zero otherwise, it is made zero in the end, whatever has come between. But
    the update that came in has to be there in the end, for one that is passed on.
    """
    return tx.otherwise == "zero" or fits_inside(tx.inner, True, False, sharded)


def fits_inside(tx: GradientTransformation, g: bool, p: bool, sharded: bool) -> bool:
    if isinstance(tx, Gate) and not set(tx.once.reads) & {"updates", "params"}:
        return fits_inside(tx.inner, g, p, sharded)
    for k, rule in enumerate(rules_of(tx)):
        if isinstance(rule, Gate) and len(rules_of(tx)) == 1:
            return False
        if not isinstance(rule, Leafwise) or (p and "params" in rule.once.reads):
            return False
        if rule.looks_around and (g or k or rule.has_totals):
            return False
        if sharded and (rule.exchanges or rule.kind == "tensorwise"):
            return False
    return True


def always_counts(tx: GradientTransformation) -> bool:
    """Whether each step of `tx` is counted by all its stages: it is of rules, and has no gate."""
    if isinstance(tx, Chain):
        return all(map(always_counts, tx.stages.values()))
    if isinstance(tx, Groups):
        return all(map(always_counts, tx.inside.values()))
    if isinstance(tx, Injected):
        return always_counts(tx.factory(**tx.fixed, **tx.numbers))
    return always_counts(tx.inner) if isinstance(tx, Wrap) else isinstance(tx, Leafwise)


def made_once(tx: Injected, values: dict[str, Tensor]) -> GradientTransformation:
    """The transformation for these hyperparameters.

    It is the last one again if they are the same objects as then.
    """
    last = vars(tx).get("_made")
    if last is not None and all(values[name] is x for name, x in last[0].items()):
        return last[1]
    made = tx.made(values)
    tx._made = values, made  # type: ignore[attr-defined]
    return made
