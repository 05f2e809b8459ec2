"""Latency by a table: what lies between its points, what its file may say, and what it cannot price (section 2.13)."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm

from nas.prices.costs import priced
from nas.prices.halves import Halves
from nas.prices.latency import Latency
from nas.prices.latency_table import HalfTimes, OutsideTimes, grid_products, read_table
from nas.prices.options import PriceOptions
from search_spaces.errors import UserError
from search_spaces.method import Settings
from search_spaces.registry import METHODS
from search_spaces.slices import identity_slice, network_slice
from search_spaces.space import make_space
from supernets.chains import Kind, kinds_of_block
from supernets.supernet import Supernet
from tests.nas.free import free_costs
from tests.nas.prices.drawn_table import drawn_table
from tests.nas.small import small_supernet

ATTENTION = {"stream": (16, 32, 64), "heads": (1, 2, 4), "qk": (4, 8, 16), "v": (4, 8, 16)}


def timed(of: Callable[[Mapping[str, int]], float], grid: Mapping[str, tuple[int, ...]], **lines: Any) -> HalfTimes:
    ns = np.array([of(widths) for widths in grid_products(grid)]).reshape([len(v) for v in grid.values()])
    largest = {name: values[-1] for name, values in grid.items()}
    found = {n: (at, np.array([of(largest | {n: value}) for value in at])) for n, at in lines.items()}
    return HalfTimes(grid, ns, found)


def macs(widths: Mapping[str, int]) -> float:
    """As attention runs: q, k and v padded to the wider of both."""
    s, h, qk, v = widths.values()
    return 500 + s * h * (2 * qk + 2 * v) + 2 * 50 * h * max(qk, v)


def test_what_macs_say_is_found_exactly_between_the_points() -> None:
    times = timed(macs, ATTENTION)
    for widths in grid_products({"stream": (16, 24, 50, 64), "heads": (1, 3, 4), "qk": (4, 6, 8, 11, 16), "v": (5, 8)}):
        if (widths["qk"] > 8) == (widths["v"] > 8) or widths["qk"] >= 8 >= widths["v"]:
            assert times.at(widths) == pytest.approx(macs(widths), rel=1e-12)


def test_a_step_stays_where_a_line_has_found_it() -> None:
    def tiled(widths: Mapping[str, int]) -> float:
        return macs(widths) * (1.5 if widths["stream"] > 40 else 1.0)

    fine = timed(tiled, ATTENTION, stream=tuple(range(16, 65, 8)))
    whole = {name: values[-1] for name, values in ATTENTION.items()}
    assert fine.at(whole | {"stream": 40}) == pytest.approx(tiled(whole | {"stream": 40}))
    assert fine.at(whole | {"stream": 48}) == pytest.approx(tiled(whole | {"stream": 48}))
    smaller = {"stream": 40, "heads": 2, "qk": 8, "v": 8}
    smooth = timed(tiled, ATTENTION)
    error = [abs(times.at(smaller) / tiled(smaller) - 1) for times in (fine, smooth)]
    assert error[0] < 0.02 < error[1]


def test_below_the_least_it_is_the_least() -> None:
    times = timed(macs, ATTENTION)
    least = {name: values[0] for name, values in ATTENTION.items()}
    assert times.at(least | {"qk": 1, "v": 1}) == times.at(least)


def test_what_lies_outside_the_blocks_adds_up_over_neighbouring_stages() -> None:
    base, grids = (8, 16, 32), ((4, 8), (8, 16), (16, 32))

    def whole(a: int, b: int, c: int) -> float:
        return 100 + 3 * a + a * b + 2 * b * c + 7 * c

    pairs = (
        (grids[0], grids[1], np.array([[whole(a, b, 32) for b in grids[1]] for a in grids[0]])),
        (grids[1], grids[2], np.array([[whole(8, b, c) for c in grids[2]] for b in grids[1]])),
    )
    times = OutsideTimes(base, pairs)
    for widths in [(4, 8, 16), (8, 16, 32), (6, 12, 24), (4, 16, 20)]:
        assert times.at(widths) == pytest.approx(whole(*widths), abs=2)
        terms = [times.of_stage(s, w) for s, w in enumerate(widths)]
        terms += [times.of_merging(s, *widths[s : s + 2]) for s in (0, 1)]
        assert times.at(widths) == sum(terms) + times.constant


@pytest.mark.parametrize("family", ["vit", "swin", "t2t", "eva"])
def test_a_table_is_read_as_it_was_written(family: str, tmp_path: Path) -> None:
    supernet = small_supernet(family)
    table = drawn_table(supernet)
    path = tmp_path / "latency.json"
    path.write_text(json.dumps(table.record()))
    again = read_table(path)
    assert again.record() == table.record() and again.path == path
    costs = priced(free_costs(supernet).space, supernet.adapter.costs, Latency(again))
    mine = free_costs(supernet, "latency")
    assert costs.full == mine.full > 0
    halves, read = Halves(mine), Halves(costs)
    for half in range(len(halves)):
        width = halves.widths(halves.stage(half))[0]
        assert (halves.costs(half, width) == read.costs(half, width)).all()
        gone = [k for k, option in enumerate(halves.options(half)) if not option.slice.attn and not option.slice.mlp]
        assert [halves.costs(half, width)[k] for k in gone] == [0] * len(gone)


def damaged(record: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(record))
    at: Any = found
    *path, last = place.split(".")
    for name in path:
        at = at[int(name) if name.isdigit() else name]
    if value is KeyError:
        del at[last]
    else:
        at[int(last) if last.isdigit() else last] = value
    return found


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("format", "other", "format is 'other'; expected 'vit-nas latency table'"),
        ("schema", 2, "schema is 2; expected 1; make the table anew"),
        ("unit", "ms", "unit is 'ms'"),
        ("setting", KeyError, "setting is missing"),
        ("setting.batch_size", "one", "setting.batch_size is 'one'; expected a number"),
        ("setting.threads", True, "setting.threads is True"),
        ("network.input_size", 32, "network.input_size is 32; expected channels, height and width"),
        ("halves", [], r"halves is \[\]; expected one half or more"),
        ("halves.0.half", "both", r"halves\[0\].half is 'both'; expected attention or mlp"),
        ("halves.0.shifted", 1, r"halves\[0\].shifted is 1; expected true or false"),
        ("halves.0.grid.heads", [2, 1], r"halves\[0\].grid.heads is \[2, 1\]; expected whole numbers that rise"),
        ("halves.0.grid.qk", KeyError, r"halves\[0\].grid is .*expected the widths stream, heads, qk, v"),
        ("halves.0.ns", [1.0], r"halves\[0\].ns is \(1,\); expected numbers of shape"),
        ("halves.1.ns.0.0", -1.0, r"halves\[1\].ns is -1.0; expected times above 0"),
        ("halves.1.lines.depth", {}, r"halves\[1\].lines.depth is 'depth'; expected one of stream, hidden"),
        ("outside.pairs", [], r"outside.pairs is 0; expected 1"),
        ("outside.base.0", 0, r"outside.base\[0\] is 0; expected a width"),
        ("rotated", 3, "rotated is 3; expected a mapping or null"),
        ("spread.median", None, "spread.median is None; expected a number"),
    ],
)
def test_a_wrong_field_is_refused_by_its_name(place: str, value: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    path.write_text(json.dumps(damaged(drawn_table(small_supernet("vit")).record(), place, value)))
    with pytest.raises(UserError, match=f"--latency-table .*latency.json: {words}"):
        read_table(path)


def test_what_is_no_table_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_table(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(UserError, match="not readable as JSON"):
        read_table(tmp_path / "text.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match="the file is"):
        read_table(tmp_path / "list.json")
    with pytest.raises(UserError, match="give it with --latency-table"):
        Latency().opened(PriceOptions())


def test_a_table_of_another_network_size_or_widths_is_refused() -> None:
    mine, space = small_supernet("vit"), free_costs(small_supernet("vit")).space
    Latency(drawn_table(mine)).check(space, mine)
    with pytest.raises(UserError, match="is of drawn, a SwinTransformer; this network is a VisionTransformer"):
        Latency(drawn_table(small_supernet("swin"))).check(space, mine)
    options = dict(patch_size=16, embed_dim=32, depth=1, num_heads=2, num_classes=3)
    large, small = (Supernet(timm.create_model("vit_tiny_patch16_224", img_size=size, **options)) for size in (64, 32))
    of_small = make_space("x-free", METHODS["free"], Settings(granularity=1), small.shapes)
    with pytest.raises(UserError, match="input 3 x 64 x 64; this network is input 3 x 32 x 32"):
        Latency(drawn_table(large)).check(of_small, small)
    wide = Supernet(timm.create_model("vit_tiny_patch16_224", img_size=32, **options | dict(embed_dim=48)))
    with pytest.raises(UserError, match="stages of 48; this network is stages of 32"):
        Latency(drawn_table(wide)).check(of_small, small)
    more = Supernet(timm.create_model("vit_tiny_patch16_224", img_size=32, **options | dict(mlp_ratio=8)))
    with pytest.raises(UserError, match="mlp over 5 tokens up to hidden 128, this network has 256"):
        Latency(drawn_table(small)).check(of_small, more)


@pytest.mark.parametrize(
    ("method", "width", "words"),
    [
        ("dan", "stream", "blocks narrower than their stage .* take --width inner"),
        ("kcr", "stream", "chooses which units it keeps"),
        ("uvc", "stream", "chooses which units it keeps"),
    ],
)
def test_what_stands_in_no_table_is_refused_by_name(method: str, width: str, words: str) -> None:
    supernet = small_supernet("vit")
    space = make_space(f"vit-{method}", METHODS[method], Settings(width), supernet.shapes)
    with pytest.raises(UserError, match=f"vit-{method}.*{words}"):
        Latency(drawn_table(supernet)).check(space, supernet)


@pytest.mark.parametrize(("method", "width"), [("dan", "inner"), ("an", "stream"), ("an", "inner")])
def test_factors_are_priced_where_no_block_is_narrower_than_its_stage(method: str, width: str) -> None:
    supernet = small_supernet("swin")
    space = make_space("swin-x", METHODS[method], Settings(width), supernet.shapes)
    price = Latency(drawn_table(supernet))
    price.check(space, supernet)
    costs = priced(space, supernet.adapter.costs, price)
    whole = network_slice(supernet.shapes, [identity_slice(shape) for shape in supernet.shapes])
    assert costs.full == price.network(supernet.shapes, supernet.adapter.costs, whole)
    problem = costs.uniform()
    halved = [len(block) - 1 for block in problem.blocks]
    assert 0 < problem.cost(halved) < costs.full


def test_windows_that_are_shifted_are_timed_by_themselves() -> None:
    supernet = small_supernet("swin", depths=(2, 2), img_size=40, window_size=3)
    kinds = {kind for costs in supernet.adapter.costs.blocks for kind in kinds_of_block(costs)}
    shifted = {kind for kind in kinds if kind.shifted}
    assert shifted and all(Kind(k.half, k.tokens, k.attended) in kinds for k in shifted)
    assert all("shifted windows" in kind.words() for kind in shifted)
