"""`auto-<method>`: the space of the family that --model is of."""

from typing import Any

import pytest
import timm
import torch

from nas.config import RetrainConfig, SearchConfig
from nas.networks.backbone import on_meta
from nas.networks.opening import settled_space
from nas.stages.asked import resolve
from nas.stages.goal import resolve as resolve_retrain
from nas.sweeps.options import SweepConfig
from nas.sweeps.trials import make_trials
from search_spaces.errors import UserError
from search_spaces.registry import FAMILIES, get_space

OF = {
    "swin_tiny_patch4_window7_224": "swin",
    "swinv2_tiny_window8_256": "swinv2",
    "vit_small_patch14_dinov2": "vit",
    "vit_base_patch16_siglip_224": "vit",
    "deit_small_patch16_224.fb_in1k": "deit",
    "deit_small_distilled_patch16_224": "deit",
    "deit3_small_patch16_224": "deit",
    "eva02_small_patch14_224": "eva",
    "vit_small_patch16_dinov3": "eva",
    "t2t_vit_14": "t2t",
    "cait_xxs24_224": "cait",
    "beitv2_base_patch16_224": "beit",
    "vit_srelpos_small_patch16_224": "relpos",
}


def test_every_family_has_an_example() -> None:
    assert set(OF.values()) == set(FAMILIES)


@pytest.mark.parametrize("model", OF)
def test_the_family_is_the_models(model: str) -> None:
    assert settled_space("auto-free", SearchConfig(model=model)) == f"{OF[model]}-free"


def test_every_stage_knows_it_by_the_familys_name() -> None:
    model, data = "vit_small_patch16_dinov3", dict(pretrained=False, dataset="digits")
    config, space = resolve(SearchConfig(space="auto-dan-nano", model=model, **data))
    assert config.space == space.name == "eva-dan-nano" and config.model == model
    retrain, space, _ = resolve_retrain(RetrainConfig(space="auto-an", alpha=2, model=model, **data))
    assert retrain.space == space.name == "eva-an"
    trials = make_trials(SweepConfig(sweep=("space=auto-dan-nano,auto-kcr-nano",), model=model, **data))
    assert [trial.resolved().space for trial in trials] == ["eva-dan-nano", "eva-kcr-nano"]


def test_what_no_family_can_be_told_from_is_refused() -> None:
    with pytest.raises(UserError, match="auto-free is a space of the family of --model; name a model"):
        settled_space("auto-free", SearchConfig())
    with pytest.raises(UserError, match="ResNet is not a supported backbone"):
        settled_space("auto-free", SearchConfig(model="resnet18"))
    with pytest.raises(UserError, match="unknown model"):
        settled_space("auto-free", SearchConfig(model="vit_smal"))
    with pytest.raises(UserError, match="there is no space swinv2-uvc"):
        resolve(SearchConfig(space="auto-uvc", model="swinv2_tiny_window8_256", pretrained=False, dataset="digits"))
    with pytest.raises(UserError, match="auto-free is a space of the family of --model, which is not named here"):
        get_space("auto-free")


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "swinv2_tiny_window8_256", "cait_xxs24_224", "t2t_vit_7"])
def test_a_network_on_the_meta_device_is_the_same_but_for_its_weights(model: str) -> None:
    def tensors(network: Any) -> dict[str, tuple[Any, ...]]:
        named = [*network.named_parameters(), *network.named_buffers()]
        return {name: (t.shape, t.stride(), t.dtype, t.requires_grad) for name, t in named}

    with on_meta():
        found = timm.create_model(model, num_classes=7)
    assert all(t.is_meta for t in (*found.parameters(), *found.buffers()))
    assert tensors(found) == tensors(timm.create_model(model, num_classes=7))


def test_on_the_meta_device_what_has_weights_is_filled() -> None:
    with on_meta():
        filled = torch.zeros(3, device="cpu").fill_(2.0).add_(1.0)
    assert filled.tolist() == [3.0, 3.0, 3.0]
