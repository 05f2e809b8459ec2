"""Which images a batch holds, and how a worker makes them: order, shards, seeds, unreadable files.

Every image is augmented under a seed of its own, drawn together with the epoch's order. So its augmentation
depends on neither the number of workers nor the number of ranks, and no other random numbers are touched.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

from nas.data.decoding import as_seen
from nas.data.images import UNREADABLE, Images
from nas.data.patience import Patience
from nas.data.transforms import Transform, TransformError
from search_spaces.errors import reason


class Failure(NamedTuple):
    """What went wrong with one image. Unreadable images are left out, up to a share; anything else ends the run.

    It travels in the batch: an exception would leave a worker as a page of traceback.
    """

    image: str  # the file's name
    error: str  # one line
    ends_the_run: bool = False


Failures = tuple[Failure, ...]
Item = tuple[Tensor | None, int, Failures]  # image (C, H, W), label, what could not be read on the way
CheckedBatch = tuple[Tensor, Tensor, Failures]  # images (B, C, H, W), labels (B,), the same
Wanted = tuple[int, int]  # position in the dataset, seed of its augmentation


def epoch_seed(*key: int) -> int:
    """A 63-bit seed from (seed, epoch, …); neighbouring keys give unrelated seeds."""
    state = np.random.SeedSequence([k % 2**64 for k in key]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Leave python's, numpy's and torch's CPU generators as they were: dropout and mixup use them too."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would visit every accelerator, for each image


class TrainBatches:
    """One rank's share of each global batch of an epoch, as lists of (position, augmentation seed).

    The order of the n images and their seeds come from (seed, epoch). A global batch is the next
    batch_size · world_size entries of it, of which rank r takes entries r, r + world_size, …. With `repeats`
    > 1 each image stands that many times in a row and the epoch still has about n entries, as in timm's
    RepeatAugSampler. Every rank takes the same number of steps. `start` is the batch that a pass begins with.
    """

    def __init__(
        self, n: int, batch_size: int, repeats: int, drop_last: bool, seed: int, rank: int, world_size: int
    ) -> None:
        self.n, self.repeats, self.seed, self.rank, self.world_size = n, repeats, seed, rank, world_size
        self.global_batch = batch_size * world_size
        self.drawn = n // 256 * 256 if repeats > 1 and n >= 256 else n  # timm's rounding
        # A last batch too small to give each rank an image would leave some without a step: never kept.
        keep_last = not drop_last and self.drawn % self.global_batch >= world_size
        self.steps = self.drawn // self.global_batch + keep_last
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[Wanted]]:
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        order = torch.randperm(self.n, generator=generator).repeat_interleave(self.repeats)[: self.drawn]
        seeds = torch.randint(0, 2**63 - 1, (self.drawn,), generator=generator)
        for first in range(self.start * self.global_batch, self.steps * self.global_batch, self.global_batch):
            share = slice(first + self.rank, first + self.global_batch, self.world_size)
            yield list(zip(order[share].tolist(), seeds[share].tolist(), strict=True))


class EvalBatches:
    """One rank's images of n, in order and without padding: positions rank, rank + world_size, …."""

    def __init__(self, n: int, batch_size: int, rank: int, world_size: int) -> None:
        self.positions, self.batch_size = range(rank, n, world_size), batch_size

    def set_epoch(self, epoch: int) -> None:
        """Every epoch is the same."""

    def __len__(self) -> int:
        return -(-len(self.positions) // self.batch_size)

    def __iter__(self) -> Iterator[list[Wanted]]:
        for first in range(0, len(self.positions), self.batch_size):
            yield [(position, 0) for position in self.positions[first : first + self.batch_size]]


class Fetch(Dataset[Item]):
    """What a worker does with a batch of positions: read, seed, augment.

    An image that cannot be read is reported and replaced by the next one of the dataset, `substitutes` at
    most; after these, or with none, the batch is an image short.
    exif: turn images as their EXIF data says.
    """

    def __init__(self, images: Images, transform: Transform, substitutes: int, exif: bool = True) -> None:
        self.images, self.transform, self.substitutes = images, transform, substitutes
        self.patience = Patience(exif)

    def __getitems__(self, wanted: Sequence[Wanted]) -> list[Item]:
        with isolated_rng():
            return [self._item(position, seed) for position, seed in wanted]

    def _item(self, position: int, seed: int) -> Item:
        failures: Failures = ()
        for offset in range(self.substitutes + 1):
            at = (position + offset) % len(self.images)
            try:
                image = self.patience.read(self.images, at)
            except UNREADABLE as error:
                words = " ".join(str(error).split()) or type(error).__name__
                failures = (*failures, Failure(self.images.name(at), words))
                continue
            except Exception as error:  # none of what decoders raise
                return None, -1, (*failures, _broken(self.images.name(at), "reading", error))
            _seed_everything(seed)
            try:
                return self.transform(image), self.images.label(at), failures
            except Exception as error:
                return None, -1, (*failures, _broken(self.images.name(at), self.transform.doing, error))
        return None, -1, failures


def _broken(image: str, doing: str, error: Exception) -> Failure:
    words = str(error) if isinstance(error, TransformError) else f"{type(error).__name__}: {reason(error)}"
    advice = "replace or remove the image" + (", or change --aa" if doing == "augmenting" else "")
    return Failure(image, f"error while {doing} it ({words}); {advice}", ends_the_run=True)


class Stream(IterableDataset[Item]):
    """A timm reader in a worker process: entries first, first + step, … of what it gives.

    The main process never reads, so that workers start every epoch from the same state of the reader. Seeds
    come from (seed, epoch, rank, worker, count).
    """

    def __init__(self, reader: Any, transform: Transform, seed: int, first: int, step: int, exif: bool = True) -> None:
        self.reader, self.transform, self.seed, self.exif = reader, transform, seed, exif
        self.first, self.step, self.epoch = first, step, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.reader.set_epoch(epoch)

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        assert worker is not None
        entries = islice(self.reader, self.first, None, self.step)
        for number in count():
            doing = "reading"
            try:
                image, label = next(entries)
                image = as_seen(image, self.exif)
                _seed_everything(epoch_seed(self.seed, self.epoch, self.reader.dist_rank, worker.id, number))
                doing = self.transform.doing
                item: Item = self.transform(image), int(label), ()
            except StopIteration:
                return
            except Exception as error:
                name = f"image {number + 1} of process {worker.id + 1} of the stream"  # all that a stream says of it
                yield None, -1, (_broken(name, doing, error),)
                return
            yield item


def collate(items: list[Item]) -> CheckedBatch:
    """A batch of the images that could be read."""
    read = [(image, label) for image, label, _ in items if image is not None]
    images = default_collate([image for image, _ in read]) if read else torch.empty(0)
    labels = torch.tensor([label for _, label in read], dtype=torch.int64)
    return images, labels, tuple(failure for *_, failures in items for failure in failures)
