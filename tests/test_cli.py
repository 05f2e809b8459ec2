"""What a user can get wrong: exit code 2, one line that says what to do, no traceback, nothing written."""

import errno
import json
import math
import shlex
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import tyro

from nas import commands
from nas.cli import main, option_words
from nas.config import RetrainConfig, SearchConfig
from search_spaces.errors import UserError

ROOT = Path(__file__).parents[1]
VIT = ["--space", "vit-dan-nano"]
AN = ["--space", "vit-an-nano", "--alpha", "2"]


class Shell:
    """Runs a command line in this process, in an empty folder of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys

    def __call__(self, script: str, *arguments: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)."""
        command = {"search.py": commands.search, "retrain.py": commands.retrain}[script]
        self.monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        self.capsys.readouterr()
        code: Any = 0
        try:
            command()
        except SystemExit as error:
            code = error.code
        return code or 0, *self.capsys.readouterr()

    def files(self) -> dict[str, bytes]:
        return {str(p.relative_to(self.folder)): p.read_bytes() for p in self.folder.rglob("*") if p.is_file()}

    def refuses(self, script: str, *arguments: str, says: tuple[str, ...], boxed: bool = False) -> None:
        """Exit code 2, every word of `says` on stderr, which is one line unless it is tyro's box."""
        before, folders = self.files(), set(self.folder.rglob("*"))
        code, out, err = self(script, *arguments)
        text = " ".join(err.replace("│", " ").split())
        assert code == 2, (code, out, err)
        assert "Traceback" not in err + out
        for word in says:
            assert word in text, f"{word!r} not in {text!r}"
        if not boxed:
            assert err.startswith(f"{script}: error: ")
            assert len(err.splitlines()) == 1
        assert self.files() == before
        assert set(self.folder.rglob("*")) == folders


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return Shell(tmp_path, monkeypatch, capsys)


SEARCH_MISTAKES = {
    "a space misspelt": (["--space", "swin-dna-nano"], ("unknown space 'swin-dna-nano'", "swin-dan-nano")),
    "a space unlike any": (["--space", "xyz"], ("unknown space 'xyz'", "vit-dan", "--list-spaces")),
    "a model misspelt": ([*VIT, "--model", "vit_tiny_patch16_2244"], ("unknown model", "vit_tiny_patch16_224")),
    "a model of another family": ([*VIT, "--model", "swin_tiny_patch4_window7_224"], ("SwinTransformer", "vit-*")),
    "a constructor argument": ([*VIT, "--model-kwargs", "embed_dims=3"], ("timm cannot build", "embed_dims")),
    "no heads": ([*VIT, "--model-kwargs", "num_heads=0"], ("timm cannot build", "'num_heads': 0")),
    "a width below nothing": ([*VIT, "--model-kwargs", "embed_dim=-8"], ("timm cannot build", "'embed_dim': -8")),
    "no blocks": ([*VIT, "--model-kwargs", "depth=0"], ("a network without blocks", "depth of 1 or more")),
    "no blocks of T2T-ViT": (["--space", "t2t-dan-nano", "--model-kwargs", "depth=0"], ("a network without blocks",)),
    "a stage without blocks": (
        ["--space", "swin-dan-nano", "--model-kwargs", "depths=0,2"],
        ("a stage without", "1 or"),
    ),
    "no constructor argument": ([*VIT, "--model-kwargs", "img_size"], ("'img_size'", "KEY=VALUE")),
    "alpha of no block": (
        ["--space", "vit-an-nano", "--alpha", "5"],
        ("alpha 5 does not divide blocks 0, 1, 2, 3, 4, 5", "heads: 6", "allowed: 1, 2, 3, 6"),
    ),
    "alpha of some blocks": (
        ["--space", "swin-an-nano", "--alpha", "8"],
        ("alpha 8 does not divide blocks 0, 1 (heads: 4)", "allowed: 1, 2, 4"),
    ),
    "alpha for a search": ([*VIT, "--alpha", "2"], ("--alphas",)),
    "AN without alpha": (["--space", "vit-an-nano", "--budget", "0"], ("--alpha or --budget", "1, 2, 3, 6")),
    "alpha of nothing": ([*VIT, "--alphas", "0", "1"], ("alpha 0", "at least 1")),
    "only one candidate": ([*VIT, "--alphas", "1", "5"], ("nothing to search", "--alphas", "6 heads")),
    "no candidate": ([*VIT, "--alphas", "5", "7"], ("block 0", "alpha 5 left out (6 heads allow 1, 2, 3, 6)")),
    "a budget out of reach": ([*VIT, "--budget", "0.01"], ("budget 0.01", "reaches 0.", "to 1.0000", "at least 0.")),
    "a budget out of reach for AN": (["--space", "vit-an-nano", "--budget", "0.001"], ("no alpha", "1: 1.0000, 2: 0.")),
    "a budget above all": ([*VIT, "--budget", "1.5"], ("--budget 1.5", "0 < B <= 1")),
    "a budget twice": ([*VIT, "--budget", "0.5", "--gflops", "1"], ("--budget and --gflops",)),
    "gflops below nothing": ([*VIT, "--gflops", "-1"], ("--gflops -1", "more than 0")),
    "a seed that no generator takes": ([*VIT, "--seed", "99999999999999999999"], ("--seed 9999", "0 to 4294967295")),
    "a seed below zero": ([*VIT, "--seed", "-1"], ("--seed -1", "0 to 4294967295")),
    "gflops above the backbone's": ([*VIT, "--gflops", "4"], ("--gflops 4", "the backbone has 0.", "give less")),
    "gflops that are no number": ([*VIT, "--gflops", "nan"], ("--gflops nan", "a finite number")),
    "an output of a name too long": ([*VIT, "--output", "x" * 300], ("--output xxx", "File name too long")),
    "a resume of a name too long": ([*VIT, "--resume", "--output", "x" * 300], ("File name too long",)),
    "an output where nothing can be": ([*VIT, "--output", "/dev/null/run"], ("--output /dev/null/run", "Not a dir")),
    "epochs below nothing": ([*VIT, "--epochs", "-3"], ("--epochs -3", "0 or more")),
    "no epochs": ([*VIT, "--epochs", "0"], ("--epochs 0", "at least 1")),
    "a batch of nothing": ([*VIT, "--batch-size", "0"], ("--batch-size 0", "at least 1")),
    "a rate below nothing": ([*VIT, "--lr", "-0.1"], ("--lr -0.1", "0 or more")),
    "all of it held out": ([*VIT, "--val-fraction", "1"], ("--val-fraction 1", "share")),
    "logits on what is not held out": ([*VIT, "--arch-data", "val", "--val-fraction", "0"], ("--val-fraction",)),
    "no threads": ([*VIT, "--threads", "0"], ("--threads 0", "at least 1")),
    "a device of no kind": ([*VIT, "--device", "abacus"], ("--device abacus", "cpu")),
    "a dataset that is not there": (
        [*VIT, "--dataset", "imagenet", "--data-dir", "nowhere"],
        ("nowhere does not exist", "expected nowhere/train"),
    ),
    "a resume of nothing": ([*VIT, "--resume", "--output", "run"], ("run holds no run to resume",)),
    "a resume of nowhere": ([*VIT, "--resume"], ("--output DIR",)),
    "an option without a value": ([*VIT, "--config"], ("--config needs a value",)),
    "a config that is not there": (["--config", "none.yaml"], ("none.yaml: no such file",)),
}


