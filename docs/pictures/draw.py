"""The pictures of the pages: ``python docs/pictures/draw.py [NAME ...]`` writes them beside itself.

Needs the group ``demo``.
"""

import sys
from pathlib import Path

import torch
from matplotlib import colormaps, rcParams
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.functional import cross_entropy

import functorch_opt as fo

HERE = Path(__file__).parent


def learning_rates() -> Figure:
    """`fo.sweep` on the digits: 32 learning rates, two momenta, three seeds."""
    digits = load_digits()
    x, y = (
        torch.tensor(digits.images / 16, dtype=torch.float32).flatten(1),
        torch.tensor(digits.target),
    )
    result = fo.sweep(
        lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
        (x[:1437], y[:1437]),
        fo.sgd,
        loss=cross_entropy,
        validation=(x[1437:], y[1437:]),
        epochs=5,
        batch_size=64,
        bound=10.0,
        seed=range(3),
        learning_rate=torch.logspace(-4, 1, 32),
        momentum=[0.0, 0.9],
    )
    print(result)
    return result.plot()


def model_per_image() -> Figure:
    """A network from coordinates to brightness for each digit, drawn at four times the size."""
    images = torch.tensor(
        load_digits().images[:10] / 16, dtype=torch.float32
    )  # [10, 8, 8]
    axis = torch.linspace(-1, 1, 8)
    pixels = torch.cartesian_prod(axis, axis)  # [64, 2]
    fine = torch.cartesian_prod(*[torch.linspace(-1, 1, 32)] * 2)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    )
    start = {name: p.detach() for name, p in net.named_parameters()}
    tx = fo.adam(0.01)

    def step(
        params: dict[str, Tensor], state: dict, image: Tensor
    ) -> tuple[dict[str, Tensor], dict, Tensor]:
        def loss(params: dict[str, Tensor]) -> Tensor:
            return (
                (functional_call(net, params, pixels).squeeze(-1) - image.flatten())
                ** 2
            ).mean()

        grads, value = grad_and_value(loss)(params)
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates), state, value

    params = {name: p.expand(10, *p.shape).clone() for name, p in start.items()}
    state, values, drawn = vmap(tx.init)(params), [], {}
    for k in range(1001):
        if k in (0, 30, 200, 1000):
            drawn[k] = (
                vmap(lambda p: functional_call(net, p, fine))(params)
                .detach()
                .view(10, 32, 32)
            )
        params, state, value = vmap(step)(params, state, images)
        values.append(value.mean())
    figure = Figure(figsize=(9, 4.9), layout="constrained")
    rows = {
        "the image, 8 x 8": images,
        **{
            f"{k} steps" if k else "the start": picture
            for k, picture in drawn.items()
        },
    }
    for axes, (title, pictures) in zip(
        figure.subplots(5, 10), rows.items(), strict=True
    ):
        for ax, picture in zip(axes, pictures, strict=True):
            ax.imshow(picture, cmap="gray_r", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
        axes[0].set_title(title, loc="left", fontsize=9)
    return figure


def rosenbrock_valley() -> Figure:
    """Values of the Rosenbrock function on the way from (-1.2, 1)."""

    def f(p: Tensor) -> Tensor:
        return (100 * (p[1:] - p[:-1] ** 2) ** 2 + (1 - p[:-1]) ** 2).sum()

    ways = {
        "lbfgs": fo.lbfgs(),
        "sgd, backtracking search": fo.chain(
            fo.sgd(1.0), fo.scale_by_backtracking_linesearch(30)
        ),
        "sgd(1e-3)": fo.sgd(1e-3),
        "adam(0.02)": fo.adam(0.02),
    }
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    ax = figure.subplots()
    for name, tx in ways.items():
        p = torch.tensor([-1.2, 1.0], dtype=torch.float64)
        state, values = tx.init(p), []
        for _ in range(200):
            gradient, value = grad_and_value(f)(p)
            values.append(value)
            known = {"value": value, "grad": gradient, "value_fn": f}
            updates, state = tx.update(
                gradient, state, p, **{e: known[e] for e in tx.extra_args}
            )
            p = fo.apply_updates(p, updates)
        ax.semilogy(torch.stack(values).clamp_min(1e-16), label=name)
    ax.set(xlabel="step", ylabel="value of the Rosenbrock function")
    ax.legend(frameon=False)
    return figure


def posterior() -> Figure:
    """20,000 chains of Langevin dynamics, each with its own key, in a potential with two wells."""
    learning_rate, n = 0.01, 20_000
    keys = fo.random.split(fo.random.key(0), n)

    def energy(x: Tensor) -> Tensor:
        return (x**2 - 1) ** 2 + 0.3 * x

    def chain(key: Tensor) -> Tensor:
        tx, x = fo.sgld(learning_rate, key=key), torch.zeros(())
        state = tx.init(x)
        for _ in range(500):
            updates, state = tx.update(4 * x * (x**2 - 1) + 0.3, state)
            x = fo.apply_updates(x, updates)
        return x

    x = torch.linspace(-2.3, 2.3, 300)
    density = torch.exp(-energy(x))
    figure = Figure(figsize=(7, 3), layout="constrained")
    ax = figure.subplots()
    ax.hist(
        vmap(chain)(keys),
        bins=90,
        range=(-2.3, 2.3),
        density=True,
        color="0.8",
        label="the ends of 20,000 chains",
    )
    ax.plot(x, density / torch.trapezoid(density, x), label="exp(-U), normalized")
    ax.set(xlabel="x", yticks=[])
    ax.legend(frameon=False)
    return figure


def ensemble() -> Figure:
    """64 networks with 64 learning rates, fitted to a sine in one run."""
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 32).unsqueeze(1)
    net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    rates = torch.logspace(-4, 0, 64)

    def step(
        params: dict[str, Tensor], state: dict, rate: Tensor
    ) -> tuple[dict[str, Tensor], dict, Tensor]:
        gradients, value = grad_and_value(
            lambda p: ((functional_call(net, p, x) - torch.sin(3 * x)) ** 2).mean()
        )(params)
        updates, state = fo.adam(rate).update(gradients, state, params)
        return fo.apply_updates(params, updates), state, value

    params = {
        name: p.detach().expand(64, *p.shape).clone()
        for name, p in net.named_parameters()
    }
    state, values = vmap(fo.adam(0.1).init)(params), []
    for _ in range(300):
        params, state, value = vmap(step)(params, state, rates)
        values.append(value)
    curves = torch.stack(values)  # [steps, models]
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    ax = figure.subplots()
    colors = colormaps["viridis"](torch.linspace(0, 1, 64))
    for curve, color in zip(curves.T, colors, strict=True):
        ax.semilogy(curve, color=color, linewidth=0.8)
    ax.set(xlabel="step", ylabel="loss of each model", ylim=(1e-6, 10))
    figure.colorbar(
        ScalarMappable(LogNorm(1e-4, 1.0), "viridis"),
        ax=ax,
        label="its learning rate",
    )
    return figure


