"""The space as nni's grammar: the labels it draws from and the samples it takes and refuses."""

import pytest

from search_spaces.method import Settings
from search_spaces.registry import METHODS
from search_spaces.slices import BlockShape
from search_spaces.space import make_space

SPACE = make_space(
    "vit-dan", METHODS["dan"], Settings(), [BlockShape(0, 48, heads, 48 // heads, 96) for heads in (4, 6, 4)]
)


def test_labels_name_block_and_choice() -> None:
    grammar = SPACE.mutable().simplify()
    assert set(grammar) == {SPACE.label(i, "alpha") for i in range(3)}
    assert [len(grammar[SPACE.label(i, "alpha")]) for i in range(3)] == [3, 4, 3]


def test_a_sample_becomes_picks() -> None:
    assert SPACE.freeze({SPACE.label(0, "alpha"): 4, SPACE.label(1, "alpha"): 6, SPACE.label(2, "alpha"): 1}) == [
        {"alpha": 4},
        {"alpha": 6},
        {"alpha": 1},
    ]


def test_a_candidate_that_a_block_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="3 not found"):
        SPACE.freeze({SPACE.label(0, "alpha"): 3, SPACE.label(1, "alpha"): 6, SPACE.label(2, "alpha"): 1})


def test_random_picks_are_the_space_own_and_repeat_with_the_seed() -> None:
    picks = SPACE.random(3)
    assert picks == SPACE.random(3)
    assert any(SPACE.random(seed) != picks for seed in range(4, 8))
    assert all(pick["alpha"] in choices["alpha"] for pick, choices in zip(picks, SPACE.candidates, strict=True))
