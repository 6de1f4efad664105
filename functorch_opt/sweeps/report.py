"""What a sweep found: the best setting, a table, a picture. The only importer of rich and matplotlib, and only when they are used."""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from functorch_opt import tree
from functorch_opt.tree import PyTree

__all__ = ["Sweep"]


@dataclass(frozen=True, repr=False, eq=False)
class Sweep:
    """What `sweep` found. Printed, it is a table of the best settings; rich prints it as one of its own.

    Attributes:
        settings: of each run, ``{hyperparameter: [runs]}``, with ``"seed"`` if there are several.
        curves: training loss at each step, [runs, steps]; NaN after a run has diverged.
        losses: what runs are ranked by, [runs]: the validation loss, or the mean of the last tenth of the curve; infinite if diverged.
        diverged: whether the loss was not finite or greater than the bound, [runs].
        params: the parameters of all runs at the end, each tensor [runs, ...].
        fixed: the keywords of the optimizer that all runs have in common.
    """

    settings: dict[str, Tensor]
    curves: Tensor
    losses: Tensor
    diverged: Tensor
    params: PyTree
    fixed: dict[str, Any]
    module_of_runs: nn.Module | None

    @property
    def seeds(self) -> int:
        return len(self.settings["seed"].unique()) if "seed" in self.settings else 1

    @property
    def means(self) -> Tensor:
        """The loss of each setting: the mean over its seeds."""
        return self.losses.view(-1, self.seeds).mean(1)

    @property
    def best_run(self) -> int:
        """The index of the best run: of the setting with the lowest loss (the lowest mean, if there are several seeds), the best seed."""
        if not self.means.isfinite().any():
            failed = f"{int(self.diverged.sum())} of {len(self.losses)} runs diverged"
            raise ValueError(
                f"there is no best setting: {failed}, at least one of each setting. Try smaller learning rates."
            )
        setting = int(self.means.argmin())
        return setting * self.seeds + int(self.losses.view(-1, self.seeds)[setting].argmin())

    @property
    def best(self) -> dict[str, Any]:
        """The best setting, as keywords of the optimizer: ``fo.adamw(**result.best)``."""
        run = self.best_run
        return {
            **self.fixed,
            **{
                name: column[run].item() for name, column in self.settings.items() if name != "seed"
            },
        }

    def params_of(self, run: int | None = None) -> PyTree:
        """The parameters of one run; by default of the best."""
        run = self.best_run if run is None else run
        return tree.map(lambda p: p[run].clone(), self.params)

    def module(self, run: int | None = None) -> nn.Module:
        """A copy of the module with the parameters of one run; by default of the best.

        Raises:
            TypeError: the sweep was of a loss function; use `params_of`.
        """
        if self.module_of_runs is None:
            raise TypeError(
                "this was a sweep of a loss function, which has no module: use params_of(run)."
            )
        module = copy.deepcopy(self.module_of_runs)
        module.load_state_dict(
            self.params_of(run), strict=False
        )  # what is missing are buffers and frozen parameters
        return module

    def _rows(self, most: int) -> tuple[list[str], list[list[str]], str]:
        """Header, rows and last line of the table."""
        names = [name for name in self.settings if name != "seed"]
        n = self.seeds
        means, spread = self.means, self.losses.view(-1, n)
        diverged = self.diverged.view(-1, n).sum(1).tolist()
        order = means.argsort(stable=True).tolist()
        rows = []
        for i in order[:most]:
            row = [f"{self.settings[name][i * n]:.3g}" for name in names] + [f"{means[i]:.4g}"]
            row += [f"{spread[i].min():.4g} to {spread[i].max():.4g}"] if n > 1 else []
            rows.append(
                [
                    *row,
                    ""
                    if not diverged[i]
                    else "diverged"
                    if n == 1
                    else f"{diverged[i]} of {n} diverged",
                ]
            )
        header = [*names, *(["mean loss", f"of {n} seeds"] if n > 1 else ["loss"]), ""]
        left = f"{len(order) - most} more settings; " if len(order) > most else ""
        return header, rows, f"{left}{int(self.diverged.sum())} of {len(self.losses)} runs diverged"

    def table(self, rows: int = 10) -> str:
        """The best settings, a line each, best first, in plain text.

        Args:
            rows: how many.
        """
        header, body, last = self._rows(rows)
        widths = [max(len(row[i]) for row in [header, *body]) for i in range(len(header))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [header, *body]
        ]
        return "\n".join([*lines, last])

    def __repr__(self) -> str:
        return self.table()

    def __rich__(self) -> Any:
        header, body, last = self._rows(10)
        grid = viz("rich.table", "this table").Table(
            box=viz("rich.box", "this table").SIMPLE_HEAD, caption=last, caption_justify="left"
        )
        for name in header:
            grid.add_column(name, justify="right")
        for row in body:
            grid.add_row(*row)
        return grid

    def plot(self) -> Any:
        """The losses over the first hyperparameter that varies, and the curves: a ``matplotlib.figure.Figure``, to show or ``savefig``.

        Diverged runs are crosses at the upper edge. Needs the extra ``viz``.
        """
        return _plot(self)


