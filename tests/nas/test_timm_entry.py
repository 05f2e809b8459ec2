"""timm opens a compact folder, as a classifier and as the backbone of a detector."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import nas.timm_entry
from nas.networks.compact_file import load_compact
from search_spaces.errors import UserError
from tests.nas.finished import finished_run, pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("entry") / "small"
    finished_run(path)
    return path


def test_timm_opens_the_folder(folder: Path) -> None:
    x = pictures()
    expected = load_compact(folder)(x)
    for network in (
        timm.create_model(f"local-dir:{folder}", pretrained=True),
        timm.create_model("compact", folder=folder, pretrained=True),
    ):
        assert torch.equal(network.eval()(x), expected)
    assert network.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)
    own = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert timm.data.resolve_data_config(model=own)["input_size"] == (3, 36, 36)
    fresh = timm.create_model(f"local-dir:{folder}").eval()
    assert fresh(x).shape == expected.shape and not torch.allclose(fresh(x), expected)


def test_another_classifier_and_another_size(folder: Path) -> None:
    x = pictures()
    network = load_compact(folder)
    other: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3).eval()
    assert other(x).shape == (2, 3)
    assert torch.equal(other.forward_features(x), network.forward_features(x))  # type: ignore[operator]
    headless = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    assert headless(x).shape == (2, other.num_features)
    wider: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=(64, 48)).eval()
    assert wider(torch.randn(1, 3, 64, 48)).shape == (1, 10)
    assert torch.equal(wider.layers[0].blocks[0].attn.qkv.weight, network.layers[0].blocks[0].attn.qkv.weight)  # type: ignore[union-attr,index]


def test_feature_maps(folder: Path) -> None:
    body: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True, out_indices=(0, 1))
    maps = body.eval()(pictures())
    assert [tuple(m.shape) for m in maps] == [(2, c, s, s) for c, s in zip(body.feature_info.channels(), (9, 5))]  # noqa: B905
    network: Any = load_compact(folder)
    own = network.forward_intermediates(pictures(), indices=[0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(maps, own, strict=True))


def test_which_network_is_asked_for() -> None:
    with pytest.raises(UserError, match="which network"):
        timm.create_model("compact")
    assert nas.timm_entry.folder_of({"source": "local-dir", "file": "a/b"}) == Path("a/b")


class Pyramid(nn.Module):
    """Feature maps of a compact network under torchvision's pyramid: what its detectors take as a backbone."""

    def __init__(self, folder: Path, size: int, out_channels: int = 16) -> None:
        super().__init__()
        from torchvision.ops import FeaturePyramidNetwork

        self.body: Any = timm.create_model(
            f"local-dir:{folder}", pretrained=True, features_only=True, out_indices=(0, 1), img_size=size
        )
        self.pyramid = FeaturePyramidNetwork(self.body.feature_info.channels(), out_channels)
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = OrderedDict((str(i), m) for i, m in enumerate(self.body(x)))
        return self.pyramid(maps)  # type: ignore[no-any-return]


def test_under_faster_rcnn_for_one_training_step(folder: Path) -> None:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.rpn import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    torch.manual_seed(0)
    size = 64
    detector = FasterRCNN(
        Pyramid(folder, size),
        num_classes=3,
        rpn_anchor_generator=AnchorGenerator(((8,), (16,)), ((0.5, 1.0, 2.0),) * 2),
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], output_size=3, sampling_ratio=2),
        _skip_resize=True,
    ).train()
    images = [torch.rand(3, size, size) for _ in range(2)]
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 36.0]]), "labels": torch.tensor([1])}] * 2
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-2)
    table = detector.backbone.body.model.layers[0].blocks[1].attn.relative_position_bias_table
    before = {n: p.detach().clone() for n, p in detector.named_parameters()}
    losses = detector(images, targets)
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    optimizer.step()
    assert table.grad is not None and table.grad.abs().sum() > 0
    moved = {n for n, p in detector.named_parameters() if not torch.equal(p, before[n])}
    assert any(n.startswith("backbone.body.model.patch_embed") for n in moved)
    assert any(n.startswith("roi_heads") for n in moved)
