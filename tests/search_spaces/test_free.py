"""Free widths: one choice of the stream for a stage, every other one a block's own; what is offered and refused."""

import math
import re
from collections.abc import Mapping
from typing import Any

import pytest

from search_spaces.errors import UserError
from search_spaces.free import Free, multiples
from search_spaces.method import Settings
from search_spaces.registry import METHODS, SPACES
from search_spaces.slices import BlockShape, BlockSlice, identity_slice
from search_spaces.space import SearchSpace, make_space, require_search, spell

SHAPES = [BlockShape(0, 24, 3, 8, 48), BlockShape(0, 24, 3, 8, 40), BlockShape(1, 48, 6, 8, 96)]
NAMES = ("stream", "heads", "qk", "v", "hidden")


def space(shapes: list[BlockShape] = SHAPES, **settings: Any) -> SearchSpace:
    return make_space("vit-free", Free(), Settings(**settings), shapes)


def picks_of(*widths: tuple[int, ...]) -> list[dict[str, int]]:
    return [dict(zip(NAMES, each, strict=True)) for each in widths]


PICKS = picks_of((16, 2, 8, 8, 24), (16, 3, 8, 8, 0), (48, 0, 8, 8, 96))


# The grammar


def test_blocks_of_a_stage_share_one_choice_of_the_stream() -> None:
    own = space()
    grammar = own.mutable().simplify()
    assert set(grammar) == {"stage0/stream", "stage1/stream"} | {
        f"block{i}/{name}" for i in range(3) for name in NAMES[1:]
    }
    assert own.label(0, "stream") == own.label(1, "stream") == "stage0/stream"
    assert own.label(1, "heads") == "block1/heads"


def test_its_size_counts_a_stages_choice_once() -> None:
    own = space()
    alone = [{name: len(c) for name, c in block.items()} for block in own.candidates]
    streams = alone[0]["stream"] * alone[2]["stream"]
    assert own.size() == streams * math.prod(n for block in alone for name, n in block.items() if name != "stream")
    assert space(fixed=NAMES).size() == 1
    assert space([BlockShape(0, 768, 12, 64, 3072)] * 400).size() == 10**300  # what a float holds


def test_random_picks_agree_in_a_stage_and_reach_every_candidate() -> None:
    own = space()
    drawn = [own.random(seed) for seed in range(60)]
    assert own.random(3) == drawn[3] != drawn[4]
    assert all(picks[0]["stream"] == picks[1]["stream"] for picks in drawn)
    assert any(picks[0]["heads"] != picks[1]["heads"] for picks in drawn)
    for i, block in enumerate(own.candidates):
        for name in ("stream", "heads"):
            assert {picks[i][name] for picks in drawn} == set(block[name])
    for picks in drawn:
        assert own.validated(picks) == picks
        assert len({kept.stream for kept in own.block_slices(picks)[:2]}) == 1


def test_a_sample_is_frozen_to_picks_that_agree() -> None:
    own = space()
    sample = {own.label(i, name): pick[name] for i, pick in enumerate(PICKS) for name in NAMES}
    assert own.freeze(sample) == PICKS == own.validated(PICKS)
    with pytest.raises(ValueError, match="stage0/stream"):
        own.freeze({label: pick for label, pick in sample.items() if label != "stage0/stream"})
    with pytest.raises(ValueError, match="17 not found"):
        own.freeze(sample | {"stage0/stream": 17})


def test_blocks_of_a_stage_that_differ_are_both_named() -> None:
    wrong = [PICKS[0], PICKS[1] | {"stream": 24}, PICKS[2]]
    says = "vit-free: block 1 has stream 24, block 0 of the same stage 16; they are to be the same"
    for read in (space().validated, space().block_slices):
        with pytest.raises(UserError, match=f"^{re.escape(says)}$"):
            read(wrong)


# What is offered


