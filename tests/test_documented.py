"""Every command that README.md and docs/ print is run as it stands, but for model, data folder and epochs."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from nas.data.imagenet100 import CLASSES as IMAGENET100
from nas.networks.key_values import parse_key_values
from search_spaces.registry import get_space
from supernets import t2t_vit  # noqa: F401  registers T2T-ViT with timm
from supernets.supernet import Supernet
from tests.documented import ROOT, Command, all_commands
from tests.forked import run_python
from tests.photographs import photograph

NOT_RUN = {  # what cannot be run that way: as it begins, and why
    "pip install uv && uv run pytest": "is what runs this test",
    "pip install 'vit-nas[export]'": "the project lies in no package registry; the extra is in the tests' environment",
    "torchrun --nproc-per-node 8": "eight GPUs; tests/nas/machine/test_distributed.py runs two processes",
    "torchrun --nnodes 2": "two machines; tests/nas/machine/test_distributed.py runs two agents on one",
    "srun torchrun": "a Slurm cluster",
    "python benchmarks/pruners.py": "takes minutes; tests/test_benchmarks.py runs it small",
    "python benchmarks/methods.py": "takes minutes; tests/test_benchmarks.py runs it small",
    "python benchmarks/latency.py": "takes minutes; tests/test_benchmarks.py runs it small",
    "python -m nas.latency --space": "takes minutes; tests/nas/test_latency.py runs it small",
    "python search.py --space vit-free --model vit_small_patch16_224 --checkpoint my.safetensors"
    " --data-dir /data/flowers --ms": "needs a table; tests/nas/stages/test_latency.py searches with one",
    "python -m nas.plot results/ --x latency": "needs runs with a table; tests/nas/stages/test_latency.py draws them",
    "python benchmarks/sweep.py": "takes minutes; tests/test_benchmarks.py runs it small",
    "python search.py --space swin-dan --dataset imagenet100 --data-dir /data/imagenet --sweep": "a Ray cluster with"
    " GPUs; tests/nas/sweeps/test_sweep.py runs two nodes on one machine",
    "python -m nas.export results/<run> --push-to-hub": "an account on the Hub; tests/nas/test_export.py goes as far"
    " as the network",
}
ONCE = {  # each runs the same code
    "seed=0,1,2": "seed=0", "budget=0.2,0.35,0.5,0.7": "budget=0.35,0.7", "alpha=1,2,4": "alpha=1,4",
    "--trials 20": "--trials 3", "--seeds 0 1 2": "--seeds 0",
}  # fmt: skip
FEWER = {  # run with less than they measure by default, and why
    "benchmarks/digits.py": "--seeds 0",  # as above
    "benchmarks/search_step.py": "--rounds 1",
    "benchmarks/sandwich_step.py": "--rounds 1",
    "benchmarks/accepted.py": "--modules vision_transformer_relpos",  # all take minutes
    "benchmarks/basis.py": "--model vit_tiny_patch16_224 --images 2",  # a ViT-B takes minutes
    "benchmarks/threads.py": "--busy 0 --settings one --epochs 1",
    "benchmarks/importance.py": "--test-images 50 --alphas 2 --seeds 1 2 --calibration-images 64",
    "benchmarks/training_flags.py": "--options float32 bf16 channels-last",  # torch.compile takes ten minutes
}
# named without arguments: their --help is run
NAMED = {"python -m nas.export", "python -m nas.kernel_complexity", "python -m nas.latency", "python -m nas.plot"}
# What benchmarks take as their model. compact_speed's own nets are of full size, and so are all by default.
SMALL_NETS = {
    "search_step": "--nets nano", "sandwich_step": "--nets nano-vit", "training_flags": "--nets nano",
    "compact_speed": "--nets nano", "processes": "--net nano", "importance": "--space vit-an-nano",
}  # fmt: skip
BEFORE = {  # commands of README.md that a page takes for done
    "docs/export.md": ("python search.py --space swin-dan --dataset imagenet100 --data-dir /data/imagenet --budget 0.5",
                       "python retrain.py --arch results/<run>/arch.json --dataset imagenet --data-dir /data/imagenet"),
    "docs/options.md": ("python search.py",),
    "docs/free.md": ("python search.py --space vit-free --model vit_small_patch16_224 --checkpoint my.safetensors"
                     " --data-dir /data/flowers --budget 0.5",),
}  # fmt: skip
AS_TYPED = {"README.md", "docs/sweeps.md"}  # what a user meets first; Ray's settings hold before it is imported
SMALL: dict[str, tuple[str, str]] = {
    "swin": ("swin_tiny_patch4_window7_224", "img_size=32 window_size=4 embed_dim=24 depths=1,1 num_heads=4,8"),
    "vit": ("vit_tiny_patch16_224", "img_size=32 patch_size=8 embed_dim=48 depth=2 num_heads=6"),
    "deit": ("deit_tiny_patch16_224", "img_size=32 patch_size=8 embed_dim=48 depth=2 num_heads=6"),
    "t2t": ("t2t_vit_7", "img_size=32 embed_dim=48 depth=2 num_heads=6 token_dim=8"),
}
FLOWERS = 12  # classes
PAGES = sorted({command.page for command in all_commands()})


def reason(command: Command) -> str | None:
    """Why a command is not run; None where it is."""
    return next((why for start, why in NOT_RUN.items() if command.text.startswith(start)), None)


def first_printed() -> list[Command]:
    """Each command once, on the first page that prints it."""
    pages: dict[str, str] = {}
    return [c for c in all_commands() if pages.setdefault(c.text, c.page) == c.page]


def test_each_exception_is_still_printed_somewhere() -> None:
    texts = [command.text for command in all_commands()]
    assert len(texts) > 60
    assert [start for start in NOT_RUN if not any(text.startswith(start) for text in texts)] == []
    assert sum(reason(command) is not None for command in all_commands()) <= 17


def untrained(text: str) -> bool:
    """Whether a command is a search that trains nothing, and takes no epochs."""
    if "search.py --arch " in text:  # in free widths, whatever the run
        return True
    name = re.search(r"search\.py.* --space (\S+)", text)
    return name is not None and get_space(name[1]).search.get("epochs") == 0 and "--searcher gradient" not in text


def built(family: str, num_classes: int) -> Any:
    model, kwargs = SMALL[family]
    return timm.create_model(model, num_classes=num_classes, **parse_key_values(tuple(kwargs.split())))


class Workshop:
    """A folder that looks like a checkout, with the data, weights and runs that the pages speak of."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "elsewhere"
        self.forks = False  # whether Python is forked where torch is imported already, or starts anew
        for name in ("search.py", "retrain.py", "nas", "search_spaces", "supernets", "benchmarks", "docs"):
            (folder / name).symlink_to(ROOT / name)
        self.variables: list[str] = []
        self.mine()

    def pictures(self, name: str, classes: list[str], train: int, val: int) -> Path:
        root = self.data / name
        for split, count in (("train", train), ("val", val)):
            for label, wnid in enumerate(classes):
                (root / split / wnid).mkdir(parents=True)
                for i in range(count):
                    photograph(label * 99 + i, (40, 36), label).save(root / split / wnid / f"{i}.jpg")
        return root

    def imagenet(self) -> Path:
        """All 1000 classes, the published 100 among them."""
        from timm.data import ImageNetInfo

        root = self.data / "imagenet"
        classes = ImageNetInfo("imagenet-1k").label_names()
        assert set(IMAGENET100) <= set(classes)
        return root if root.exists() else self.pictures("imagenet", classes, train=3, val=1)

    def flowers(self) -> Path:
        root = self.data / "flowers"
        classes = [f"flower{i:02d}" for i in range(FLOWERS)]
        return root if root.exists() else self.pictures("flowers", classes, train=30, val=4)

    def photos(self) -> Path:
        """The flowers in one folder, of no class."""
        root = self.data / "photos"
        if not root.exists():
            root.mkdir(parents=True)
            for path in sorted(self.flowers().glob("train/*/*.jpg")):
                shutil.copy(path, root / f"{path.parent.name}-{path.name}")
        return root

    def weights(self, family: str) -> Path:
        path = self.folder / f"small-{family}.safetensors"
        if not path.exists():
            save_file(built(family, FLOWERS).state_dict(), path)
        return path

    def latest(self, name: str) -> str:
        """The run's folder that was last finished and holds such a file."""
        found = sorted((self.folder / "results").rglob(name), key=lambda p: p.stat().st_mtime)
        return str(found[-1].parent.relative_to(self.folder))

    def run(self, line: str) -> str:
        start, python = time.monotonic(), shlex.quote(sys.executable)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        forks = self.forks and line.startswith(f"{python} ")
        typed = [*self.variables, f"printf '%s\\0' {line.removeprefix(python)}" if forks else line]
        done = subprocess.run(
            ["bash", "-c", "\n".join(typed)], cwd=self.folder, env=environment, capture_output=True, text=True
        )
        code, printed, errors = done.returncode, done.stdout, done.stderr
        if forks and code == 0:  # bash said what the words of the line are
            code, printed, errors = run_python(printed.split("\0")[:-1], self.folder, environment, self.folder / "log")
        print(f"{time.monotonic() - start:4.0f} s  {line}", flush=True)
        assert code == 0, f"{line}\n{printed[-3000:]}\n{errors[-3000:]}"
        assert "Traceback" not in errors
        return printed

    def adapted(self, text: str) -> str:
        """The line with the small model, the data at hand and one epoch."""
        text = text.removeprefix("pip install uv && ").removeprefix("uv run ")
        text = self.placed(text)
        for many, once in ONCE.items():
            text = text.replace(many, once)
        script = text.split()[1]
        if script.startswith("benchmarks/"):
            name = Path(script).stem
            text = re.sub(r" --nets? .*?(?= --|$)", "", text) + f" {SMALL_NETS.get(name, '')}"
        elif script in ("search.py", "retrain.py") and not re.search("--help|--list-spaces|--resume", text):
            text = self.with_model(text)
            if " --epochs" not in text and not untrained(text):
                text += " --epochs 1"
            if "--sweep" in text and "--retrain-trials" in text:
                text += " --sweep retrain.epochs=1"
        elif "nas.validate --model" in text:
            family = text.split("--model ")[1].split("_")[0]
            text = self.of_small_model(text, family, weights=True)
        elif text in NAMED:
            text += " --help"
        if script in FEWER:
            text = f"{text.replace(FEWER[script], '')} {FEWER[script]}"
        if script == "benchmarks/digits.py":
            text += " --search-epochs 1 --retrain-epochs 1"
        text = re.sub(r"(--(?:search-|retrain-)?epochs) [1-9]\d*", r"\1 1", text)
        return text.replace("python ", f"{shlex.quote(sys.executable)} ", 1)

    def placed(self, text: str) -> str:
        """Folders and files that are there, in place of those that the pages speak of."""
        if "…" in text and "--data-dir" not in text and "benchmarks" not in text:
            text = text.replace("…", "--data-dir …")
        imagenet = "--dataset imagenet" in text
        for name in ("…", "/data/imagenet", "/data/flowers", "data"):
            pattern = rf"--data-dir {re.escape(name)}(?= |$)"
            if re.search(pattern, text):
                text = re.sub(pattern, f"--data-dir {self.imagenet() if imagenet else self.flowers()}", text)
        text = re.sub("--data-dir /data/photos(?= |$)", lambda _: f"--data-dir {self.photos()}", text)
        for name, space, classes in (("…", "vit-an-nano", 10), ("large.safetensors", "swin-dan-nano", FLOWERS)):
            if f"--checkpoint {name}" in text:
                text = text.replace(f"--checkpoint {name}", f"--checkpoint {self.nano(space, classes)}")
        if "<run>" in text:
            small = "nas.export" in text or "nas.validate" in text
            name = "compact.safetensors" if small else "supernet.safetensors" if "retrain.py" in text else "arch.json"
            text = text.replace("results/<run>", self.latest(name))
        if "<sweep>" in text:
            text = text.replace("results/<sweep>", self.latest("trials.csv"))
        if "--output DIR" in text:
            text = text.replace("DIR", self.latest("supernet.safetensors"))
        if "--arch small" in text and not (self.folder / "small").exists():
            self.cut()
        if "--arch FRONT" in text and not (self.folder / "FRONT").exists():
            self.front()
        return text

    def with_model(self, text: str) -> str:
        """The small network of the space's family in place of the one named, with weights unless it starts anew."""
        name = re.search(r"--space (\S+)", text)
        if "--arch small" in text:
            return f"{text} --checkpoint {self.weights('deit')}"
        if name is None or "$NET" in text or "--alphas 1 2" in text:  # networks that are small already
            return text
        space = get_space(name[1])
        if space.nano and "--sweep" not in text:
            return text
        text = self.of_small_model(text, space.family, weights="--no-pretrained" not in text and not space.nano)
        if "--gflops 2.5" in text:  # a figure of the model that was named, of 4.6: the same share of this one
            text = text.replace("2.5", str(2.5 / 4.6 * Supernet(built(space.family, FLOWERS)).flops() / 1e9))
        return text

    def of_small_model(self, text: str, family: str, weights: bool) -> str:
        """The small network of a family in place of the one that the line names."""
        model, kwargs = SMALL[family]
        text = re.sub(r" --(model|model-kwargs|checkpoint) .*?(?= --|$)", "", text)
        text += f" --model {model} --model-kwargs {kwargs}"
        return f"{text} --checkpoint {self.weights(family)}" if weights else text

    def mine(self) -> None:
        """The user's own network of docs/example.md and docs/training.md."""
        own = dict(img_size=32, patch_size=4, window_size=4, embed_dim=48, depths=(2, 4), num_heads=(4, 8))
        state = timm.create_model("swin_tiny_patch4_window7_224", num_classes=FLOWERS, **own).state_dict()
        save_file(state, self.folder / "mine.safetensors")
        own = dict(img_size=32, patch_size=2, window_size=4, embed_dim=32, depths=(2, 2, 4), num_heads=(2, 4, 8))
        state = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, **own).state_dict()
        torch.save({"state_dict": state}, self.folder / "mine.pth")

    def nano(self, name: str, num_classes: int) -> Path:
        """Weights of a nano space's network."""
        path, space = self.folder / f"{name}.safetensors", get_space(name)
        save_file(timm.create_model(space.model, num_classes=num_classes, **space.model_kwargs).state_dict(), path)
        return path

    def front(self) -> None:
        """The folder of a search for two budgets."""
        line = "python search.py --space vit-free --data-dir data --searcher random --candidates 2 --front 0.4 0.6"
        self.run(f"{self.adapted(line)} --output FRONT")

    def cut(self) -> None:
        """The folder that the README's library lines leave."""
        from nas.networks.architecture import architecture_of, slices_of
        from nas.networks.compact_file import save_compact
        from supernets.compact import cut

        network = built("deit", FLOWERS)
        network.load_state_dict(load_file(self.weights("deit")))
        supernet, (model, kwargs) = Supernet(network).eval(), SMALL["deit"]
        picks = [{"alpha": 2 - i % 2} for i in range(2)]
        arch = architecture_of(supernet, "deit-dan", model, parse_key_values(tuple(kwargs.split())), picks)
        save_compact(cut(network, slices_of(arch, supernet.shapes)), self.folder / "small", arch)


@pytest.fixture
def workshop(tmp_path: Path) -> Any:
    yield Workshop(tmp_path)
    shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run_in_their_order(page: str, workshop: Workshop) -> None:
    workshop.forks = page not in AS_TYPED
    for text in BEFORE.get(page, ()):
        workshop.run(workshop.adapted(text))
    for command in first_printed():
        if command.page != page or reason(command) is not None:
            continue
        if re.match(r"[A-Z]+=", command.text):
            workshop.variables.append(command.text.replace("--data-dir data", f"--data-dir {workshop.flowers()}"))
            continue
        workshop.run(workshop.adapted(command.text))
