"""The nni space of every method, printed and dumped, and the way from a sample of it to arch.json and back."""

import json
from pathlib import Path

import numpy as np
import pytest

from nas.config import SearchConfig, with_defaults
from nas.describe import grammar_of, main
from nas.methods.table import training_of
from nas.networks.architecture import architecture_of, slices_of
from nas.networks.backbone import TimmModel
from nas.networks.opening import meta_supernet
from search_spaces.architecture import load_architecture, save_architecture
from search_spaces.channels import KEPT
from search_spaces.errors import UserError
from search_spaces.method import Picks, picks_of
from search_spaces.registry import METHODS, get_space
from search_spaces.slices import count
from search_spaces.space import SearchSpace, make_space
from search_spaces.units import KEPT_HIDDEN, KEPT_V
from supernets.supernet import Supernet

SMALL = dict(img_size=32, patch_size=16, embed_dim=48, depth=2, num_heads=4)


def space_of(method: str) -> tuple[SearchSpace, Supernet]:
    """A method's space over a ViT of two blocks."""
    space = get_space(f"vit-{method}-nano")
    supernet = meta_supernet(TimmModel(space.model, SMALL), 10, space)
    options = with_defaults(SearchConfig(space=space.name), space, "search")
    return make_space(space.name, space.method, training_of(space).settings(options, space), supernet.shapes), supernet


def kept_of(space: SearchSpace, picks: list[Picks]) -> list[dict[str, list[int]]]:
    """The first units, as many as the picks say, where arch.json wants them by name."""
    found: list[dict[str, list[int]]] = []
    if not space.method.kept_names:  # prefixes
        return [{} for _ in picks]
    for shape, s in zip(space.shapes, space.block_slices(picks), strict=True):
        widths = s.v_channels or [range(shape.head_dim)] * count(s.heads)
        channels = [h * shape.head_dim + c for h, kept in enumerate(widths) for c in kept]  # type: ignore[arg-type, union-attr]
        own = {
            KEPT: list(range(s.num_mlp_stream())),
            KEPT_V: channels if s.attn else [],
            KEPT_HIDDEN: list(range(count(s.hidden))) if s.mlp else [],
        }
        found.append({name: own[name] for name in space.method.kept_names})
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_of_nni_becomes_an_architecture_and_comes_back(method: str, tmp_path: Path) -> None:
    space, supernet = space_of(method)
    grammar, made = space.mutable(), 0
    for seed in range(200):  # of single units many samples are no architecture: channels in no head
        sample: dict[str, int | float] = {}
        grammar.random(sample, random_state=np.random.RandomState(seed))
        picks = space.freeze(sample)
        try:
            kept = kept_of(space, picks)
            arch = architecture_of(supernet, space.name, "vit_tiny_patch16_224", SMALL, picks, kept=kept)
        except UserError:
            assert method == "uvc"
            continue
        save_architecture(arch, tmp_path / "arch.json")
        again = load_architecture(tmp_path / "arch.json")
        back = [picks_of(block, space.method.choice_names) for block in again.blocks]
        labels = {space.label(i, name): value for i, pick in enumerate(back) for name, value in pick.items()}
        assert labels == sample and space.validated(back) == picks
        assert supernet.flops(slices_of(again, supernet.shapes)) == arch.flops == again.flops
        made += 1
        if made == 3:
            break
    assert made == 3


@pytest.mark.parametrize("method", METHODS)
def test_the_grammar_is_printed_and_dumped(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, path = f"vit-{method}-nano", tmp_path / "grammar.json"
    main(["--space", name, "--grammar", "--output", str(path)])
    dumped, said = json.loads(path.read_text()), capsys.readouterr().out
    assert dumped == grammar_of(name) and dumped["method"] == method
    scopes = {label.split("/")[1] for label in dumped["choices"]}
    assert scopes == set(METHODS[method].choice_names)
    assert all(f"{label}: " in said for label in dumped["choices"])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--space vit-dan-nano", "with --grammar"),
        ("--grammar", "with --grammar"),
        ("results --grammar", "with --grammar"),
        ("", "give an arch.json"),
        ("--space vit-dan-nano --grammar --output a.png", "expected a name that ends in .json"),
        ("--space vit-dna --grammar", "unknown space 'vit-dna'"),
    ],
)
def test_what_cannot_be_described_is_refused(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert ended.value.code == 2 and says in capsys.readouterr().err
