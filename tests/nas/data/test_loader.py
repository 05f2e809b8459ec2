"""Batches are a pure function of (seed, epoch), for any number of workers and ranks."""

import dataclasses
import io
import json
import logging
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.distributed_sampler import RepeatAugSampler

from nas.data.batches import TrainBatches, epoch_seed
from nas.data.datasets import DataSpec, open_splits
from nas.data.images import Images, Source
from nas.data.loader import eval_loader, mixup_fn, train_loader
from nas.data.transforms import LoaderSpec
from search_spaces.errors import UserError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
SPEC = LoaderSpec(batch_size=8, input_size=(3, 24, 24), mean=MEAN, std=STD, crop_pct=1.0)
STRONG = dataclasses.replace(SPEC, aa="rand-m9-mstd0.5-inc1", reprob=0.5, recount=2, vflip=0.2)


def numbered(n: int, size: int = 24) -> Images:
    """n plain images whose pixels and labels say which they are (n <= 250)."""
    read = [Image.new("RGB", (size, size), (i, i, i)).copy for i in range(n)]
    return Images(Source(lambda i: read[i](), "image {}".format, np.arange(n), None))


@pytest.fixture(scope="module")
def digits():
    return open_splits(DataSpec(val_fraction=0.05))


def epochs(loader, *which):
    """[(images, labels)] of each epoch asked for, stacked."""
    out = []
    for epoch in which:
        loader.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == len(loader)
        out.append((torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])))
    return out


def same(a, b) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("spec", [SPEC, STRONG], ids=["light", "strong"])
def test_an_epoch_is_a_function_of_seed_and_epoch(digits, spec):
    images = Images(digits.train.source, digits.train.indices[:40])
    first, second = epochs(train_loader(images, spec, 3, "cpu"), 0, 1)
    assert not torch.equal(first[1], second[1])
    random.seed(5)
    np.random.seed(6)
    torch.manual_seed(7)
    resumed, replayed = epochs(train_loader(images, spec, 3, "cpu"), 1, 0)
    assert same(resumed, second)
    assert same(replayed, first)
    for workers in (1, 2):
        assert same(epochs(train_loader(images, dataclasses.replace(spec, workers=workers), 3, "cpu"), 1)[0], second)
    assert not torch.equal(epochs(train_loader(images, spec, 4, "cpu"), 1)[0][1], second[1])


def test_the_augmentation_is_drawn_anew_for_each_image_and_epoch(digits):
    one = Images(digits.train.source, np.full(16, 11))  # the same image sixteen times
    (first, _), (second, _) = epochs(train_loader(one, SPEC, 0, "cpu"), 0, 1)
    assert len(torch.unique(torch.cat([first, second]), dim=0)) == 32


@pytest.mark.parametrize("workers", [0, 1])
def test_nobody_elses_random_numbers_are_touched(digits, workers):
    images = Images(digits.train.source, digits.train.indices[:16])
    spec = dataclasses.replace(STRONG, workers=workers)
    loaders = [train_loader(images, spec, 0, "cpu"), eval_loader(images, spec, "cpu")]
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    drawn = []
    for loader in loaders:
        for _ in loader:
            drawn.append((random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()))
    assert all(state == before for state in drawn)


