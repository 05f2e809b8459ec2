"""How far a network's prediction is from what is wanted, by --decide (section 2.12); of what a process is given alone.

A candidate is computed in the supernet as its cut network would compute it, refitted before where its method refits
what it cuts, on images that neither calibrate nor refit.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nas.searchers.options import SearchOptions
from nas.training.calibration import calibration_images, deciding_images
from nas.training.prepared import Prepared
from nas.training.refit import images_that_fit
from search_spaces.slices import NetworkSlice
from supernets.refit import refit, written
from supernets.supernet import Supernet

REFITTED = 512  # images on which a candidate is refitted


@dataclass(frozen=True)
class Images:
    """refitting: batches (B, C, H, W). deciding: batches, their labels, and the large network's log-probabilities, or
    its features.
    """

    refitting: Sequence[Tensor]
    deciding: Sequence[tuple[Tensor, Tensor, Tensor]]

    def variance(self) -> float:
        """Of the large network's features over all images, their number times it; in float64."""
        features = torch.cat([expected for _, _, expected in self.deciding]).double()
        return float((features - features.mean(0)).square().sum())


@dataclass(frozen=True)
class Judge:
    """kind: KL(large || candidate) in nats (kl), missed top-1 in % (top1), or cross-entropy with the labels in nats
    (loss); of a network without classifier the squared error of its features, as a share of their variance (features).
    """

    supernet: Supernet
    images: Images
    kind: str

    def timed(self, subnet: NetworkSlice) -> tuple[float, float]:
        """What a subnet is worth, less being better, and the seconds that it took."""
        start = time.perf_counter()
        return self.value(subnet), time.perf_counter() - start

    @torch.no_grad()
    def value(self, subnet: NetworkSlice) -> float:
        """Less is better."""
        supernet, refitting = self.supernet.eval(), self.images.refitting
        total, seen = 0.0, 0
        with written(supernet, subnet, refit(supernet, subnet, refitting) if refitting else {}):
            for images, labels, expected in self.images.deciding:
                q = supernet.small(images, subnet).float()
                if self.kind == "features":
                    total += float((q - expected).square().sum())
                elif self.kind == "top1":
                    total += 100 * float((q.argmax(1) != labels).sum())
                elif self.kind == "loss":
                    total += float(F.cross_entropy(q, labels, reduction="sum"))
                else:
                    total += float(F.kl_div(q.log_softmax(1), expected, log_target=True, reduction="sum"))
                seen += len(images)
        return total / (self.images.variance() if self.kind == "features" else seen)

    def to(self, device: torch.device) -> "Judge":
        """The same on another device; on its own this very one."""
        if next(self.supernet.parameters()).device == device:
            return self
        images = Images(
            [images.to(device) for images in self.images.refitting],
            [tuple(t.to(device) for t in batch) for batch in self.images.deciding],  # type: ignore[misc]
        )
        return Judge(copy.deepcopy(self.supernet).to(device), images, self.kind)


def judge_of(options: SearchOptions, prepared: Prepared) -> Judge:
    """That of a run; its images are kept in memory."""
    supernet = prepared.supernet.eval()
    return Judge(supernet, images_of(options, prepared), kind_of(options, supernet))


def kind_of(options: SearchOptions, supernet: Supernet) -> str:
    """What the judge of a run compares by."""
    return options.decide if supernet.adapter.feature_head is None else "features"


@torch.no_grad()
def images_of(options: SearchOptions, prepared: Prepared) -> Images:
    """Those of a run, kept in memory."""
    assert options.refit_images is not None
    fit = images_that_fit(options, prepared, prepared.supernet.identity())
    count = min(REFITTED, prepared.plan.images, options.refit_images, fit) if prepared.plan.refits else 0
    return Images(
        [images for images, _ in calibration_images(options, prepared, count)] if count else [],
        [
            (images, labels, output_of(prepared.supernet, images))
            for images, labels in deciding_images(options, prepared)
        ],
    )


def output_of(supernet: Supernet, images: Tensor) -> Tensor:
    """The large network's log-probabilities (B, classes), or its features (B, E)."""
    output = supernet.large(images).float()
    return output.log_softmax(1) if supernet.adapter.feature_head is None else output
