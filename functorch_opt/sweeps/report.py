"""What a sweep found: the best setting, a table, a picture."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from functorch_opt import tree
from functorch_opt._core.extra import viz
from functorch_opt.sweeps.picture import plot
from functorch_opt.tree import PyTree

__all__ = ["Sweep"]


@dataclass(frozen=True, repr=False, eq=False)
class Sweep:
    """What `sweep` found.

    Printing it shows a table of the best settings. rich shows a table of its own.

    Attributes:
        settings: the hyperparameters of each run, ``{hyperparameter: [runs]}``, with ``"seed"`` if
            there are several seeds.
        curves: the training loss at each step, [runs, steps]. It is NaN after a run has diverged.
        losses: the numbers by which runs are ranked, [runs]: the validation loss, or the mean of
            the last tenth of the curve. They are infinite for runs that diverged.
        diverged: whether the loss was not finite, or greater than the bound, [runs].
        params: the parameters of all runs at the end, each tensor [runs, ...]. If the optimizer
            keeps an average to evaluate with, such as Schedule-Free, it is here; see `eval_params`.
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
        if "seed" not in self.settings:
            return 1
        return len(self.settings["seed"].unique())

    @property
    def means(self) -> Tensor:
        """The loss of each setting: the mean over its seeds."""
        return self.losses.view(-1, self.seeds).mean(1)

    @property
    def best_run(self) -> int:
        """The index of the best run.

        It is the best seed of the setting with the lowest loss. With several seeds this is the
        setting with the lowest mean.
        """
        if not self.means.isfinite().any():
            failed = f"{int(self.diverged.sum())} of {len(self.losses)} runs diverged"
            raise ValueError(
                f"there is no best setting: {failed}, at least one of each setting. "
                "Try smaller learning rates."
            )
        setting = int(self.means.argmin())
        return setting * self.seeds + int(
            self.losses.view(-1, self.seeds)[setting].argmin()
        )

    @property
    def best(self) -> dict[str, Any]:
        """The best setting, as keywords of the optimizer: ``fo.adamw(**result.best)``."""
        run = self.best_run
        return {
            **self.fixed,
            **{
                name: column[run].item()
                for name, column in self.settings.items()
                if name != "seed"
            },
        }

    def params_of(self, run: int | None = None) -> PyTree:
        """The parameters of one run, by default of the best one."""
        run = self.best_run if run is None else run
        return tree.map(lambda p: p[run].clone(), self.params)

    def module(self, run: int | None = None) -> nn.Module:
        """A copy of the module with the parameters of one run, by default of the best one.

        Raises:
            TypeError: the sweep was that of a loss function; use `params_of`.
        """
        if self.module_of_runs is None:
            raise TypeError(
                "this was a sweep of a loss function, which has no module: use params_of(run)."
            )
        module = copy.deepcopy(self.module_of_runs)
        # The missing entries are buffers and frozen parameters.
        module.load_state_dict(self.params_of(run), strict=False)
        return module

    def _rows(self, most: int) -> tuple[list[str], list[list[str]], str]:
        """The header, the rows and the last line of the table."""
        names = [name for name in self.settings if name != "seed"]
        n = self.seeds
        means, spread = self.means, self.losses.view(-1, n)
        diverged = self.diverged.view(-1, n).sum(1).tolist()
        order = means.argsort(stable=True).tolist()
        rows = []
        for i in order[:most]:
            row = [f"{self.settings[name][i * n]:.3g}" for name in names] + [
                f"{means[i]:.4g}"
            ]
            row += [f"{spread[i].min():.4g} to {spread[i].max():.4g}"] if n > 1 else []
            lost = "diverged" if n == 1 else f"{diverged[i]} of {n} diverged"
            rows.append([*row, lost if diverged[i] else ""])
        of_losses = ["mean loss", f"of {n} seeds"] if n > 1 else ["loss"]
        header = [*names, *of_losses, ""]
        left = f"{len(order) - most} more settings; " if len(order) > most else ""
        return (
            header,
            rows,
            f"{left}{int(self.diverged.sum())} of {len(self.losses)} runs diverged",
        )

    def table(self, rows: int = 10) -> str:
        """The best settings in plain text, one in each line, with the best one first.

        Args:
            rows: how many settings to show.
        """
        header, body, last = self._rows(rows)
        columns = zip(header, *body, strict=True)
        widths = [max(map(len, column)) for column in columns]
        lines = [
            "  ".join(
                cell.rjust(width) for cell, width in zip(row, widths, strict=True)
            ).rstrip()
            for row in [header, *body]
        ]
        return "\n".join([*lines, last])

    def __repr__(self) -> str:
        return self.table()

    def __rich__(self) -> Any:
        header, body, last = self._rows(10)
        grid = viz("rich.table", "this table").Table(
            box=viz("rich.box", "this table").SIMPLE_HEAD,
            caption=last,
            caption_justify="left",
        )
        for name in header:
            grid.add_column(name, justify="right")
        for row in body:
            grid.add_row(*row)
        return grid

    def plot(self) -> Any:
        """The losses over the first hyperparameter that varies, and the curves.

        The result is a ``matplotlib.figure.Figure``, which you can show, or save with its
        ``savefig``. Runs that diverged are crosses at the upper edge. This needs the extra ``viz``.
        """
        return plot(self)