@pytest.mark.parametrize("mistake", SEARCH_MISTAKES)
def test_a_search_refuses(mistake: str, shell: Shell) -> None:
    arguments, says = SEARCH_MISTAKES[mistake]
    shell.refuses("search.py", *arguments, says=says)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--spacce", "vit-dan-nano"], "--spacce"), (["--epochs", "many"], "many"), (["--width", "wide"], "wide")],
)
@pytest.mark.parametrize("script", ["search.py", "retrain.py"])
def test_unknown_options_and_wrong_types_are_refused(
    script: str, arguments: list[str], says: str, shell: Shell
) -> None:
    shell.refuses(script, *arguments, says=(says,), boxed=True)


@pytest.mark.parametrize(
    ("text", "says", "boxed"),
    [
        ("epochss: 3\n", "epochss", True),
        ("epochs: many\n", "many", True),
        ("- epochs\n", "expected a mapping", False),
        ("epochs: [1\n", "not readable as YAML", False),
        ("epochs: -1\n", "--epochs -1", False),
        ("space: vit-dan-nan0\n", "did you mean vit-dan-nano", False),
    ],
)
def test_a_config_file_is_held_to_the_same(text: str, says: str, boxed: bool, shell: Shell) -> None:
    (shell.folder / "options.yaml").write_text(text)
    shell.refuses("search.py", "--config", "options.yaml", says=(says,), boxed=boxed)


def test_the_command_line_goes_over_the_config_file(shell: Shell) -> None:
    (shell.folder / "options.yaml").write_text("space: vit-an-nano\nalpha: 5\nseed: 7\nmodel_kwargs: {depth: 2}\n")
    code, _, err = shell("search.py", "--config", "options.yaml", "--alpha", "3", "--output", "run")
    assert code == 0, err
    arch = json.loads((shell.folder / "run/arch.json").read_text())
    assert arch["blocks"] == [{"alpha": 3}] * 2
    assert arch["search"]["seed"] == 7


