"""What a space offers over a backbone's blocks, what it leaves out and what it refuses."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from search_spaces.errors import UserError
from search_spaces.method import Settings
from search_spaces.registry import METHODS, SPACES, get_space
from search_spaces.slices import BlockShape, BlockSlice
from search_spaces.space import (
    SearchSpace,
    block_slices,
    check_uniform_alpha,
    make_space,
    require_search,
    uniform_alphas,
)

SHAPES = [BlockShape(0, 48, 4, 12, 96), BlockShape(0, 48, 6, 8, 96), BlockShape(1, 96, 12, 8, 384)]


def space(method: str = "dan", width: str = "stream", alphas: tuple[int, ...] | None = None) -> SearchSpace:
    return make_space(f"vit-{method}", METHODS[method], Settings(width=width, alphas=alphas), SHAPES)


def test_candidates_are_the_divisors_of_the_heads_up_to_8() -> None:
    assert [block["alpha"] for block in space().candidates] == [(1, 2, 4), (1, 2, 3, 6), (1, 2, 3, 4, 6)]
    assert space().size() == 3 * 4 * 5
    assert space().dropped == ()


def test_an_offer_that_does_not_divide_a_block_is_left_out_of_it_and_said() -> None:
    offered = space(alphas=(4, 1, 3, 2, 2))
    assert [block["alpha"] for block in offered.candidates] == [(1, 2, 4), (1, 2, 3), (1, 2, 3, 4)]
    assert offered.dropped == (
        "block 0: alpha 3 left out (4 heads allow 1, 2, 4)",
        "block 1: alpha 4 left out (6 heads allow 1, 2, 3, 6)",
    )
    assert offered.size() == 3 * 3 * 4


def test_neurons_and_the_stream_must_be_divisible_as_well() -> None:
    odd = [BlockShape(0, 50, 6, 8, 90)]  # 50 channels, whatever the heads are
    narrow, wide = (make_space("x", METHODS["dan"], Settings(width=w), odd) for w in ("stream", "inner"))
    assert narrow.candidates[0]["alpha"] == (1, 2)
    assert wide.candidates[0]["alpha"] == (1, 2, 3, 6)


def test_picks_become_slices() -> None:
    picks = [{"alpha": 4}, {"alpha": 3}, {"alpha": 1}]
    assert space().block_slices(picks) == [BlockSlice(12, 1, 24), BlockSlice(16, 2, 32), BlockSlice(96, 12, 384)]
    assert [s.stream for s in space(width="inner").block_slices(picks)] == [48, 48, 96]


def test_random_picks_reach_every_candidate_and_no_other() -> None:
    drawn = [space().random(seed) for seed in range(80)]
    for i, block in enumerate(space().candidates):
        assert {picks[i]["alpha"] for picks in drawn} == set(block["alpha"])


@pytest.mark.parametrize("sample", [{"block0/alpha": 1}, {"block0/alpha": 3, "block1/alpha": 1, "block2/alpha": 1}])
def test_freeze_refuses_what_is_missing_or_not_offered(sample: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"block0|block1|alpha|3"):
        space().freeze(sample)


@pytest.mark.parametrize(
    ("picks", "says"),
    [
        ([{"alpha": 1}] * 2, "2 blocks in the architecture, 3 in the backbone"),
        ([{"alpha": 1}, {"alpha": 4}, {"alpha": 1}], "block 1: alpha 4 does not divide .*allowed: alpha: 1, 2, 3, 6"),
    ],
)
def test_picks_that_do_not_fit_are_refused_by_block(picks: list[dict[str, int]], says: str) -> None:
    with pytest.raises(UserError, match=says):
        space().block_slices(picks)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_no_pick_is_read_as_another_number(method: str) -> None:
    shape = SHAPES[2]
    named = METHODS[method]
    good = {name: c[0] for name, c in named.choices(shape, Settings())[0].items()}
    assert block_slices("a space", named, Settings(), [shape], [good])
    for name in named.choice_names:
        wrong = [-1, -0.0001, 10**30, math.nan, math.inf, -math.inf, True, None, "2", [1], {"a": 1}]
        wrong += [7.5] if name == "fraction" else [0.5, 1.5, 2.000001]
        for value in wrong:
            with pytest.raises(UserError, match=f"a space: block 0.*{name}"):
                block_slices("a space", named, Settings(), [shape], [{**good, name: value}])


def test_what_no_search_can_use_is_refused() -> None:
    with pytest.raises(UserError, match=r"alpha 0; .*at least 1"):
        space(alphas=(0, 1))
    with pytest.raises(UserError, match=r"block 0 has no candidate of alpha: alpha 3 left out \(4 heads"):
        space(alphas=(3, 6))
    with pytest.raises(UserError, match="width 'narrow'; expected one of stream, inner"):
        space(width="narrow")
    with pytest.raises(UserError, match=r"no block has two candidates.*--alphas"):
        require_search(space(alphas=(1,)))
    require_search(space(alphas=(1, 3)))  # two blocks have two


def test_an_takes_what_every_block_allows() -> None:
    assert uniform_alphas(space("an")) == [1, 2]
    check_uniform_alpha(space("an"), 2)
    with pytest.raises(UserError, match=r"alpha 4 does not divide blocks 1 \(heads: 6\); allowed: 1, 2"):
        check_uniform_alpha(space("an"), 4)


def test_spaces_are_found_by_name_or_by_nearness() -> None:
    assert all(get_space(name).name == name for name in SPACES)
    assert {f"{family}-{method}{nano}" for family in ("swin", "vit", "deit", "t2t") for method in ("an", "dan")
            for nano in ("", "-nano")} <= set(SPACES)  # fmt: skip
    with pytest.raises(UserError, match="did you mean swin-dan"):
        get_space("swin-dann")


def test_spaces_slices_and_architectures_need_neither_torch_nor_nni() -> None:
    script = (
        "import sys, search_spaces.registry, search_spaces.architecture, search_spaces.space\n"
        "print([m for m in ('torch', 'nni', 'timm', 'supernets', 'nas') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