# ---- pictures ------------------------------------------------------------------------------------------------------------


def viz(module: str, what: str) -> Any:
    """A module of the libraries in the extra ``viz``."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).partition(".")[0]
        raise ModuleNotFoundError(
            f"{what} needs {missing}: pip install 'functorch_opt[viz]'", name=missing
        ) from error


BLACK, BLUE, RED = "#000000", "#0072B2", "#D55E00"
MOST_CURVES = 64


def _plot(of: Sweep) -> Any:
    figure = viz("matplotlib.figure", "plot()").Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [name for name in of.settings if name != "seed"]
    name = names[0] if names else "run"
    x = of.settings[name] if names else torch.arange(len(of.losses), dtype=torch.float64)
    log = bool(x.min() > 0 and x.max() > 20 * x.min())
    best = of.best_run if of.means.isfinite().any() else None

    lines: dict[str, list[int]] = {}  # of the settings that differ in `name` only
    for i in range(len(of.means)):
        others = ", ".join(f"{other}={of.settings[other][i * of.seeds]:.3g}" for other in names[1:])
        lines.setdefault(others, []).append(i)
    for label, settings in lines.items():
        settings.sort(key=lambda i: float(x[i * of.seeds]))
        left.plot(
            x[:: of.seeds][settings],
            _finite(of.means[settings]),
            "-o",
            ms=3.5,
            lw=1,
            label=label,
            color=None if label else BLUE,
        )
    if of.seeds > 1:
        left.plot(x, _finite(of.losses), ".", ms=3, color=BLACK, alpha=0.5, label="single seeds")
    if of.diverged.any():
        at_the_top = torch.full((int(of.diverged.sum()),), 0.97)
        left.plot(
            x[of.diverged],
            at_the_top,
            "x",
            color=BLACK,
            transform=left.get_xaxis_transform(),
            label="diverged",
        )
    if best is not None:
        left.plot(
            x[best],
            of.means[best // of.seeds],
            "*",
            ms=16,
            color=RED,
            mec=BLACK,
            label=f"best: {name}={x[best]:.3g}",
        )
    finite = of.losses[of.losses.isfinite()]
    left.set(xlabel=name, ylabel="loss after training", xscale="log" if log else "linear")
    left.set(yscale="log" if len(finite) and finite.min() > 0 else "linear")
    if len(lines) <= 10:
        left.legend(fontsize=8, frameon=False)

    window = max(1, of.curves.shape[1] // 50)
    curves = torch.nn.functional.avg_pool1d(of.curves.unsqueeze(1), window, stride=1).squeeze(
        1
    )  # a running mean
    steps = torch.arange(curves.shape[1]) + (window - 1) / 2
    norms = viz("matplotlib.colors", "plot()")
    norm = (norms.LogNorm if log else norms.Normalize)(float(x.min()), float(x.max()))
    colors = viz("matplotlib.cm", "plot()").ScalarMappable(norm, "viridis")
    shown = (
        torch.linspace(0, len(curves) - 1, min(len(curves), MOST_CURVES)).round().long().tolist()
    )
    for run in shown:
        right.plot(steps, curves[run], color=colors.to_rgba(float(x[run])), lw=1)
    if best is not None:
        label = ", ".join(f"{k}={of.settings[k][best]:.3g}" for k in names)
        right.plot(steps, curves[best], color=RED, lw=2.5, label=f"best: {label or best}")
        right.legend(fontsize=8, frameon=False)
    kept = curves[~of.diverged]
    if len(kept) and kept.min() > 0:
        right.set(
            yscale="log", ylim=(0.8 * float(kept.min()), 1.2 * float(kept.max()))
        )  # what diverges may leave the picture
    right.set(xlabel="step", ylabel="training loss")
    figure.colorbar(colors, ax=right, label=name)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _finite(x: Tensor) -> Tensor:
    """With NaN, which leaves a gap in a line, in place of what is not finite."""
    return torch.where(x.isfinite(), x, torch.nan)