def test_multiples_of_the_granularity_and_the_whole() -> None:
    (block,) = space([BlockShape(0, 100, 4, 20, 400)]).candidates
    assert block["stream"] == (100, 96, 88, 80, 72, 64, 56, 48, 40, 32)  # from a quarter on
    assert block["heads"] == (4, 3, 2, 1, 0)
    assert block["qk"] == block["v"] == (20, 16, 8)
    assert block["hidden"][0] == 400 and block["hidden"][-1] == 0 and len(block["hidden"]) == 33
    assert all(width % 8 == 0 for width in block["hidden"])


@pytest.mark.parametrize("step", [1, 2, 3, 8, 64, 1000])
@pytest.mark.parametrize("shape", [*SHAPES, BlockShape(0, 72, 6, 12, 288), BlockShape(0, 4, 1, 4, 1)], ids=str)
def test_every_granularity_offers_the_whole_first_and_nothing_else_that_is_no_multiple(
    step: int, shape: BlockShape
) -> None:
    (block,) = space([shape], granularity=step).candidates
    whole = Free().whole(shape)
    assert tuple(block) == NAMES
    for name, candidates in block.items():
        assert candidates == tuple(sorted(set(candidates), reverse=True)) and candidates[0] == whole[name]
        if name != "heads":
            assert all(int(c) % step == 0 for c in candidates[1:])
        assert min(candidates) >= (0 if name in ("heads", "hidden") else 1)
    assert {0, whole["heads"]} <= set(block["heads"]) and {0, whole["hidden"]} <= set(block["hidden"])
    assert all(4 * c >= shape.embed_dim for c in block["stream"])
    if step == 1:
        assert block["qk"] == block["v"] == tuple(range(shape.head_dim, 0, -1))
    if step == 1000:
        assert {name: len(c) for name, c in block.items() if name not in ("heads", "hidden")} == dict(
            stream=1, qk=1, v=1
        )


def test_multiples_are_within_their_bounds() -> None:
    assert multiples(8, 6, 24) == {8, 16, 24} and multiples(8, 9, 20) == {16, 20} and multiples(64, 1, 12) == {12}


def test_a_block_that_is_kept_chooses_its_stage_alone() -> None:
    kept = space(keep_blocks=(1,))
    free = space()
    assert kept.candidates[1] == {name: free.candidates[1][name][: None if name == "stream" else 1] for name in NAMES}
    assert (kept.candidates[0], kept.candidates[2]) == (free.candidates[0], free.candidates[2])
    whole = identity_slice(SHAPES[1])
    for picks in (kept.random(seed) for seed in range(5)):
        own = kept.block_slices(picks)[1]
        assert own == BlockSlice(own.stream, whole.heads, whole.hidden)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kept", [(), (0, 2)])
