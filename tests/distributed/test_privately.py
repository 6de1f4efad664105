"""Private training on many ranks: clipped sums, norms and noise are those of one process."""

from __future__ import annotations

import privately
import pytest

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, "copies"),
        (2, "FSDP2"),
        pytest.param(2, "the same examples", marks=SLOW),
        pytest.param(4, "copies", marks=SLOW),
        pytest.param(4, "HSDP", marks=SLOW),
        pytest.param(4, "beside copies", marks=SLOW),
        pytest.param(4, "tensor parallel", marks=SLOW),
    ],
)
def test_a_private_training_is_that_of_one_process(
    ranks, world: int, layout: str
) -> None:
    """Batches of 9, 0, 1 and 8 examples, as Poisson sampling gives; some ranks have none."""
    for seen in ranks(world).run(privately.trained, layout, [9, 0, 1, 8]):
        assert seen["sums"] < 1e-12
        assert seen["trained"] < 1e-12
        assert seen["moved"] > 0.05
        assert seen["alike"]
        assert seen["ordinary"] == (layout == "copies")


def test_the_noise_is_that_of_one_process_to_the_bit(ranks) -> None:
    assert ranks(2).run(privately.noise) == [[True, True]] * 2


@pytest.mark.parametrize("cut", ["examples", "rows", "columns", "copies"])
def test_gradients_of_examples_that_are_cut(ranks, cut: str) -> None:
    for errors in ranks(2).run(privately.clipped, cut):
        assert max(errors.values()) < 1e-12, errors


@SLOW
@pytest.mark.parametrize(
    "cut",
    [
        "examples and rows",
        "rows and examples",
        "rows and columns",
        "copies of columns",
    ],
)
def test_gradients_of_examples_that_are_cut_twice(ranks, cut: str) -> None:
    for errors in ranks(4).run(privately.clipped, cut):
        assert max(errors.values()) < 1e-12, errors


def test_each_rank_makes_the_gradients_of_its_examples(ranks) -> None:
    assert max(ranks(2).run(privately.per_example)) < 1e-12


def test_gradients_that_are_terms_of_a_sum(ranks) -> None:
    assert max(ranks(2).run(privately.terms)) < 1e-12


def test_one_message_for_all_sums_and_one_for_all_norms(ranks) -> None:
    assert ranks(2).run(privately.messages) == [{"sums": 1, "norms": 1}] * 2


def test_what_cannot_be_is_an_error(ranks) -> None:
    errors = ranks(2).run(privately.refused)[0]
    ordinary, one, columns, derivative, apart, mesh, owned, strided = errors
    for error in (ordinary, one, columns):
        assert "ValueError: clipped_grad_sum: with many ranks each tensor" in error
    assert "NotImplementedError: clipped_grad_sum: no derivative" in derivative
    assert "ValueError: clip_and_sum: the examples of some gradients" in apart
    assert "ValueError: the examples are divided on" in mesh
    assert "TypeError: clip_and_sum takes no tensors with owners" in owned
    assert "TypeError: clip_and_sum takes no gradient that is cut as _S(1, 2)" in strided
