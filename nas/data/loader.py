"""Batches of the images that `nas.data.datasets` opens, as a pure function of (seed, epoch).

A plain DataLoader under timm's transforms. timm's create_loader is left out: its prefetcher erases with the
main process's random numbers, its workers outlive the epoch, its samplers shuffle without the seed and pad
evaluation shards with duplicates, and its datasets replace unreadable images, in evaluation too.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from nas.data.batches import CheckedBatch, EvalBatches, Failures, Fetch, Stream, TrainBatches, collate, epoch_seed
from nas.data.images import Images
from nas.data.transforms import LoaderSpec, Transform
from nas.machine.stopping import deaf
from search_spaces.errors import UserError, reason

logger = logging.getLogger(__name__)

TOLERATED = 0.01  # of a set's images may be unreadable


class Corrupt:
    """The unreadable files that a loader has met: {file: error}; `len` is their number."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.limit = int(TOLERATED * total)
        self.files: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.files)

    def add(self, failures: Failures) -> None:
        """Count and log each file once. UserError when they exceed 1 % of the set, or one ends the run."""
        for name, error, ends_the_run in failures:
            if ends_the_run:
                raise UserError(f"{name}: {error}")
            if name not in self.files:
                self.files[name] = error
                logger.warning("left out an image that cannot be read: %s: %s", name, error)
        if len(self) > self.limit:
            some = ", ".join(list(self.files)[:3])
            raise UserError(
                f"{len(self)} of {self.total} images cannot be read (tolerated: 1 %), e.g. {some}: "
                f"{next(iter(self.files.values()))}; replace or remove them"
            )


class Loader:
    """Batches on `device`: images (B, C, H, W), float32, normalised, and labels (B,), int64.

    Call `set_epoch` before each pass. `len` is the number of batches of this rank, `num_images` that of the images
    of all. `position` says how many batches of the pass have been taken, with those that held no readable image: a
    pass that is set to start there goes on with the next. `corrupt` holds the unreadable files met so far, whichever
    worker met them. Iterating raises UserError when they are too many.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        steps: int,
        total: int,
        spec: LoaderSpec,
        seed: int,
        device: torch.device,
    ) -> None:
        self.corrupt = Corrupt(total)
        self.num_images, self.batch_size = total, spec.batch_size
        self.epoch = self.start = self.position = 0
        self._loader, self._steps, self._seed, self._device = loader, steps, seed, device
        self.stats = mean, std = spec.stats()
        self._mean = torch.tensor(mean, device=device).mul_(255).view(1, -1, 1, 1)
        self._std = torch.tensor(std, device=device).mul_(255).view(1, -1, 1, 1)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """start: the batch to begin with. Of a stream those before it are read and passed over."""
        self.epoch, self.start = epoch, start
        source = self._loader.dataset if isinstance(self._loader.dataset, Stream) else self._loader.batch_sampler
        source.set_epoch(epoch)  # type: ignore[union-attr]
        if isinstance(source, TrainBatches):
            source.start = start

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # A DataLoader without a generator draws from the global one; a stream's workers are seeded from it.
        self._loader.generator = torch.Generator().manual_seed(epoch_seed(self._seed, self.epoch))
        passed_over = isinstance(self._loader.batch_sampler, TrainBatches)
        self.position = self.start if passed_over else 0
        for images, labels, failures in self._batches():
            self.corrupt.add(failures)
            self.position += 1
            if self.position > self.start and len(labels):
                yield self._normalised(images), labels.to(self._device, non_blocking=True)

    def _batches(self) -> Iterator[CheckedBatch]:
        """The DataLoader's own. What goes wrong in it, or in its processes, is a UserError of one line."""
        try:
            batches = iter(self._loader)
            while (batch := next(batches, None)) is not None:
                yield batch
        except Exception as error:
            raise UserError(lost_worker(error) or f"error while loading images ({_last_line(error)})") from error

    def _normalised(self, images: Tensor) -> Tensor:
        images = images.to(self._device, non_blocking=True)
        return images.float().sub_(self._mean).div_(self._std) if images.dtype == torch.uint8 else images


