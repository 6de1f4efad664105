"""Every message that docs/faq.md quotes is raised by the library, word for word."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
from torch import nn, ones
from torch.nn.functional import mse_loss

import functorch_opt as fo

PAGE = Path(__file__).parent.parent / "docs" / "faq.md"


def _module() -> Any:
    return fo.adam(0.1).init(nn.Linear(2, 1))


def _used_up() -> Any:
    parameters = nn.Linear(2, 1).parameters()
    assert sum(p.numel() for p in parameters) == 3
    return fo.adam(0.1).init(list(parameters))


def _without_params() -> Any:
    tx = fo.adamw(0.1)
    return tx.update({"w": ones(3)}, tx.init({"w": ones(3)}))


def _without_value() -> Any:
    tx = fo.polyak_sgd()
    return tx.update({"w": ones(3)}, tx.init({"w": ones(3)}), {"w": ones(3)})


def _unread() -> Any:
    tx, w = fo.chain(fo.clip(1.0), fo.adam(0.1)), {"w": ones(3)}
    return tx.update(w, tx.init(w), w, value=1.0)


def _other_shape() -> Any:
    tx = fo.adam(0.1)
    return tx.update({"w": ones(3, 1)}, tx.init({"w": ones(3)}), {"w": ones(3)})


def _schedule_as_lr() -> Any:
    schedule = fo.cosine_decay_schedule(0.1, 100)
    return fo.optim.AdamW(nn.Linear(2, 1).parameters(), lr=schedule)


def _ready_with_options() -> Any:
    return fo.optim.Optimizer([nn.Parameter(ones(3))], fo.adam(0.1), weight_decay=0.1)


def _other_checkpoint() -> Any:
    saved = fo.state_dict(fo.trace(0.9).init({"w": ones(3)}))
    return fo.load_state_dict(fo.adam(0.1).init({"w": ones(3)}), saved)


def _unknown_in_state() -> Any:
    return fo.get(fo.adam(0.1).init({"w": ones(3)}), "momentum")


def _batch_norm() -> Any:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    data = (ones(8, 2), ones(8, 1))
    return fo.sweep(model, data, fo.sgd, loss=mse_loss, steps=1, learning_rate=[0.1, 0.2])


def _all_diverged() -> Any:
    data = (ones(8, 2), ones(8, 1))
    found = fo.sweep(
        lambda: nn.Linear(2, 1),
        data,
        fo.sgd,
        loss=mse_loss,
        steps=50,
        learning_rate=[1e4, 1e5],
    )
    return found.best


def _mistyped_group() -> Any:
    return fo.optim.groups(nn.Linear(2, 1), {"wieght": {"lr": 0.1}, "*": {}})


def _no_accounting() -> Any:
    return fo.privacy_spent(1.0, 0.1, 10, 1e-5)


RAISES = [
    value
    for name, value in list(globals().items())
    if name.startswith("_") and isinstance(value, FunctionType)
]


def _quoted() -> list[str]:
    blocks = re.findall(r"^```text\n(.*?)^```$", PAGE.read_text(), flags=re.M | re.S)
    return [" ".join(block.split()) for block in blocks]


@pytest.mark.parametrize("call", RAISES, ids=lambda call: call.__name__.strip("_"))
def test_a_quoted_message_is_raised(
    call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises((TypeError, ValueError, LookupError, ImportError)) as caught:
        call()
    message = f"{type(caught.value).__name__}: {caught.value.args[0]}"
    assert " ".join(message.split()) in _quoted()


def test_every_quoted_message_has_its_call() -> None:
    assert len(_quoted()) == len(set(_quoted())) == len(RAISES)