def sixty_four() -> Figure:
    """64 networks on the digits, each with its own learning rate, trained in one run."""
    digits = load_digits()
    x = torch.tensor(digits.images / 16, dtype=torch.float32).flatten(1)
    y = torch.tensor(digits.target)
    rates = torch.logspace(-5, 0.5, 64)
    result = fo.sweep(
        lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
        (x[:1437], y[:1437]),
        fo.adam,
        loss=cross_entropy,
        validation=(x[1437:], y[1437:]),
        epochs=15,
        batch_size=64,
        learning_rate=rates,
    )
    print(result)
    colors = colormaps["plasma"](torch.linspace(0, 0.93, 64))
    figure = Figure(figsize=(10, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.6, 1))
    for curve, color in zip(result.curves, colors, strict=True):
        smooth = curve.unfold(0, 15, 1).mean(-1)
        left.semilogy(smooth, color=color, linewidth=0.9)
    left.set(xlabel="step", ylabel="training loss", ylim=(2e-3, 20))
    left.set_title("64 networks, 64 learning rates, one run", loc="left", fontsize=10)
    right.scatter(rates, result.losses, c=colors, s=22, zorder=2)
    right.plot(rates, result.losses, color="0.8", linewidth=1, zorder=1)
    best = int(result.losses.argmin())
    right.annotate(
        f"best: {rates[best]:.2g}",
        (float(rates[best]), float(result.losses[best])),
        xytext=(0, -16),
        textcoords="offset points",
        ha="center",
        fontsize=9,
    )
    low = float(result.losses[best])
    right.set(xscale="log", yscale="log", xlabel="learning rate", ylim=(0.6 * low, 6))
    right.set_title("loss on held-out digits", loc="left", fontsize=10)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    return figure


