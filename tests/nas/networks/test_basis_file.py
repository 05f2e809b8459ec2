"""basis.safetensors: read back as it was written, and refused where it is another run's or nobody's."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nas.networks.architecture import architecture_of
from nas.networks.basis_file import BASIS, basis_of, read_basis, recorded, save_basis, streams_of
from search_spaces.architecture import Architecture, load_architecture, save_architecture
from search_spaces.errors import UserError
from supernets.basis import Basis, rewrite
from tests.nas.small import small_supernet
from tests.strategies import images, random_basis


def some_basis(seed: int = 0) -> Basis:
    return random_basis(small_supernet("swin"), seed)


def standing(basis: Basis) -> Architecture:
    """An architecture that stands in the basis."""
    supernet = small_supernet("swin")
    arch = architecture_of(supernet, "swin-dan-nano", "swin_tiny_patch4_window7_224", {}, [{"alpha": 2}] * 3)
    return replace(arch, basis=recorded(basis))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    basis = some_basis()
    save_basis(basis, tmp_path)
    again = read_basis(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [BASIS]
    first, second = basis.tensors(), again.tensors()
    assert first.keys() == second.keys() and all(torch.equal(t, second[name]) for name, t in first.items())
    assert again.streams.keys() == {0, 1} and again.orders == basis.orders
    networks = [small_supernet("swin", seed=1) for _ in range(2)]
    for network, each in zip(networks, (basis, again), strict=True):
        rewrite(network, each)
    x = images(networks[0].backbone)
    assert torch.equal(networks[0].large(x), networks[1].large(x))


def test_the_architecture_names_it(tmp_path: Path) -> None:
    basis = some_basis()
    save_basis(basis, tmp_path)
    arch = standing(basis)
    assert streams_of(arch.basis) == (0, 1) and len(arch.basis["sha256"]) == 64
    save_architecture(arch, tmp_path / "arch.json")
    found = load_architecture(tmp_path)
    assert found == arch
    read = basis_of(found, tmp_path)
    assert read is not None and torch.equal(read.streams[1], basis.streams[1])


def test_one_that_rotates_no_stream_is_named_too(tmp_path: Path) -> None:
    """Heads and neurons stand in its orders, q, k and v in its changes."""
    ordered = Basis(orders={"blocks.0.heads": [1, 0]})
    save_basis(ordered, tmp_path)
    arch = standing(ordered)
    assert arch.basis == {"streams": [], "sha256": ordered.digest()} and streams_of(arch.basis) == ()
    read = basis_of(arch, tmp_path)
    assert read is not None and read.orders == ordered.orders
    assert basis_of(replace(arch, basis={}), tmp_path / "nowhere") is None


def test_the_hash_is_that_of_what_a_file_holds(tmp_path: Path) -> None:
    """And of a checkpoint; however the tensors lie in the file."""
    basis = some_basis()
    arch = standing(basis)
    assert arch.basis["sha256"] == basis.digest()
    save_file(basis.tensors(), tmp_path / BASIS, {"written": "by another program"})
    read = basis_of(arch, tmp_path)
    assert read is not None and read.digest() == basis.digest()


def test_an_architecture_that_names_the_hash_of_the_file_is_read(tmp_path: Path) -> None:
    """As the first ones in a basis did."""
    save_basis(some_basis(), tmp_path)
    of_file = hashlib.sha256((tmp_path / BASIS).read_bytes()).hexdigest()
    arch = replace(standing(some_basis()), basis={"streams": [0, 1], "sha256": of_file})
    assert basis_of(arch, tmp_path) is not None
    save_basis(some_basis(1), tmp_path)
    with pytest.raises(UserError, match=f"arch.json names {of_file[:12]}"):
        basis_of(arch, tmp_path)


def test_the_basis_of_another_run_is_refused_by_both_hashes(tmp_path: Path) -> None:
    own, other = some_basis(0), some_basis(1)
    hashes = []
    for name, basis in (("own", own), ("other", other)):
        (tmp_path / name).mkdir()
        save_basis(basis, tmp_path / name)
        hashes.append(recorded(basis)["sha256"])
    arch = standing(own)
    with pytest.raises(UserError, match="different runs") as error:
        basis_of(arch, tmp_path / "other")
    said = str(error.value)
    assert f"{tmp_path / 'other' / BASIS}" in said and "\n" not in said
    assert hashes[0][:12] in said and hashes[1][:12] in said
    tensors = load_file(tmp_path / "own" / BASIS)
    tensors["stream.0"] = tensors["stream.0"] + 1e-9
    save_file(tensors, tmp_path / "own" / BASIS)
    with pytest.raises(UserError, match="different runs"):
        basis_of(arch, tmp_path / "own")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    basis = some_basis()
    save_basis(basis, tmp_path)
    arch = standing(basis)
    (tmp_path / BASIS).unlink()
    with pytest.raises(
        UserError, match=r"basis\.safetensors: no such file; the architecture stands in a rotated basis"
    ):
        basis_of(arch, tmp_path)


def test_what_is_no_basis_is_refused(tmp_path: Path) -> None:
    for name in ("head.weight", "stream.first", "energy", "before.x"):
        save_file({name: torch.zeros(3)}, tmp_path / BASIS)
        with pytest.raises(UserError, match=r"basis\.safetensors is not a basis of this toolkit") as error:
            read_basis(tmp_path)
        assert "\n" not in str(error.value)
    (tmp_path / BASIS).write_bytes((tmp_path / BASIS).read_bytes()[:20])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        read_basis(tmp_path)
    (tmp_path / BASIS).unlink()
    (tmp_path / BASIS).mkdir()
    with pytest.raises(UserError, match="no such file"):
        read_basis(tmp_path)
