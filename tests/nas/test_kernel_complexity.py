"""KC and TNN_r against numpy on the full feature matrix, and the separable batch form against both."""

import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from nas.kernel_complexity import _figure, main
from nas.objectives.spectrum import (
    SecondMoment,
    kernel_complexity,
    separable_tnn,
    spectrum,
    spectrum_of_second_moment,
    trace_normalised,
    truncated_nuclear_norm,
    truncation_rank,
)
from search_spaces.errors import UserError

SHAPES = [(40, 12), (12, 40), (20, 20), (1, 7), (7, 1)]  # n > D, n < D, square, one image, one feature
KINDS = ["random", "low-rank", "constant", "zero"]


def features(kind: str, n: int, num_features: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    if kind == "constant":  # every image the same: rank one
        return torch.randn(1, num_features, generator=draw).repeat(n, 1)
    if kind == "zero":
        return torch.zeros(n, num_features)
    rank = 3 if kind == "low-rank" else max(n, num_features)
    # Columns of very different size, as trained features have.
    scale = torch.logspace(1, -2, num_features)
    mixed = torch.randn(n, rank, generator=draw) @ torch.randn(rank, num_features, generator=draw)
    return mixed / math.sqrt(rank) * scale


def numpy_spectrum(features_ND: Tensor) -> NDArray[np.float64]:
    """All n eigenvalues of the n x n Gram matrix FF^T/n, the definition that the toolkit avoids forming."""
    f = features_ND.double().numpy()
    return np.clip(np.linalg.eigvalsh(f @ f.T / len(f))[::-1], 0, None)


def numpy_kc(lam: NDArray[np.float64]) -> float:
    n = len(lam)
    return float(min(h / n + math.sqrt(max(lam[h:].sum(), 0) / n) for h in range(n + 1)))


def same(value: float, expected: float, scale: float = 1.0) -> None:
    assert value == pytest.approx(expected, rel=1e-9, abs=1e-12 * max(scale, 1))


# Full-matrix eigenvalue form


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_kc_and_tnn_equal_numpy_on_the_full_feature_matrix(kind: str, shape: tuple[int, int]) -> None:
    n, num_features = shape
    f = features(kind, n, num_features)
    lam = numpy_spectrum(f)
    ours = spectrum(f)
    kept = min(n, num_features)
    assert ours.shape == (kept,)
    assert bool((ours >= 0).all())
    assert bool((ours[:-1] >= ours[1:]).all())
    np.testing.assert_allclose(ours.numpy(), lam[:kept], rtol=1e-9, atol=1e-12 * lam[0])
    # A tail that is zero comes out of either route as rounding of 1e-16 * lam_1; KC takes its root.
    rounding = math.sqrt(1e-14 * lam[0])
    assert kernel_complexity(ours, n) == pytest.approx(numpy_kc(lam), rel=1e-9, abs=rounding)
    if lam.sum() > 0:
        normalised = numpy_kc(lam / lam.sum())
        assert kernel_complexity(trace_normalised(ours), n) == pytest.approx(normalised, rel=1e-9, abs=1e-7)
    for rho in (0.0, 0.1, 0.5, 1.0):
        r = truncation_rank(rho, n, num_features)
        same(truncated_nuclear_norm(ours, r), lam[r:].sum(), lam[0])


def test_constant_features_have_one_eigenvalue_and_tell_raw_from_normalised() -> None:
    f = torch.full((50, 4), 3.0)  # |f_i|^2 = 36
    lam = spectrum(f)
    same(float(lam[0]), 36.0)
    assert float(lam[1:].sum()) < 1e-12
    assert kernel_complexity(lam, 50) == pytest.approx(1 / 50, abs=1e-6)  # h = 1; h = 0 costs sqrt(36/50)
    assert kernel_complexity(spectrum(f / 1e3), 50) == pytest.approx(6e-3 / math.sqrt(50))  # now h = 0
    for scaled in (lam, spectrum(f / 1e3)):
        assert kernel_complexity(trace_normalised(scaled), 50) == pytest.approx(1 / 50, abs=1e-6)


def test_kc_of_a_zero_spectrum_is_zero_and_normalising_it_does_not_divide_by_zero() -> None:
    zeros = torch.zeros(5)
    assert kernel_complexity(zeros, 9) == 0
    assert torch.equal(trace_normalised(zeros), zeros)


@given(
    lam=st.lists(st.floats(0, 1e6), max_size=25).map(lambda values: sorted(values, reverse=True)),
    extra=st.integers(0, 30),
)
def test_kc_scans_every_h_from_0_to_n(lam: list[float], extra: int) -> None:
    n = max(len(lam) + extra, 1)
    padded = np.array(lam + [0.0] * (n - len(lam)))
    brute = min(h / n + math.sqrt(math.fsum(padded[h:]) / n) for h in range(n + 1))
    assert kernel_complexity(torch.tensor(lam, dtype=torch.float64), n) == pytest.approx(brute, rel=1e-9)


def test_kc_takes_an_inner_h() -> None:
    # Three eigenvalues of 50, then 1e-4: cheaper to pay 3/100 for the three than sqrt(1.5) for their sum.
    lam = torch.tensor([50.0, 50.0, 50.0, 1e-4, 1e-4], dtype=torch.float64)
    same(kernel_complexity(lam, 100), 3 / 100 + math.sqrt(2e-4 / 100))


def test_kc_refuses_more_eigenvalues_than_images() -> None:
    with pytest.raises(ValueError, match="5 eigenvalues of 4 images"):
        kernel_complexity(torch.zeros(5), 4)


@given(n=st.integers(1, 25), num_features=st.integers(1, 25), rho=st.floats(0, 1), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_spectrum_from_any_split_into_batches(n: int, num_features: int, rho: float, seed: int) -> None:
    f = features("random", n, num_features, seed)
    cut = seed % (n + 1)
    parts = f[:cut].double(), f[cut:].double()
    lam = spectrum_of_second_moment(sum(part.T @ part for part in parts), n)  # type: ignore[arg-type]
    torch.testing.assert_close(lam, spectrum(f), rtol=1e-9, atol=1e-12 * float(lam[0]))


# Truncation rank


@pytest.mark.parametrize(
    ("rho", "n", "num_features", "r"),
    [(0.0, 9, 9, 0), (1.0, 9, 20, 9), (0.5, 5, 100, 3), (0.01, 1000, 64, 1), (0.07, 100, 100, 7)],
)
def test_truncation_rank_is_the_ceiling_in_decimals(rho: float, n: int, num_features: int, r: int) -> None:
    assert truncation_rank(rho, n, num_features) == r  # 0.07 * 100 > 7 in binary


@pytest.mark.parametrize("rho", [-0.1, 1.01, math.nan])
def test_truncation_rank_refuses_a_share_outside_0_to_1(rho: float) -> None:
    with pytest.raises(UserError, match=r"rho is .*from 0 to 1"):
        truncation_rank(rho, 10, 10)


# Separable form


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rho", [0.0, 0.2, 0.6, 1.0])
def test_separable_form_equals_the_eigenvalue_form_on_the_full_set(
    kind: str, shape: tuple[int, int], rho: float
) -> None:
    n, num_features = shape
    f = features(kind, n, num_features)
    lam = numpy_spectrum(f)
    r = truncation_rank(rho, n, num_features)
    moment = SecondMoment(num_features)
    batches = f.split(5)
    for batch in batches:
        moment.update(batch)
    kernel = moment.finish(rho)
    basis = moment.previous_basis_Dr
    assert basis is not None
    assert basis.shape == (num_features, r)
    assert (kernel.n, kernel.rank) == (n, r)
    same(kernel.tnn, lam[r:].sum(), lam[0])
    assert kernel.kc == pytest.approx(numpy_kc(lam), rel=1e-9, abs=math.sqrt(1e-14 * lam[0]))
    # In float64 features the form is limited only by the float32 basis; batches weigh by their images.
    by_batch = sum(float(separable_tnn(b.double(), basis)) * len(b) for b in batches) / n
    assert by_batch == pytest.approx(lam[r:].sum(), rel=1e-5, abs=1e-11 * lam[0])
    # Float32, as in training: no worse, thanks to the residual form.
    assert float(separable_tnn(f, basis)) == pytest.approx(lam[r:].sum(), rel=1e-4, abs=1e-11 * lam[0])


def test_separable_form_is_the_difference_of_squares_it_stands_for() -> None:
    f = features("random", 30, 10).double()
    v = torch.linalg.qr(torch.randn(10, 4, dtype=torch.float64)).Q
    expected = (f.square().sum(1) - (f @ v).square().sum(1)).mean()
    torch.testing.assert_close(separable_tnn(f, v), expected)


@given(n=st.integers(2, 30), num_features=st.integers(2, 12), rank=st.integers(0, 12), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_a_basis_of_another_epoch_bounds_tnn_from_above(n: int, num_features: int, rank: int, seed: int) -> None:
    rank = min(rank, num_features)
    f = features("random", n, num_features, seed).double()
    draw = torch.Generator().manual_seed(seed)
    stale = torch.linalg.qr(torch.randn(num_features, rank, dtype=torch.float64, generator=draw)).Q
    lam = spectrum(f)
    assert float(separable_tnn(f, stale)) >= truncated_nuclear_norm(lam, rank) - 1e-9 * float(lam[0])


def test_gradient_matches_finite_differences_and_none_passes_through_the_basis() -> None:
    f = features("random", 6, 5).double().requires_grad_()
    basis = torch.linalg.qr(torch.randn(5, 2, dtype=torch.float64)).Q.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: separable_tnn(x, basis), (f,))
    separable_tnn(f, basis).backward()
    assert f.grad is not None
    assert basis.grad is None
    with torch.no_grad():  # in closed form: 2 (I - V V^T) f / B
        expected = 2 * (f - f @ basis @ basis.T) / len(f)
    torch.testing.assert_close(f.grad, expected)


def test_no_gradient_reaches_the_features_that_gave_the_basis() -> None:
    f = features("random", 20, 6).requires_grad_()
    moment = SecondMoment(6)
    moment.update(f)
    moment.finish(0.5)
    assert moment.previous_basis_Dr is not None
    assert not moment.previous_basis_Dr.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_does_not_lower_the_precision(dtype: torch.dtype) -> None:
    # A tail 1e-4 of the trace: bf16 products would lose it altogether.
    f = features("low-rank", 64, 16) + 1e-2 * features("random", 64, 16, seed=1)
    f = f.to(dtype)
    lam = numpy_spectrum(f)
    moment = SecondMoment(16)
    leaf = f.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert (torch.eye(2) @ torch.eye(2)).dtype == torch.bfloat16  # autocast is on
        moment.update(f)
        kernel = moment.finish(0.2)
        assert moment.previous_basis_Dr is not None
        tnn = separable_tnn(leaf, moment.previous_basis_Dr)
    tnn.backward()
    assert tnn.dtype == torch.float32
    assert moment.previous_basis_Dr.dtype == torch.float32
    tail = lam[kernel.rank :].sum()
    assert 0 < tail < 1e-2 * lam.sum()
    assert float(tnn.detach()) == pytest.approx(tail, rel=1e-4)
    assert kernel.tnn == pytest.approx(tail, rel=1e-9)
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype
    v = moment.previous_basis_Dr.double()
    expected = 2 * (f.double() - f.double() @ v @ v.T) / len(f)
    tolerance = 1e-4 if dtype is torch.float32 else 1e-2
    assert float((leaf.grad.double() - expected).norm() / expected.norm()) < tolerance


# Epochs


def test_the_basis_is_that_of_the_epoch_before_and_the_sum_restarts() -> None:
    first, second = features("random", 30, 8, seed=1), features("random", 20, 8, seed=2).flip(1)
    moment = SecondMoment(8)
    moment.update(first)
    assert moment.previous_basis_Dr is None  # the first epoch has no TNN term
    moment.finish(0.25)
    after_first = moment.previous_basis_Dr
    assert after_first is not None
    moment.update(second)
    assert moment.previous_basis_Dr is after_first  # unmoved while the second epoch runs
    kernel = moment.finish(0.25)
    same(kernel.tnn, numpy_spectrum(second)[2:].sum(), 100)  # nothing of the first epoch is left in it
    assert kernel.n == 20

    def projector(f: Tensor) -> NDArray[np.float64]:
        _, vectors = np.linalg.eigh(f.double().numpy().T @ f.double().numpy())
        return vectors[:, -2:] @ vectors[:, -2:].T

    after_second = moment.previous_basis_Dr
    np.testing.assert_allclose((after_first @ after_first.T).numpy(), projector(first), atol=1e-5)
    np.testing.assert_allclose((after_second @ after_second.T).numpy(), projector(second), atol=1e-5)


@pytest.mark.parametrize("stop", [3, 6, 7])  # inside the first epoch, at its end, inside the second
def test_a_resumed_moment_goes_on_bit_for_bit(stop: int, tmp_path: Path) -> None:
    batches = features("random", 60, 8).split(5)  # two epochs of six batches

    def run(moment: SecondMoment, begin: int, end: int) -> None:
        for i in range(begin, end):
            moment.update(batches[i])
            if i % 6 == 5:
                kernels.append(moment.finish(0.5))

    kernels: list = []  # type: ignore[type-arg]
    straight = SecondMoment(8)
    run(straight, 0, stop)
    torch.save(straight.state_dict(), tmp_path / "state.pt")
    basis_at_stop = straight.previous_basis_Dr
    run(straight, stop, 12)
    resumed = SecondMoment(8)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (resumed.previous_basis_Dr is None) == (stop < 6)
    if basis_at_stop is not None:
        assert torch.equal(resumed.previous_basis_Dr, basis_at_stop)  # type: ignore[arg-type]
    run(resumed, stop, 12)
    assert torch.equal(kernels[-1].eigenvalues, kernels[1].eigenvalues)
    assert (kernels[-1].kc, kernels[-1].tnn, kernels[-1].n) == (kernels[1].kc, kernels[1].tnn, 30)
    assert straight.previous_basis_Dr is not None
    assert resumed.previous_basis_Dr is not None
    assert torch.equal(straight.previous_basis_Dr, resumed.previous_basis_Dr)


def test_a_state_is_a_copy_and_loading_one_replaces_everything() -> None:
    moment = SecondMoment(4)
    empty = moment.state_dict()
    moment.update(features("random", 9, 4))
    assert float(empty["sum"].abs().sum()) == 0
    moment.finish(0.5)
    moment.update(features("random", 9, 4))
    moment.load_state_dict(empty)
    assert moment.previous_basis_Dr is None
    with pytest.raises(ValueError, match="without a single update"):
        moment.finish(0.5)


def test_what_cannot_be_is_refused() -> None:
    moment = SecondMoment(4)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4\), expected \(B, 4\)"):
        moment.update(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="state of 5 features, expected 4"):
        moment.load_state_dict(SecondMoment(5).state_dict())
    moment.update(torch.full((2, 4), math.nan))
    with pytest.raises(UserError, match="pooled features: found NaN or infinity"):
        moment.finish(0.5)


@pytest.mark.slow
def test_processes_of_a_distributed_run_share_one_basis(tmp_path: Path) -> None:
    f = features("random", 32, 6)
    torch.multiprocessing.spawn(_rank, args=(f, str(tmp_path)), nprocs=2)
    alone = SecondMoment(6)
    alone.update(f)
    kernel = alone.finish(0.5)
    for rank in (0, 1):
        n, tnn, basis = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert n == 32
        assert tnn == pytest.approx(kernel.tnn, rel=1e-9)
        assert alone.previous_basis_Dr is not None
        torch.testing.assert_close(basis @ basis.T, alone.previous_basis_Dr @ alone.previous_basis_Dr.T)


def _rank(rank: int, f: Tensor, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    moment = SecondMoment(6)
    moment.update(f[:10] if rank == 0 else f[10:])  # unequal shares
    kernel = moment.finish(0.5)
    torch.save((kernel.n, kernel.tnn, moment.previous_basis_Dr), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


# The command

TINY = "--model vit_tiny_patch16_224 --model-kwargs img_size=32 patch_size=8 depth=1 embed_dim=24 num_heads=3"


def test_the_command_measures_what_enters_the_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import timm
    from PIL import Image
    from sklearn.datasets import load_digits

    from nas.data.datasets import DataSpec, open_splits

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, embed_dim=24, num_heads=3, num_classes=7
    ).eval()
    checkpoint = tmp_path / "weights.pth"
    torch.save({"state_dict": model.state_dict()}, checkpoint)  # seven classes: its classifier is no part of this
    picture = tmp_path / "new" / "spectrum.png"
    # Dropout before the classifier: off, or the features would be random.
    main([*TINY.split(), "drop_rate=0.5", "--checkpoint", str(checkpoint), "--output", str(picture)])
    printed = capsys.readouterr().out

    images = open_splits(DataSpec(val_fraction=0.0)).train
    assert len(images) < len(load_digits().images)  # the test images are no part of it
    pixels = torch.stack([torch.tensor(np.array(images[i][0])) for i in range(len(images))])
    entering: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    with torch.no_grad():
        model((pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)
    lam = numpy_spectrum(entering[0])
    assert f"n = {len(images)} training images, D = 24 pooled features" in printed
    found = {line[:20].strip(): float(line[20:].split()[0]) for line in printed.splitlines() if line[:2] == "KC"}
    assert found == {
        "KC": pytest.approx(numpy_kc(lam), abs=2e-6),
        "KC, trace-normalised": pytest.approx(numpy_kc(lam / lam.sum()), abs=2e-6),
    }
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG"
        assert len(drawn.convert("L").getcolors() or []) > 20  # not blank
    assert [f.name for f in picture.parent.iterdir()] == ["spectrum.png"]  # no temporary file stays


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model vit_tiny_patch16", "unknown model 'vit_tiny_patch16'; did you mean vit_tiny_patch16_"),
        (f"{TINY} global_pool=''", r"features of shape \(\d+, 17, 24\) .*, expected \(batch, features\)"),
        (f"{TINY} nonsense", "--model-kwargs 'nonsense'; expected KEY=VALUE"),
        (f"{TINY} --checkpoint none.pth", "none.pth: no such file"),
        (f"{TINY} --checkpoint none.pth --pretrained", "both name the weights; give one"),
        (f"{TINY} --output spectrum.pdf", "--output spectrum.pdf: expected the name of a .png file"),
        (f"{TINY} --device nowhere", "--device nowhere: .*; try --device cpu"),
        (f"{TINY} --dataset imagenet", "--dataset imagenet needs --data-dir"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    assert stopped.value.code == 2
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1
    assert re.search(message, lines[0])
    assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("features_of", ["zero", "constant"])
def test_a_spectrum_without_a_tail_can_be_drawn(features_of: str) -> None:
    moment = SecondMoment(6)
    moment.update(features(features_of, 9, 6))
    figure = _figure(moment.finish(0.5), 6, (0, 1), "title")
    figure.savefig(io.BytesIO(), format="png")
