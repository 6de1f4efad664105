"""The numbers of a look at a step as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

__all__ = ["report_table"]

OF_LAYERS = (
    "param_norm",
    "grad_norm",
    "grad_zeros",
    "update_norm",
    "ratio",
    "cosine",
)
OF_STAGES = (
    "scale",
    "share",
    "zeroed",
)


def report_table(report: Mapping[str, Tensor]) -> str:
    """The numbers of a `report` as text: a line for each parameter, then one for each stage, and
    one for each stage that may leave out a step.

    Args:
        report: what `report` returned; of many models, first choose one:
            ``{name: x[3] for name, x in found.items()}``.

    Raises:
        ValueError: a value is no single number.

    Example:
        >>> import torch, functorch_opt as fo
        >>> params = {"w": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0])}
        >>> tx = fo.chain(fo.clip_by_global_norm(1.0), fo.scale_by_learning_rate(0.5))
        >>> grads = {"w": torch.tensor([0.0, 4.0]), "b": torch.tensor([3.0])}
        >>> print(fo.report_table(fo.report(tx, grads, tx.init(params), params)))
        parameter  param_norm  grad_norm  grad_zeros  update_norm   ratio  cosine
        b                   1          3          0%          0.3     0.3       1
        w                   5          4         50%          0.4    0.08       1
        all               5.1          5         33%          0.5  0.0981       1
        <BLANKLINE>
        stage                   scale  share  zeroed
        clip_by_global_norm       0.2      4      0%  max_norm=1
        scale_by_learning_rate    0.5      3      0%  learning_rate=0.5
    """
    check_single(report)
    numbers = {name: value.item() for name, value in report.items()}
    paths = named_after("param_norm", numbers)
    rows: list[tuple[str, ...]] = [("parameter", *OF_LAYERS, "")]
    for path in paths:
        cells = [shown(name, numbers[f"{name}/{path}"]) for name in OF_LAYERS]
        rows.append((path, *cells, ""))
    if paths:
        cells = [shown(name, numbers[name]) for name in OF_LAYERS]
        rows.append(("all", *cells, ""))
    stages: list[tuple[str, ...]] = [("stage", *OF_STAGES, "")]
    names = named_after("scale", numbers)
    for stage in names:
        cells = [shown(name, numbers[f"{name}/{stage}"]) for name in OF_STAGES]
        stages.append((stage, *cells, options_of(stage, names, numbers)))
    tables = [aligned(rows), aligned(stages)]
    if skips := rows_of_skips(numbers):
        tables.append(aligned([("skipped", "now", "so far", "why"), *skips]))
    return "\n\n".join(["\n".join(lines) for lines in tables])


def rows_of_skips(numbers: Mapping[str, float]) -> list[tuple[str, ...]]:
    """Of each stage that may leave out a step: whether it does, how often it has, and why."""
    rows: list[tuple[str, ...]] = []
    for name in named_after("skipped", numbers):
        stage, _, why = name.rpartition("/")
        now = "yes" if numbers[f"skipped/{name}"] else "no"
        so_far = numbers.get(f"skips/{name}")
        rows.append((stage, now, "" if so_far is None else f"{so_far:.0f}", why))
    return rows


def check_single(report: Mapping[str, Tensor]) -> None:
    """Raise ValueError for the look at many models."""
    for name, value in report.items():
        if value.dim():
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}: this is of one model. Choose one, "
                "{name: x[0] for name, x in report.items()}."
            )


def named_after(first: str, names: Iterable[str]) -> list[str]:
    """What comes after the first part, of those names that have it."""
    start = f"{first}/"
    return [name.removeprefix(start) for name in names if name.startswith(start)]


def options_of(
    stage: str,
    stages: list[str],
    numbers: Mapping[str, float],
) -> str:
    """The hyperparameters of a stage. Those that differ between parameters are a range."""
    start = f"hyper/{stage}/"
    deeper = [f"hyper/{other}/" for other in stages if other.startswith(f"{stage}/")]
    values: dict[str, list[float]] = {}
    for name, value in numbers.items():
        if name.startswith(start) and not name.startswith(tuple(deeper)):
            option = name.removeprefix(start).partition("/")[0]
            values.setdefault(option, []).append(value)
    told = []
    for option, of in values.items():
        ends = dict.fromkeys([f"{min(of):.4g}", f"{max(of):.4g}"])
        told.append(f"{option}={' to '.join(ends)}")
    return " ".join(told)


def shown(name: str, value: float) -> str:
    if name in ("grad_zeros", "zeroed"):
        return f"{value:.0%}"
    return f"{value:.3g}"


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """The lines of a table: a name, numbers, and words at the end."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *numbers, last in rows:
        cells = [first.ljust(widths[0])]
        for cell, width in zip(numbers, widths[1:-1], strict=True):
            cells.append(cell.rjust(width))
        line = "  ".join([*cells, last])
        lines.append(line.rstrip())
    return lines
