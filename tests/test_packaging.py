"""What an installed package holds: every room, both programs, the literature's points, and no search.py."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

from nas.pictures.literature import PUBLISHED

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SCRIPTS = PROJECT["project"]["scripts"]
SOURCES = ("nas", "search_spaces", "supernets")


def test_every_room_is_named() -> None:
    rooms = {str(f.parent.relative_to(ROOT)).replace("/", ".") for name in SOURCES for f in (ROOT / name).rglob("*.py")}
    assert PROJECT["tool"]["setuptools"]["packages"] == sorted(rooms | {"nas.published"})


def test_a_checkout_reads_its_own_published_results() -> None:
    assert PUBLISHED == ROOT / "results" / "published.csv" and PUBLISHED.is_file()


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("started_as", ["/somewhere/bin/{}", "{}.py"])
def test_a_program_is_called_what_it_was_started_as(
    name: str, started_as: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, _, function = SCRIPTS[name].partition(":")
    called = Path(started_as.format(name)).name
    for option, says in (("--config=none.yaml", f"{called}: error: --config"), ("--help", f"usage: {called} ")):
        monkeypatch.setattr(sys, "argv", [started_as.format(name), option])
        with pytest.raises(SystemExit):
            getattr(import_module(module), function)()
        said = capsys.readouterr()
        assert (said.out + said.err).startswith(says)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed")
def test_a_wheel_installed_elsewhere_is_whole(tmp_path: Path) -> None:
    checkout, site = tmp_path / "checkout", tmp_path / "site"
    for name in (*SOURCES, "results/published.csv", "pyproject.toml", "README.md", "search.py", "retrain.py"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, checkout / name)
    (checkout / "results/run").mkdir()
    (checkout / "results/run/table.csv").write_text("of a run\n")
    built = subprocess.run(["uv", "build", "--wheel", "-o", tmp_path, checkout], capture_output=True, text=True)
    if "build-system.requires" in built.stderr:
        pytest.skip("what the build requires cannot be fetched")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {str(f.relative_to(ROOT)) for name in SOURCES for f in (ROOT / name).rglob("*.py")}
    assert names == sources | {"nas/sweeps/page.html", "nas/published/published.csv"}
    install = ["uv", "pip", "install", "--no-deps", "--python", sys.executable, "--target", site, wheel]
    subprocess.run(install, check=True, capture_output=True)
    elsewhere = dict(cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True)
    found = subprocess.run(
        [sys.executable, "-c", "import nas.pictures.literature as r; print(r.PUBLISHED)"], **elsewhere
    )
    assert found.stdout.strip() == str(site / "nas/published/published.csv"), found.stderr
    assert (site / "nas/published/published.csv").read_bytes() == PUBLISHED.read_bytes()
    for name in SCRIPTS:
        wrong = subprocess.run([site / "bin" / name, "--space", "swin-dna"], **elsewhere)
        assert wrong.returncode == 2 and wrong.stderr.startswith(f"{name}: error: unknown space"), wrong.stderr
    assert not {"search.py", "retrain.py", "results"} & {path.name for path in site.iterdir()}