def lost_worker(error: BaseException) -> str | None:
    """What to say where torch reports a data loading process that died; None for any other error.

    torch raises it from a signal handler, wherever the main process is at that moment.
    """
    if not (isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")):
        return None
    return f"a data loading process died ({reason(error)}); is memory short? lower --workers or --batch-size"


def _last_line(error: BaseException) -> str:
    """What was raised, also where torch hands on a worker's traceback."""
    lines = str(error).strip().splitlines()
    return lines[-1] if "Original Traceback" in str(error) else f"{type(error).__name__}: {reason(error)}"


def train_loader(
    dataset: Any,
    spec: LoaderSpec,
    seed: int,
    device: torch.device | str,
    rank: int = 0,
    world_size: int = 1,
) -> Loader:
    """Rank `rank`'s share of shuffled, augmented global batches of spec.batch_size · world_size images.

    Global batch k of an epoch is the same set of images, augmented alike, for any number of ranks. An
    unreadable image is replaced by the next readable one, so that batches keep their size.
    A stream is shuffled and sharded by timm's reader, from the same seed, in at least one worker process;
    what it cannot decode is its own affair.
    Raises UserError when the images do not make one batch, and for a malformed augmentation.
    """
    # Random erasing draws in normalised space, so with it workers normalise. Otherwise bytes travel, a
    # quarter of the size, and whole batches are normalised on the device.
    transform = Transform(spec, is_training=True, as_bytes=spec.no_aug or not spec.reprob)
    repeats = max(1, spec.aug_repeats)
    if not isinstance(dataset, Images):
        if repeats > 1:
            raise UserError("--aug-repeats needs random access to the images; this dataset is a stream")
        if world_size > 1:
            raise UserError(
                "several processes need random access to the training images; this dataset is a stream, whose"
                " shards may differ in length: use one process, or unpack it into class folders"
            )
        reader = _reader(dataset, spec, seed, rank, world_size, is_training=True)
        stream = Stream(reader, transform, seed, first=0, step=1, exif=spec.exif)
        loader = _data_loader(stream, spec, device, batch_size=spec.batch_size, drop_last=spec.drop_last)
        steps = -(-len(reader) // spec.batch_size)
        return Loader(loader, steps, len(reader), spec, seed, torch.device(device))
    batches = TrainBatches(len(dataset), spec.batch_size, repeats, spec.drop_last, seed, rank, world_size)
    if not len(batches):
        raise UserError(f"{len(dataset)} training images make no batch of {batches.global_batch}; lower --batch-size")
    # One substitute more than may be unreadable: if all fail, the loader stops for good reason.
    fetch = Fetch(dataset, transform, substitutes=int(TOLERATED * len(dataset)) + 1, exif=spec.exif)
    # Processes that live on, to the next epoch: what they hold (the images' places, the transform) never changes.
    loader = _data_loader(fetch, spec, device, batch_sampler=batches, persistent_workers=spec.workers > 0)
    return Loader(loader, len(batches), len(dataset), spec, seed, torch.device(device))


def eval_loader(
    dataset: Any, spec: LoaderSpec, device: torch.device | str, rank: int = 0, world_size: int = 1
) -> Loader:
    """Centre crops, in order, of every image exactly once: rank r has images r, r + world_size, ….

    Ranks may differ by one batch: reduce sums after the loop, not inside it. An unreadable image is missing
    from its batch: divide by the labels received, not by len(dataset). Of a stream every rank reads all
    and keeps its share (timm would pad or drop to make shards even), and `len` is an estimate.
    """
    transform = Transform(spec, is_training=False, as_bytes=True)
    if not isinstance(dataset, Images):
        reader = _reader(dataset, spec, 0, 0, 1, is_training=False)
        stream = Stream(reader, transform, 0, first=rank, step=world_size, exif=spec.exif)
        loader = _data_loader(stream, spec, device, batch_size=spec.batch_size)
        steps = -(-len(reader) // (world_size * spec.batch_size))
        return Loader(loader, steps, len(reader), spec, 0, torch.device(device))
    batches = EvalBatches(len(dataset), spec.batch_size, rank, world_size)
    loader = _data_loader(Fetch(dataset, transform, substitutes=0, exif=spec.exif), spec, device, batch_sampler=batches)
    return Loader(loader, len(batches), len(dataset), spec, 0, torch.device(device))


def mixup_fn(
    num_classes: int,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    cutmix_minmax: tuple[float, float] | None = None,
    prob: float = 1.0,
    switch_prob: float = 0.5,
    mode: str = "batch",
    smoothing: float = 0.1,
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """timm's Mixup: images (B, C, H, W) and labels (B,) to mixed images and soft targets (B, num_classes).

    None when neither mixup nor cutmix is on. Draws from numpy's global generator. B must be even.
    """
    if not (mixup > 0 or cutmix > 0 or cutmix_minmax):
        return None
    from timm.data import Mixup

    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = Mixup(
        mixup,
        cutmix,
        cutmix_minmax,
        prob,
        switch_prob,
        mode,
        label_smoothing=smoothing,
        num_classes=num_classes,
    )
    return mix


def _reader(dataset: Any, spec: LoaderSpec, seed: int, rank: int, world_size: int, is_training: bool) -> Any:
    """A stream's reader, told what was not known when timm's factory made it."""
    reader = copy.copy(dataset.reader)
    reader.is_training, reader.batch_size, reader.common_seed = is_training, spec.batch_size, seed
    reader.dist_rank, reader.dist_num_replicas = rank, world_size
    reader.set_loader_cfg(num_workers=max(1, spec.workers))
    return reader


def _data_loader(dataset: Fetch | Stream, spec: LoaderSpec, device: torch.device | str, **batching: Any) -> Any:
    return DataLoader(
        dataset,
        num_workers=max(1, spec.workers) if isinstance(dataset, Stream) else spec.workers,
        collate_fn=collate,
        pin_memory=torch.device(device).type == "cuda",
        worker_init_fn=deaf,
        **batching,
    )
