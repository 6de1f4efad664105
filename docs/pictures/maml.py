"""Draw ``maml.svg`` from the code of the guide itself: ``python docs/pictures/maml.py`` (half a
minute).
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent


def main() -> None:
    page = (HERE.parent / "guide-differentiate.md").read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[:3]:
        exec(block, names)
    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    for label, params in (
        ("meta-learned", names["meta"]),
        ("trained on all tasks together", names["pretrained"]),
    ):
        losses = [
            names["vmap"](
                lambda s, q, params=params, k=k: names["adapted"](params, s, q, k)
            )(names["support"], names["query"]).mean()
            for k in range(11)
        ]
        axes.plot(range(11), losses, marker="o", markersize=3, label=label)
    axes.set(
        xlabel="gradient steps on ten points of a new sinusoid",
        ylabel="mean squared error",
        ylim=(0, None),
    )
    axes.legend(frameon=False)
    figure.savefig(HERE / "maml.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
