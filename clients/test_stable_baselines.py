"""stable-baselines3: PPO, whose run is the same as with torch's Adam and the same seed."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from torch import Tensor

import functorch_opt as fo

OURS: dict[str, tuple[Any, dict[str, Any]]] = {
    "named": (fo.optim.Adam, {}),
    "chained": (fo.optim.Optimizer, {"tx": fo.adam}),
    "named_compiled": (fo.optim.Adam, {"compile": True}),
    "chained_compiled": (fo.optim.Optimizer, {"tx": fo.adam, "compile": True}),
}


def run(
    choice: tuple[Any, dict[str, Any]], steps: int = 2048
) -> tuple[PPO, np.ndarray, list[Tensor]]:
    """The agent, all actions that it tried, and what was learned."""
    actions: list[np.ndarray] = []

    def look(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        actions.append(locals_["actions"].copy())
        return True

    cls, options = choice
    policy = {"optimizer_class": cls, "optimizer_kwargs": {"eps": 1e-5, **options}}
    agent = PPO(
        "MlpPolicy",
        gymnasium.make("CartPole-v1"),
        n_steps=256,
        batch_size=64,
        n_epochs=4,
        learning_rate=lambda left: 1e-3 * left,
        policy_kwargs=policy,
        seed=0,
        device="cpu",
    )
    agent.learn(steps, callback=look)
    return agent, np.concatenate(actions), [*agent.policy.parameters()]


@pytest.mark.parametrize("choice", OURS.values(), ids=OURS)
def test_ppo(choice: tuple[Any, dict[str, Any]]) -> None:
    agent, actions, ours = run(choice)
    _, expected, theirs = run((torch.optim.Adam, {}))
    assert np.array_equal(actions, expected)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-6)
    agent.save("agent.zip")
    again = PPO.load("agent.zip", env=agent.get_env())
    assert type(again.policy.optimizer) is choice[0]
    for one in (agent, again):
        one.set_random_seed(1)
        one.learn(256)
    for a, b in zip(agent.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(a, b)
