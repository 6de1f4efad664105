"""The pictures of the guides: ``python docs/pictures/draw.py`` writes them beside itself. Needs the extra ``demo``."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.functional import cross_entropy

import functorch_opt as fo

HERE = Path(__file__).parent


def learning_rates() -> Figure:
    """`fo.sweep` on the digits: 32 learning rates, two momenta, three seeds."""
    digits = load_digits()
    x, y = torch.tensor(digits.images / 16, dtype=torch.float32).flatten(1), torch.tensor(digits.target)
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
    images = torch.tensor(load_digits().images[:10] / 16, dtype=torch.float32)  # [10, 8, 8]
    axis = torch.linspace(-1, 1, 8)
    pixels = torch.cartesian_prod(axis, axis)  # [64, 2]
    fine = torch.cartesian_prod(*[torch.linspace(-1, 1, 32)] * 2)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    start = {name: p.detach() for name, p in net.named_parameters()}
    tx = fo.adam(0.01)

    def step(params: dict[str, Tensor], state: dict, image: Tensor) -> tuple[dict[str, Tensor], dict, Tensor]:
        def loss(params: dict[str, Tensor]) -> Tensor:
            return ((functional_call(net, params, pixels).squeeze(-1) - image.flatten()) ** 2).mean()

        grads, value = grad_and_value(loss)(params)
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates), state, value

    params = {name: p.expand(10, *p.shape).clone() for name, p in start.items()}
    state, values, drawn = vmap(tx.init)(params), [], {}
    for k in range(1001):
        if k in (0, 30, 200, 1000):
            drawn[k] = vmap(lambda p: functional_call(net, p, fine))(params).detach().view(10, 32, 32)
        params, state, value = vmap(step)(params, state, images)
        values.append(value.mean())
    figure = Figure(figsize=(9, 4.9), layout="constrained")
    rows = {"the image, 8 x 8": images, **{f"{k} steps" if k else "the start": picture for k, picture in drawn.items()}}
    for axes, (title, pictures) in zip(figure.subplots(5, 10), rows.items(), strict=True):
        for ax, picture in zip(axes, pictures, strict=True):
            ax.imshow(picture, cmap="gray_r", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
        axes[0].set_title(title, loc="left", fontsize=9)
    return figure


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, draw in (("sweep", learning_rates), ("model_per_example", model_per_image)):
        draw().savefig(HERE / f"{name}.png", dpi=80)
        print(f"{name}.png")
