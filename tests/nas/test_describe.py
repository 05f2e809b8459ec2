"""python -m nas.describe: its rows are the network's FLOPs, its picture is drawn, mistakes are one line."""

from pathlib import Path

import pytest
import timm

from nas import describe
from nas.networks.architecture import architecture_of
from nas.networks.backbone import TimmModel
from nas.networks.opening import meta_supernet
from search_spaces.architecture import Architecture, save_architecture
from search_spaces.channels import KEPT
from search_spaces.method import Settings
from search_spaces.registry import SPACES
from search_spaces.space import make_space
from supernets.supernet import Supernet
from tests.nas.finished import free_architecture

NANO = sorted(n for n, s in SPACES.items() if s.nano and s.method.name in ("dan", "kcr", "joint"))


def some_architecture(name: str, width: str) -> Architecture:
    """Blocks take their largest and their smallest candidates in turn; an MLP keeps the last of its channels."""
    space = SPACES[name]
    supernet = meta_supernet(TimmModel(space.model, space.model_kwargs), 10, space)
    choices = make_space(name, space.method, Settings(width, space.alphas), supernet.shapes)
    picks = [
        {choice: options[-(i % 2)] for choice, options in block.items()} for i, block in enumerate(choices.candidates)
    ]
    kept = []
    for block in choices.block_slices(picks):
        n = block.num_mlp_stream()
        kept.append({KEPT: list(range(block.stream - n, block.stream))} if space.method.kept_names else {})
    return architecture_of(supernet, name, space.model, space.model_kwargs, picks, width, kept)


@pytest.mark.parametrize("width", ["stream", "inner"])
@pytest.mark.parametrize("name", NANO)
def test_rows_add_up_to_the_network(name: str, width: str) -> None:
    arch = some_architecture(name, width)
    rows = describe.rows_of(arch)
    assert sum(row.flops[0] for row in rows) == arch.flops < arch.backbone_flops
    assert sum(row.flops[1] for row in rows) == arch.backbone_flops
    assert sum(row.block is not None for row in rows) == len(arch.blocks)
    assert all(kept <= of for row in rows for kept, of in (row.stream, row.heads, row.mlp_channels, row.neurons))


def test_value_channels_are_those_of_the_kept_heads() -> None:
    """UVC keeps them head by head; attention that is skipped has none."""
    space = SPACES["deit-uvc-nano"]
    supernet = Supernet(timm.create_model(space.model, num_classes=10, **space.model_kwargs))
    shape, rest = supernet.shapes[0], len(supernet.shapes) - 2
    whole = {"heads": shape.num_heads, "v_channels": shape.embed_dim, "hidden": shape.hidden}
    picks = [whole | {"heads": 2, "v_channels": 5}, whole | {"heads": 0, "v_channels": 0}, *[whole] * rest]
    kept_v = [[0, 1, 3, 2 * shape.head_dim, 2 * shape.head_dim + 4], [], *[list(range(shape.embed_dim))] * rest]
    kept = [{"kept_v": v, "kept_hidden": list(range(shape.hidden))} for v in kept_v]
    arch = architecture_of(supernet, space.name, space.model, space.model_kwargs, picks, "stream", kept)
    value_channels = [row.value_channels for row in describe.rows_of(arch) if row.block is not None]
    assert value_channels == [(kept, shape.embed_dim) for kept in (5, 0, *[shape.embed_dim] * rest)]


def test_the_command_prints_both_choices_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arch = some_architecture("swin-joint-nano", "stream")
    save_architecture(arch, tmp_path / "arch.json")
    describe.main([str(tmp_path)])
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "block 1" in line)
    stream = SPACES["swin-joint-nano"].model_kwargs["embed_dim"] // arch.blocks[1]["alpha"]
    assert f"{stream}/48" in row and f"{len(arch.blocks[1][KEPT])}/48" in row
    assert f"{100 * arch.flops / arch.backbone_flops:.1f} %" in out
    assert (tmp_path / "architecture.png").read_bytes().startswith(b"\x89PNG")


def test_free_widths_are_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arch = free_architecture()
    rows = describe.rows_of(arch)
    assert sum(row.flops[0] for row in rows) == arch.flops < arch.backbone_flops
    save_architecture(arch, tmp_path / "arch.json")
    describe.main([str(tmp_path)])
    out = capsys.readouterr().out
    assert "vit-free: vit_tiny_patch16_224" in out and "choices" not in out
    cells = [[cell.strip() for cell in line.split("│")[1:-4]] for line in out.splitlines() if "block " in line]
    assert cells == [
        ["block 0", "144/192", "3/3", "24/64", "56/64", "192/768"],
        ["block 1", "144/192", "0/3", "0/64", "0/64", "96/768"],
        ["block 2", "144/192", "3/3", "40/64", "40/64", "0/768"],
    ]


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        describe.main([str(tmp_path / "absent.json")])
    save_architecture(some_architecture("vit-dan-nano", "inner"), tmp_path / "arch.json")
    with pytest.raises(SystemExit, match="2"):
        describe.main([str(tmp_path), "--output", str(tmp_path / "picture.gif")])
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "no such file" in errors[0] and "picture.gif" in errors[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["arch.json"]