PLAIN, ONCE, RULE, KERNEL = (
    ("white", "#8c959f"),
    ("#ddf4ff", "#54aeff"),
    ("#fff8c5", "#d4a72c"),
    ("#ffebe9", "#ff8182"),
)
"""Colors of boxes, face and edge: of anything, of what is worked out once a step, of rules, of
compiled code.
"""

EXECUTIONS = {
    "tx.update": (
        "pure: vmap, grad, torch.compile",
        ("flatten the tree and check it", PLAIN),
        ("prepare: a few scalars", ONCE),
        ("a leaf through all rules,\nthen the next leaf", RULE),
        ("new updates, new state", PLAIN),
    ),
    "fo.compiled_step": (
        "compiled, in place",
        ("prepare: a few scalars", ONCE),
        ("a walk over the declaration\ncollects the rules of each leaf", RULE),
        ("a compiled program\nfor each kind of leaf", KERNEL),
        ("parameters and slots, in place", PLAIN),
    ),
    "fo.optim": (
        "a torch.optim.Optimizer",
        ("read p.grad, state[p], groups", PLAIN),
        ("lay them out as one tree", PLAIN),
        ("run the declaration,\neager or compiled", RULE),
        ("write back, in place", PLAIN),
    ),
}


def executions() -> Figure:
    """One declaration, and the steps of each execution that is derived from it."""
    figure = Figure(figsize=(9, 5))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 90), ylim=(0, 50))
    ax.axis("off")

    def write(x: float, y: float, text: str, **style: object) -> None:
        ax.text(x, y, text, ha="center", va="center", **{"fontsize": 9, **style})

    def box(
        x: float, y: float, width: float, height: float, colors: tuple[str, str]
    ) -> None:
        """A box around the point (x, y)."""
        face, edge = colors
        corner = (x - width / 2, y - height / 2)
        style = "round,pad=0,rounding_size=0.6"
        ax.add_patch(
            FancyBboxPatch(
                corner, width, height, style, facecolor=face, edgecolor=edge
            )
        )

    def arrow(x: float, above: float, below: float) -> None:
        line = {"arrowstyle": "->", "color": "#57606a", "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", (x, below), (x, above), arrowprops=line)

    box(45, 44.5, 84, 8, PLAIN)
    write(45, 46.8, "one declaration", fontweight="bold", fontsize=10)
    write(
        45,
        44.2,
        "prepare, once a step;  rule, for one tensor;  the names of their arguments",
    )
    write(
        45,
        42.0,
        "combined by chain, masked, partition, inject_hyperparams, wraps, gates",
    )
    for x, (name, (what, *steps)) in zip(
        (16, 45, 74), EXECUTIONS.items(), strict=True
    ):
        arrow(x, 40.5, 37.8)
        write(x, 36.4, name, family="monospace", fontsize=10.5)
        write(x, 34.2, what, color="#57606a")
        for i, (step, colors) in enumerate(steps):
            y = 30 - 7 * i
            box(x, y, 26, 5, colors)
            write(x, y, step)
            arrow(x, y - 2.5, y - 4.5)
    box(45, 2.5, 84, 4, PLAIN)
    write(
        45, 2.5, "the same numbers, for any pure rule, or an error", fontweight="bold"
    )
    return figure


PICTURES = {
    "executions": executions,
    "sweep": learning_rates,
    "model_per_example": model_per_image,
    "line_search": rosenbrock_valley,
    "random": posterior,
    "many_models": ensemble,
    "sixty_four": sixty_four,
}

AS_SVG = ("executions",)
"""Pictures without measurements; they are drawn as lines and letters."""

DPI = {"sixty_four": 120}
"""What is drawn finer than the others."""

if __name__ == "__main__":
    torch.set_num_threads(1)
    rcParams["svg.hashsalt"] = "functorch_opt"  # The same picture is the same file.
    rcParams["svg.fonttype"] = (
        "none"  # Letters stay letters, which takes a fifth of the space.
    )
    for name in sys.argv[1:] or PICTURES:
        file = HERE / f"{name}.{'svg' if name in AS_SVG else 'png'}"
        metadata = {"Date": None} if name in AS_SVG else None
        PICTURES[name]().savefig(file, dpi=DPI.get(name, 80), metadata=metadata)
        print(file.name)
