"""``python -m demo [--out FOLDER]``: the three experiments, their tables and pictures."""

import argparse
import sys
import time
from importlib.util import find_spec
from pathlib import Path

SHOWN = (
    "Eight optimizers: loss over the learning rate, curves, and what each seed ends with.",
    "One chain, trained as pure functions and as an optimizer, and what the network reads.",
    "64 learning rates trained in one run: where it learns, and where it diverges.",
)
"""What the pictures show."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo_output"),
        help="folder for the pictures (default: %(default)s)",
    )
    out = parser.parse_args().out
    missing = [
        package
        for package in ("rich", "matplotlib", "sklearn")
        if find_spec(package) is None
    ]
    if missing:
        sys.exit(
            f"The demo also needs {', '.join(missing)}. In a checkout: pip install -e . --group demo"
        )

    import torch

    from demo import common, digits, race, sweep

    torch.set_num_threads(
        1
    )  # tensors this small gain nothing from more, and the times do not depend on what else the machine does
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    pictures = [section.run(out) for section in (race, digits, sweep)]
    common.title("Pictures")
    for picture, shown in zip(pictures, SHOWN, strict=True):
        common.say(f"{picture.resolve()}\n  {shown}")
    common.say(f"\nDone in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
