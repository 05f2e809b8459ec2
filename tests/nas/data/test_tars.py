"""Tars as people make, copy and break them: read whole, or refused."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from nas.data.datasets import DataSpec, Splits, open_splits
from nas.data.listing import NO_FILE, OTHERS
from nas.data.tars import members, read_member
from search_spaces.errors import UserError
from tests.nas.data.inputs import CLASSES, class_folders, picture, seen, tars_of


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    return tars_of(class_folders(tmp_path / "data", (("train", 6), ("val", 3))), tmp_path / "tars")


def opened(tars: Path) -> Splits:
    splits = open_splits(DataSpec("folder", tars, val_fraction=0))
    assert splits.train.labels.tolist() == seen(splits.train) and splits.test.labels.tolist() == seen(splits.test)
    return splits


def refused(tars: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        opened(tars)
    assert "\n" not in str(error.value)


def put(tar: tarfile.TarFile, name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = len(content), kind, link
    tar.addfile(member, io.BytesIO(content))


def png(channel: int) -> bytes:
    out = io.BytesIO()
    picture(channel, size=(8, 8)).save(out, "PNG")
    return out.getvalue()


def starts_of_members(path: Path) -> list[int]:
    with tarfile.open(path) as tar:
        return [member.offset for member in tar.getmembers()]


def test_a_tar_cut_anywhere_is_refused(tars: Path) -> None:
    path = tars / "train.tar"
    whole = path.read_bytes()
    ends = starts_of_members(path)  # where Python ends without a word
    for length in (*ends, *(end + 100 for end in ends), *range(0, len(whole) - 10_240, 7919)):
        path.write_bytes(whole[:length])
        refused(tars, "train.tar")


def test_a_damaged_header_is_refused(tars: Path) -> None:
    path = tars / "train.tar"
    whole = bytearray(path.read_bytes())
    whole[starts_of_members(path)[9] + 150] ^= 0xFF  # in its checksum
    path.write_bytes(whole)
    refused(tars, r"train\.tar is cut short or damaged \(no end mark at byte \d+\)")


def test_two_tars_in_one_file_are_refused(tars: Path) -> None:
    path = tars / "train.tar"
    path.write_bytes(path.read_bytes() * 2)
    refused(tars, r"train\.tar has more behind its end mark")


@pytest.mark.parametrize("zeros", [0, 10_240, 3 << 20])
def test_zeros_behind_the_end_mark_are_none_of_it(tars: Path, zeros: int) -> None:
    path = tars / "train.tar"
    path.write_bytes(path.read_bytes() + b"\0" * zeros)
    assert len(opened(tars).train) == 18


@pytest.mark.parametrize("content", [b"\0" * 10_240, b"", b"no tar"])
def test_no_members(tars: Path, content: bytes) -> None:
    (tars / "val.tar").write_bytes(content)
    refused(tars, r"val\.tar: ")


def test_only_folders_in_it(tars: Path) -> None:
    with tarfile.open(tars / "val.tar", "w") as tar:
        put(tar, "ant", kind=tarfile.DIRTYPE)
    refused(tars, r"val\.tar: found 0 images; expected")


def test_a_compressed_tar_is_refused(tars: Path) -> None:
    (tars / "train.tar").write_bytes(gzip.compress((tars / "train.tar").read_bytes()))
    refused(tars, "train.tar")
    (tars / "train.tar").rename(tars / "train.tar.gz")
    refused(tars, r"found only val\.tar")


def test_links_lead_to_what_was_packed(tmp_path: Path) -> None:
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for channel, name in enumerate(CLASSES):
                put(tar, f"{name}/0.png", png(channel))
                put(tar, f"./{name}/1.png", kind=tarfile.LNKTYPE, link=f"{name}/0.png")
                put(tar, f"{name}/2.png", kind=tarfile.SYMTYPE, link="1.png")
                put(tar, f"{name}/sub/3.png", kind=tarfile.SYMTYPE, link=f"../../{name}/2.png")
            put(tar, "ant/4.png", kind=tarfile.SYMTYPE, link="/elsewhere/0.png")
            put(tar, "ant/5.png", kind=tarfile.SYMTYPE, link="6.png")
            put(tar, "ant/6.png", kind=tarfile.SYMTYPE, link="5.png")
            put(tar, "ant/7.png", kind=tarfile.FIFOTYPE)
    splits = opened(tmp_path)
    assert len(splits.train) == 12 and splits.left_out == {NO_FILE: 8}


def test_a_name_that_comes_again_replaces(tmp_path: Path) -> None:
    """As it does where the tar is unpacked: `tar --append` of files that were corrected."""
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            put(tar, "ant/0.png", png(2))
            put(tar, "bee/0.png", png(1))
            put(tar, "./ant/0.png", png(0))
            put(tar, "bee/1.png", kind=tarfile.SYMTYPE, link="0.png")
            put(tar, "bee/1.png", png(1))
    assert opened(tmp_path).train.labels.tolist() == [0, 1, 1]


def test_tars_in_tars_at_any_depth(tmp_path: Path) -> None:
    def packed(*content: tuple[str, bytes]) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            for name, data in content:
                put(tar, name, data)
        return out.getvalue()

    for split in ("train", "val"):
        inner = [
            (f"{name}.tar", packed((f"{name}/0.png", png(k)), ("1.png", png(k)))) for k, name in enumerate(CLASSES)
        ]
        inner[0] = ("ant.TAR", packed(("deep.tar", packed(("0.png", png(0)))), ("1.png", png(0))))
        (tmp_path / f"{split}.tar").write_bytes(packed(("all.tar", packed(*inner)), ("readme.txt", b"")))
    splits = opened(tmp_path)
    assert splits.class_names == CLASSES and sorted(splits.train.labels) == [0, 0, 1, 1, 2, 2]
    (tmp_path / "val.tar").write_bytes(packed(("ant.tar", packed(("0.png", png(0)))[:700])))
    refused(tmp_path, r"val\.tar.*ant\.tar")


def test_what_a_mac_leaves_beside_a_tar_is_none(tmp_path: Path) -> None:
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for channel, name in enumerate(CLASSES):
                put(tar, f"{name}/0.png", png(channel))
            put(tar, "._ant.tar", b"Mac OS X")
    splits = opened(tmp_path)
    assert len(splits.train) == 3 and splits.left_out == {OTHERS: 2}


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_and_long_names(tmp_path: Path, kind: int) -> None:
    long = "x" * 90 + "/" + "ü" * 40
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w", format=kind) as tar:
            for channel, name in enumerate(CLASSES):
                put(tar, f"{name}/{long}.png", png(channel))
                put(tar, f"{name}/0.png", png(channel))
    assert len(opened(tmp_path).train) == 6


def test_a_sparse_member_is_not_read_as_it_lies(tmp_path: Path) -> None:
    path = tmp_path / "sparse.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("ant/0.png")
        content = b"1\n0\n3\n".ljust(512, b"\0") + b"abc"
        member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "3"}
        member.pax_headers["GNU.sparse.name"] = "ant/0.png"
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    assert [(thing.path, thing.kind) for thing in members(path)] == [("ant/0.png", NO_FILE)]


def test_members_are_read_at_their_place(tars: Path) -> None:
    path = tars / "train.tar"
    for thing in members(path):
        if thing.place:
            assert Image.open(io.BytesIO(read_member(path, thing.place))).size == (40, 40)
    assert tars.joinpath("train.tar") in list(tars.iterdir()) and len(list(tars.iterdir())) == 2  # no cache beside it