def test_a_choice_that_is_fixed_is_whole_everywhere(kept: tuple[int, ...], name: str) -> None:
    """In blocks that are kept, too."""
    fixed, free = space(fixed=(name,), keep_blocks=kept), space(keep_blocks=kept)
    for shape, block, other in zip(SHAPES, fixed.candidates, free.candidates, strict=True):
        assert block[name] == (Free().whole(shape)[name],)
        assert {n: c for n, c in block.items() if n != name} == {n: c for n, c in other.items() if n != name}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a block after the last": (dict(keep_blocks=(0, 3)), "--keep-block 3; the backbone has blocks 0 to 2"),
    "a block before the first": (dict(keep_blocks=(-1,)), "--keep-block -1; the backbone has blocks 0 to 2"),
    "no such choice": (dict(fixed=("width",)), "--fix width; expected some of stream, heads, qk, v, hidden"),
    "a step of nothing": (dict(granularity=0), "--granularity 0; expected a whole number of at least 1"),
    "a step back": (dict(granularity=-8), "--granularity -8; expected a whole number of at least 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_no_space_has_are_refused(case: str) -> None:
    settings, says = REFUSED[case]
    with pytest.raises(UserError, match=f"^{re.escape(f'vit-free: {says}')}$"):
        space(**settings)


def test_a_space_in_which_nothing_is_left_to_choose_is_refused() -> None:
    with pytest.raises(UserError, match=r"no block has two candidates.*--granularity, --keep-block and --fix"):
        require_search(space(fixed=NAMES))
    with pytest.raises(UserError, match="no block has two candidates"):
        require_search(space(keep_blocks=(0, 1, 2), fixed=("stream",)))
    require_search(space(keep_blocks=(0, 1, 2)))  # the stream


@pytest.mark.parametrize("method", [name for name in METHODS if name != "free"])
def test_other_methods_have_no_such_choices(method: str) -> None:
    with pytest.raises(UserError, match="--fix qk; expected some of"):
        make_space("x", METHODS[method], Settings(fixed=("qk",)), SHAPES)


# Slices


def test_picks_become_slices() -> None:
    slices = space().block_slices(picks_of((16, 2, 4, 6, 24), (16, 3, 8, 8, 0), (48, 0, 1, 1, 96)))
    assert slices == [
        BlockSlice(16, 2, 24, qk=4, v_channels=6),
        BlockSlice(16, 3, 40, mlp=False),
        BlockSlice(48, 6, 96, qk=1, v_channels=1, attn=False),
    ]
    whole = [Free().whole(shape) for shape in SHAPES]
    assert space().block_slices(whole) == [identity_slice(shape) for shape in SHAPES]


OUTSIDE: list[tuple[dict[str, Any], str]] = [
    ({"heads": 4}, "heads 4 of 3"),
    ({"heads": -1}, "heads -1 is no whole number of at least 0"),
    ({"qk": 9}, "qk 9 of 8"),
    ({"qk": 0}, "qk 0 is no whole number of at least 1"),
    ({"v": 0}, "v 0 is no whole number of at least 1"),
    ({"v": 2.5}, "v 2.5 is no whole number of at least 1"),
    ({"hidden": 41}, "hidden 41 of 40"),
]


@pytest.mark.parametrize(("change", "says"), OUTSIDE, ids=str)
def test_a_width_outside_its_range_is_refused_with_the_block_and_what_it_allows(
    change: Mapping[str, Any], says: str
) -> None:
    with pytest.raises(UserError) as error:
        space(granularity=1).block_slices([PICKS[0], PICKS[1] | change, PICKS[2]])
    words = str(error.value)
    assert words.startswith(f"vit-free: block 1: {says}; allowed: ") and "\n" not in words
    allowed = dict(part.split(": ", 1) for part in words.split("allowed: ")[1].split("; "))
    assert tuple(allowed) == NAMES
    assert allowed["qk"] == allowed["v"] == "8, 7, 6, 5, 4, 3, 2, 1" and allowed["stream"] == "6 to 24"
    assert allowed["heads"] == "3, 2, 1, 0" and allowed["hidden"].startswith("40, 39, 38, 36")


@pytest.mark.parametrize("stream", [25, 0, -8, 6.5])
def test_a_stream_outside_its_range_is_refused(stream: float) -> None:
    with pytest.raises(UserError, match=rf"block 0: stream {stream:g} .*; allowed: stream: 6 to 24"):
        space().block_slices([pick | {"stream": stream} for pick in PICKS[:2]] + PICKS[2:])


def test_candidates_are_spelt_short() -> None:
    assert spell((3, 2, 1)) == "3, 2, 1" and spell(tuple(range(20, 0, -1))) == "1 to 20"
    assert spell(tuple(range(0, 104, 8))) == "0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96"


# The spaces


@pytest.mark.parametrize("name", [name for name, s in SPACES.items() if s.method.name == "free"])
def test_its_spaces_search_without_training_and_distil_with_the_start_among_the_results(name: str) -> None:
    own = SPACES[name]
    assert own.search["epochs"] == 0 and own.search["budget"] == 0.5
    assert own.retrain["train"] == "distill" and own.retrain["result"] == "best"
    assert own.search.get("granularity") == (1 if own.nano else None)