@pytest.fixture
def architecture(shell: Shell) -> dict[str, Any]:
    """The arch.json of an AN search, which trains nothing, in found/."""
    code, out, err = shell("search.py", *AN, "--output", "found")
    assert code == 0, err
    assert "python retrain.py --arch found/arch.json" in out
    data: dict[str, Any] = json.loads((shell.folder / "found/arch.json").read_text())
    return data


def test_a_folder_that_holds_a_run_is_left_alone(architecture: dict[str, Any], shell: Shell) -> None:
    again = ("search.py", *AN, "--output", "found")
    shell.refuses(*again, says=("found already holds a run", "--resume", "--output"))
    shell.refuses(*again, "--resume", "--seed", "7", says=("seed: was 42, now 7", "leave them as they were"))
    code, _, err = shell("search.py", "--output", "found", "--resume")
    assert code == 0, err
    assert json.loads((shell.folder / "found/arch.json").read_text()) == architecture
    (shell.folder / "file").write_text("")
    shell.refuses("search.py", *AN, "--output", "file", says=("--output file is a file",))


def write(folder: Path, data: Any) -> str:
    (folder / "arch.json").write_text(data if isinstance(data, str) else json.dumps(data))
    return "arch.json"


BROKEN: dict[str, tuple[Any, tuple[str, ...]]] = {  # what is done to the architecture, what is said about it
    "newer": ({"schema": 99, "version": "9.9"}, ("'schema' is 99", "reads up to 2", "9.9")),
    "another width": ({"width": "narrow"}, ("'width' is 'narrow'", "stream or inner")),
    "text for a number": ({"flops": "many"}, ("'flops' is \"many\"", "whole number")),
    "too few blocks": ({"blocks": [{"alpha": 2}]}, ("1 blocks in the architecture, 6 in the backbone",)),
    "a factor of no block": ({"blocks": [{"alpha": 5}] * 6}, ("block 0", "alpha 5", "allowed: alpha: 1, 2, 3, 6")),
    "no factor": ({"blocks": [{}] * 6}, ("'blocks[0].alpha' is missing",)),
    "a stage too wide": ({"stage_widths": [1000]}, ("'stage_widths[0]' is 1000", "expected 36 to 72")),
    "a space of no name": ({"space": "vit-xyz"}, ("unknown space 'vit-xyz'",)),
    "a method of no name": ({"method": "xyz"}, ("unknown method 'xyz'",)),
    "a model of no name": ({"model": "vit_xyz"}, ("unknown model 'vit_xyz'",)),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_retrain_refuses_an_architecture(broken: str, architecture: dict[str, Any], shell: Shell) -> None:
    changes, says = BROKEN[broken]
    shell.refuses("retrain.py", "--arch", write(shell.folder, architecture | changes), says=says)


def test_a_retrain_refuses_what_is_no_architecture(architecture: dict[str, Any], shell: Shell) -> None:
    shell.refuses("retrain.py", "--arch", "gone/arch.json", says=("gone/arch.json: no such file", "search.py"))
    whole = (shell.folder / "found/arch.json").read_text()
    truncated, foreign = write(shell.folder, whole[: len(whole) // 2]), ("retrain.py", "--arch", "arch.json")
    shell.refuses("retrain.py", "--arch", truncated, says=("not readable as JSON", "truncated"))
    write(shell.folder, {"weights": [1, 2]})
    shell.refuses(*foreign, says=("no field 'schema'", "not an arch.json"))
    write(shell.folder, "[1, 2]")
    shell.refuses(*foreign, says=("no field 'schema'",))
    (shell.folder / "arch.json").write_bytes(b"\x80\x81\xff")
    shell.refuses(*foreign, says=("not readable as JSON",))


RETRAIN_MISTAKES = {
    "neither arch nor space": ([], ("--arch", "--space")),
    "a space that is searched": (["--space", "vit-dan-nano"], ("python search.py --space vit-dan-nano",)),
    "AN without alpha": (["--space", "vit-an-nano"], ("--alpha",)),
    "alpha of no block": (["--space", "vit-an-nano", "--alpha", "4"], ("alpha 4", "allowed: 1, 2, 3, 6")),
    "an average beyond one": ([*AN, "--init", "supernet"], ("--init supernet", "--init base")),
    "a checkpoint that is not there": ([*AN, "--checkpoint", "none.pth"], ("none.pth: no such file",)),
}


@pytest.mark.parametrize("mistake", RETRAIN_MISTAKES)
def test_a_retrain_refuses(mistake: str, shell: Shell) -> None:
    arguments, says = RETRAIN_MISTAKES[mistake]
    shell.refuses("retrain.py", *arguments, says=says)


def test_arch_and_space_exclude_each_other(architecture: dict[str, Any], shell: Shell) -> None:
    arch = ("retrain.py", "--arch", "found/arch.json")
    shell.refuses(*arch, "--space", "vit-an-nano", says=("--arch", "--space"))
    shell.refuses(*arch, "--alpha", "2", says=("--alpha goes with --space",))
    shell.refuses(*arch, "--model", "vit_tiny_patch16_224", says=("--model goes with --space",))


def test_an_interrupt_says_how_to_go_on(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(config: SearchConfig) -> None:
        raise KeyboardInterrupt

    import nas.stages.search

    monkeypatch.setattr(nas.stages.search, "run_search", interrupted)
    code, _, err = shell("search.py")
    assert code == 130
    assert "--output DIR --resume" in err


def test_help_and_parsing_do_not_wait_for_torch() -> None:
    """In a process of its own: the help is printed, and nothing heavy was imported for it."""
    script = (
        "import runpy, sys\n"
        "sys.argv = ['search.py', '--help']\n"
        "try:\n    runpy.run_path('search.py', run_name='__main__')\n"
        "except SystemExit as error:\n    assert not error.code\n"
        "print([m for m in ('torch', 'timm', 'nni', 'ray', 'matplotlib', 'scipy', 'sklearn') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    *help_text, heavy = done.stdout.splitlines()
    assert heavy == "[]"
    assert all(option in "\n".join(help_text) for option in ("--space", "--budget", "--data-dir", "--resume"))


@pytest.mark.parametrize(("script", "kind"), [("search.py", SearchConfig), ("retrain.py", RetrainConfig)])
def test_the_help_breaks_no_line_that_is_not_full(
    script: str, kind: type, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tyro would begin a new one with the second line of a docstring."""
    monkeypatch.setenv("COLUMNS", "2000")
    code, out, _ = shell(script, "--help")
    hidden = {field.name for field in fields(kind) if tyro.conf.Suppress in get_args(field.type)}
    assert code == 0 and out.count("(default: ") > 100
    for name, words in option_words(kind).items():
        assert name in hidden or any(words in line for line in out.splitlines()), name


def test_list_spaces_shows_every_space(shell: Shell) -> None:
    from search_spaces.registry import SPACES

    code, out, _ = shell("search.py", "--list-spaces")
    assert code == 0
    assert all(name in out for name in SPACES)
    assert shell.files() == {}


def test_the_next_command_is_quoted_for_the_shell(shell: Shell) -> None:
    arguments = ["--space", "vit-an-nano", "--budget", "0.3", "--output", "what's found; here"]
    code, out, err = shell("search.py", *arguments)
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if line.startswith("next: ")]
    words = shlex.split(line.removeprefix("next: "))
    assert words == ["python", "retrain.py", "--arch", "what's found; here/arch.json"]


@pytest.mark.parametrize("name", ["log.csv", "arch.json", "supernet.safetensors"])
@pytest.mark.parametrize("script", ["search.py", "retrain.py"])
def test_files_of_others_are_left_alone(script: str, name: str, shell: Shell) -> None:
    (shell.folder / "mine").mkdir()
    (shell.folder / "mine" / name).write_text("my notes\n")
    arguments = VIT if script == "search.py" else AN
    shell.refuses(script, *arguments, "--output", "mine", says=(f"mine holds {name}", "a folder of its own"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG])
def test_what_the_disk_refuses_is_one_line(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["search.py"])

    def run(_: SearchConfig) -> None:
        raise OSError(number, "says the disk", "a/place")

    with pytest.raises(SystemExit) as end:
        main(SearchConfig, run)
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "search.py: error: a/place: says the disk; give another place, or make room there\n"
    )


@pytest.mark.slow
def test_a_run_that_may_write_no_more_ends_in_one_line(tmp_path: Path) -> None:
    """Files of at most 100 kB: the first checkpoint is larger."""
    command = [
        sys.executable,
        ROOT / "search.py",
        *VIT,
        "--epochs",
        "1",
        "--device",
        "cpu",
        "--output",
        tmp_path / "run",
    ]
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "-", *map(str, command)]
    ended = subprocess.run(limited, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr and "cannot write" in ended.stderr.splitlines()[-1]
    assert not [p for p in (tmp_path / "run").iterdir() if p.name.startswith(".") or p.suffix == ".pt"]


@pytest.mark.parametrize("kind", [SearchConfig, RetrainConfig])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_among_the_options_may_be_none(kind: Any, value: float) -> None:
    """Whatever option it is of: alone, or one of several."""
    numbers = [field for field in fields(kind) if "float" in str(field.type)]
    assert len(numbers) > 30
    for field in numbers:
        given = (1.0, value) if "tuple" in str(field.type) else value
        with pytest.raises(UserError, match=f"--{field.name.replace('_', '-')} .*; expected"):
            replace(kind(), **{field.name: given}).check()