@pytest.mark.parametrize("repeats", [0, 3])
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(digits, repeats):
    images = Images(digits.train.source, digits.train.indices[:100])

    def batches(rank, world_size):
        spec = dataclasses.replace(SPEC, batch_size=32 // world_size, aug_repeats=repeats)
        loader = train_loader(images, spec, 9, "cpu", rank, world_size)
        loader.set_epoch(2)
        return list(loader)

    alone = batches(0, 1)
    assert len(alone) == 3
    for world_size in (2, 4):
        ranks = [batches(rank, world_size) for rank in range(world_size)]
        for step, (x, y) in enumerate(alone):
            for rank in range(world_size):
                assert same(ranks[rank][step], (x[rank::world_size], y[rank::world_size]))


def test_an_epoch_shows_no_image_twice():
    _, labels = epochs(train_loader(numbered(50), SPEC, 0, "cpu"), 0)[0]
    assert len(labels) == 48
    assert len(set(labels.tolist())) == 48


@pytest.mark.parametrize(("n", "world_size", "seen"), [(50, 1, 50), (50, 2, 50), (49, 2, 48), (3, 2, 3)])
def test_a_kept_last_batch_gives_every_rank_the_same_number_of_steps(n, world_size, seen):
    spec = dataclasses.replace(SPEC, drop_last=False)
    loaders = [train_loader(numbered(n), spec, 0, "cpu", rank, world_size) for rank in range(world_size)]
    assert len({len(loader) for loader in loaders}) == 1
    labels = [y for loader in loaders for y in epochs(loader, 0)[0][1].tolist()]
    assert len(labels) == len(set(labels)) == seen


@pytest.mark.parametrize(("n", "world_size"), [(600, 1), (600, 2), (256, 4), (257, 4)])
def test_repeated_augmentation_is_timms(n, world_size):
    for rank in range(world_size):
        ours = TrainBatches(n, 5, 3, True, seed=1, rank=rank, world_size=world_size)
        ours.set_epoch(4)
        timms = RepeatAugSampler(range(n), world_size, rank, num_repeats=3)
        timms.set_epoch(epoch_seed(1, 4))  # the number it seeds its shuffle with
        positions = [position for batch in ours for position, _ in batch]
        assert positions == list(timms)[: len(positions)]
        assert len(timms) - len(positions) < 5  # less than the batch that is dropped


def test_repeats_are_augmented_apart():
    images, labels = epochs(train_loader(numbered(24), dataclasses.replace(STRONG, aug_repeats=2), 0, "cpu"), 0)[0]
    assert len(set(labels.tolist())) == 12
    assert torch.equal(labels[::2], labels[1::2])
    assert not torch.equal(images[::2], images[1::2])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_evaluation_sees_each_image_once_over_all_ranks(workers, world_size):
    spec = dataclasses.replace(SPEC, workers=workers)
    images = numbered(50)
    seen = []
    for rank in range(world_size):
        (pixels, labels), again = epochs(eval_loader(images, spec, "cpu", rank, world_size), 0, 7)
        assert labels.tolist() == list(range(rank, 50, world_size))
        assert same((pixels, labels), again)
        assert torch.allclose(pixels[:, 0, 0, 0] * STD[0] + MEAN[0], labels / 255, atol=1e-6)
        seen += labels.tolist()
    assert sorted(seen) == list(range(50))


def test_more_ranks_than_images():
    assert list(eval_loader(numbered(2), SPEC, "cpu", rank=2, world_size=3)) == []


def test_pixels_are_those_of_timms_own_transforms(digits):
    images = Images(digits.train.source, digits.train.indices[:8])
    spec = dataclasses.replace(SPEC, crop_pct=0.8, no_aug=True, train_interpolation="bilinear")
    timms = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_pct": 0.8}
    transform = create_transform((3, 24, 24), **timms)
    ours, labels = epochs(eval_loader(images, spec, "cpu"), 0)[0]
    assert torch.allclose(ours, torch.stack([transform(image) for image, _ in images]), atol=1e-5)
    assert labels.tolist() == images.labels.tolist()
    transform = create_transform((3, 24, 24), is_training=True, no_aug=True, **timms | {"interpolation": "bilinear"})
    ours = epochs(train_loader(images, spec, 0, "cpu"), 0)[0][0]
    expected = torch.stack([transform(image) for image, _ in images])
    assert torch.allclose(ours.sum(0), expected.sum(0), atol=1e-4)  # in another order


def test_random_erasing_changes_nothing_else(digits):
    images = Images(digits.train.source, digits.train.indices[:16])
    erasing = dataclasses.replace(SPEC, reprob=1.0, remode="const")
    (plain, _), (erased, _) = (epochs(train_loader(images, spec, 0, "cpu"), 0)[0] for spec in (SPEC, erasing))
    differs = (plain - erased).abs() > 1e-5
    assert torch.all(erased[differs] == 0)
    assert 0.02 < differs.float().mean() < 0.5
    assert torch.all(differs.flatten(1).any(1))


def test_grey_networks_read_grey_images(digits):
    spec = dataclasses.replace(SPEC, input_size=(1, 24, 24))  # three means, as timm's configurations have them
    for loader in (train_loader(digits.val, spec, 0, "cpu"), eval_loader(digits.val, spec, "cpu")):
        assert next(iter(loader))[0].shape == (8, 1, 24, 24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"aa": "nonsense"}, "timm refuses this augmentation .*nonsense"),
        ({"aa": "rand-x9"}, "timm refuses this augmentation .*rand-x9"),
        ({"train_interpolation": "cubic"}, "timm refuses this augmentation .*cubic"),
        ({"remode": "stripes", "reprob": 0.5}, "timm refuses this augmentation .*stripes"),
        ({"batch_size": 64}, "50 training images make no batch of 64; lower --batch-size"),
        ({"batch_size": 0}, "batch size 0"),
        ({"input_size": (4, 24, 24)}, "reads 4 channels"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(change, message):
    with pytest.raises(UserError, match=message) as error:
        train_loader(numbered(50), dataclasses.replace(SPEC, **change), 0, "cpu")
    assert "\n" not in str(error.value)


class TestUnreadable:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        """Two classes of 100; b's numbers 30 and 31 are broken: cut short, and no image at all."""
        for k, name in enumerate("ab"):
            (tmp_path / name).mkdir()
            for i in range(100):
                noise = np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(noise + np.uint8(k)).save(tmp_path / name / f"{i}.png")
        broken = tmp_path / "b" / "30.png"
        broken.write_bytes(broken.read_bytes()[:400])
        (tmp_path / "b" / "31.png").write_text("gone")
        return tmp_path

    def whole(self, folder: Path) -> Images:
        """All of the folder, so that the neighbours are known: image 130 is b/30.png."""
        return Images(open_splits(DataSpec("folder", folder, val_fraction=0)).train.source)

    def test_is_not_hidden_by_timms_retries(self, folder):
        images = self.whole(folder)
        with pytest.raises(OSError, match="truncated"):
            images[130]
        with pytest.raises(OSError, match="cannot identify"):
            images[131]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_training_takes_the_next_image(self, folder, workers, caplog):
        images = self.whole(folder)
        spec = dataclasses.replace(SPEC, no_aug=True, workers=workers)
        loader = train_loader(images, spec, 0, "cpu")
        with caplog.at_level(logging.WARNING):
            (pixels, labels), again = epochs(loader, 0, 0)
        assert len(labels) == 200  # batches keep their size
        assert labels.sum() == 100
        assert same((pixels, labels), again)
        assert {Path(name).name for name in loader.corrupt.files} == {"30.png", "31.png"}
        assert len(loader.corrupt) == 2
        assert len(caplog.records) == 2  # each file once, in whatever epoch and worker
        copies = torch.unique(pixels, dim=0, return_counts=True)[1]
        assert sorted(copies.tolist())[-2:] == [1, 3]  # b/32.png stands in for both

    @pytest.mark.parametrize("workers", [0, 2])
    def test_evaluation_leaves_it_out(self, folder, workers):
        loader = eval_loader(self.whole(folder), dataclasses.replace(SPEC, workers=workers, batch_size=2), "cpu")
        batches = list(loader)
        assert len(batches) == 99  # images 130 and 131 would have been a batch
        assert sum(len(y) for _, y in batches) == 198
        assert len(loader.corrupt) == 2

    @pytest.mark.parametrize("make", [lambda d: train_loader(d, SPEC, 0, "cpu"), lambda d: eval_loader(d, SPEC, "cpu")])
    @pytest.mark.parametrize("broken", [3, 100])
    def test_more_than_one_percent_end_the_run(self, folder, make, broken):
        for i in range(broken):
            (folder / "a" / f"{i}.png").write_text("gone")
        with pytest.raises(UserError, match=r"of 200 images cannot be read .*a/\d+\.png.*cannot identify") as error:
            list(make(self.whole(folder)))
        assert "\n" not in str(error.value)


def test_tar_read_by_the_main_process_before_workers_fork(tmp_path):
    """Forked workers must not share a file offset with each other or with the main process."""
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for i in range(60):
            data = io.BytesIO()
            Image.new("RGB", (8, 8), (4 * i, 0, 0)).save(data, "png")
            member = tarfile.TarInfo(f"{'ab'[i // 30]}/{i:02}.png")
            member.size = len(data.getvalue())
            data.seek(0)
            tar.addfile(member, data)
    images = Images(open_splits(DataSpec("folder", tmp_path / "all.tar")).train.source)
    _ = images[0]
    pixels, _ = epochs(eval_loader(images, dataclasses.replace(SPEC, workers=2), "cpu"), 0)[0]
    assert ((pixels[:, 0, 0, 0] * STD[0] + MEAN[0]) * 255 / 4).round().tolist() == list(range(60))


def test_mixup_is_timms():
    assert mixup_fn(10) is None
    images, labels = torch.rand(8, 3, 8, 8), torch.arange(8)
    for ours in (
        {"mixup": 0.8},
        {"cutmix": 1.0},
        {"cutmix_minmax": (0.2, 0.8)},
        {"mixup": 0.8, "cutmix": 1.0},
    ):
        options = {"prob": 0.9, "switch_prob": 0.4, "mode": "elem"}
        named = {{"mixup": "mixup_alpha", "cutmix": "cutmix_alpha"}.get(k, k): v for k, v in ours.items()}
        timms = Mixup(**{"mixup_alpha": 0.0} | named, **options, label_smoothing=0.2, num_classes=10)
        np.random.seed(0)
        expected = timms(images.clone(), labels)
        np.random.seed(0)
        mixed, targets = mixup_fn(10, smoothing=0.2, **ours, **options)(images.clone(), labels)
        assert torch.equal(mixed, expected[0])
        assert torch.equal(targets, expected[1])
        assert torch.allclose(targets.sum(1), torch.ones(8))


class TestStreams:
    """timm's webdataset and streaming Hugging Face readers, where these packages are installed."""

    @pytest.fixture
    def shards(self, tmp_path) -> DataSpec:
        """Six shards of 8 images, pixel values 4 * number, label number % 5."""
        pytest.importorskip("webdataset")
        info = {"num_samples": 48, "filenames": [], "shard_lengths": [8] * 6}
        for shard in range(6):
            info["filenames"].append(f"part-{shard}.tar")
            with tarfile.open(tmp_path / f"part-{shard}.tar", "w") as tar:
                for i in range(8 * shard, 8 * shard + 8):
                    data = io.BytesIO()
                    Image.new("RGB", (24, 24), (4 * i, 0, 0)).save(data, "png")
                    for ending, content in (("png", data.getvalue()), ("cls", str(i % 5).encode())):
                        member = tarfile.TarInfo(f"{i:03}.{ending}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        splits = {name: {"name": name, **info} for name in ("train", "validation")}
        (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
        return DataSpec("wds/", tmp_path, val_fraction=0, num_classes=5)

    def numbers(self, batches) -> list[int]:
        return [round(v * 255 / 4) for x, _ in batches for v in (x[:, 0, 0, 0] * STD[0] + MEAN[0]).tolist()]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_training_replays(self, shards, workers):
        splits = open_splits(shards)
        assert splits.val is None
        spec = dataclasses.replace(STRONG, workers=workers)
        first, second = epochs(train_loader(splits.train, spec, 1, "cpu"), 0, 1)
        assert len(first[1]) == 48
        assert not torch.equal(first[0], second[0])
        np.random.seed(3)
        again, before = epochs(train_loader(splits.train, spec, 1, "cpu"), 1, 0)
        assert same(again, second)
        assert same(before, first)
        assert not torch.equal(epochs(train_loader(splits.train, spec, 2, "cpu"), 0)[0][1], first[1])

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("world_size", [1, 3])
    def test_evaluation_is_exact(self, shards, workers, world_size):
        splits = open_splits(shards)
        spec = dataclasses.replace(SPEC, workers=workers, batch_size=5)
        for images in (splits.test, splits.train):
            loaders = [eval_loader(images, spec, "cpu", rank, world_size) for rank in range(world_size)]
            batches = [batch for loader in loaders for batch in loader]
            assert sorted(self.numbers(batches)) == list(range(48))
            assert [number % 5 for number in self.numbers(batches)] == [y for _, ys in batches for y in ys.tolist()]

    def test_ranks_share_the_training_shards(self, shards):
        splits = open_splits(shards)
        spec = dataclasses.replace(SPEC, no_aug=True)
        seen = [self.numbers(train_loader(splits.train, spec, 0, "cpu", rank, 2)) for rank in range(2)]
        assert set(seen[0]).isdisjoint(seen[1])
        assert len(set(seen[0] + seen[1])) == 48

    def test_what_a_stream_cannot_do(self, shards):
        with pytest.raises(UserError, match="does not record its classes; pass --num-classes"):
            open_splits(dataclasses.replace(shards, num_classes=None))
        with pytest.raises(UserError, match="--aug-repeats needs random access"):
            train_loader(open_splits(shards).train, dataclasses.replace(SPEC, aug_repeats=3), 0, "cpu")

    def test_hugging_face_stream(self, tmp_path):
        datasets = pytest.importorskip("datasets")
        columns = {
            "image": [Image.new("RGB", (24, 24), (4 * i, 0, 0)) for i in range(24)],
            "label": [0, 1, 2] * 8,
        }
        label = datasets.ClassLabel(names=["x", "y", "z"])
        made = datasets.Dataset.from_dict(columns, datasets.Features({"image": datasets.Image(), "label": label}))
        for split in ("train", "validation"):
            made.to_parquet(tmp_path / "hub" / f"{split}-00000-of-00001.parquet")
        names = "".join(f"          '{label}': {name}\n" for label, name in enumerate("xyz"))
        size = "  - name: {}\n    num_examples: 24\n    num_bytes: 1\n"
        sizes = size.format("train") + size.format("validation")
        (tmp_path / "hub" / "README.md").write_text(
            "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n"
            f"    dtype:\n      class_label:\n        names:\n{names}  splits:\n{sizes}---\n"
        )
        splits = open_splits(DataSpec(f"hfids/{tmp_path / 'hub'}", tmp_path / "cache", val_fraction=0))
        assert splits.class_names == ("x", "y", "z")
        (first,), (second,) = (epochs(train_loader(splits.train, STRONG, 1, "cpu"), 3) for _ in range(2))
        assert same(first, second)
        assert len(first[1]) == 24
        assert not torch.equal(epochs(train_loader(splits.train, STRONG, 2, "cpu"), 3)[0][1], first[1])
        batches = [batch for rank in range(2) for batch in eval_loader(splits.test, SPEC, "cpu", rank, 2)]
        assert sorted(self.numbers(batches)) == list(range(24))

    def test_tensorflow_stream(self, tmp_path):
        tfds = pytest.importorskip("tensorflow_datasets")
        tf = pytest.importorskip("tensorflow")
        pixels = np.zeros((24, 24, 24, 3), np.uint8)
        pixels[..., 0] = 4 * np.arange(24)[:, None, None]
        made = tf.data.Dataset.from_tensor_slices({"image": pixels, "label": np.arange(24) % 3})
        tfds.dataset_builders.store_as_tfds_dataset(
            name="numbers",
            version="1.0.0",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(24, 24, 3)),
                    "label": tfds.features.ClassLabel(names=["x", "y", "z"]),
                }
            ),
            split_datasets={"train": made, "validation": made},
            data_dir=tmp_path,
        )
        splits = open_splits(DataSpec("tfds/numbers", tmp_path, val_fraction=0))
        assert splits.class_names == ("x", "y", "z")
        (first,), (second,) = (epochs(train_loader(splits.train, STRONG, 1, "cpu"), 3) for _ in range(2))
        assert same(first, second)
        assert len(first[1]) == 24
        for rank, world_size in ((0, 1), (1, 2)):
            batches = list(eval_loader(splits.test, SPEC, "cpu", rank, world_size))
            assert len(self.numbers(batches)) == 24 // world_size
            labels = [y for _, ys in batches for y in ys.tolist()]
            assert [number % 3 for number in self.numbers(batches)] == labels
