"""What becomes of two losses over shared weights from a trained start, step by step (section 2.14).

    python benchmarks/adjoined.py --output results/adjoined --checkpoint FILE --data-dir DIR --epochs 6 --alpha 2 \
        --variants thesis constant warm constant:small_ce=1 constant:adjoined_teacher=frozen distill

A variant is a schedule of lambda, with options of stage 2 after further colons; or distill, the small network alone.
Each is a retrain, from --arch or of a nano space at --alpha, on the digits or a folder of images. Every --every steps,
on the step's own batch: both networks' cross-entropy, KL, and on the weights that the small network reads the angle
between the gradient of the large network's cross-entropy and that of the KL term as it trains (KL), of the KL term
through the small network alone (q), and of the small network's own cross-entropy. Written to gradients.csv of each run;
adjoined.png shows all, and the accuracy of both by epoch. What is finished in --output is not run again.
"""

import argparse
import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd
import torch
import yaml
from torch import Tensor

import nas.objectives.table as table
from nas.config import RetrainConfig
from nas.machine.files import write_csv
from nas.objectives.adjoined import Adjoined
from nas.pictures.figures import PALETTE, new_figure, tidy
from nas.pictures.run import save
from nas.stages.retrain import run_retrain
from nas.training.losses import cross_entropy, kl_divergence
from nas.training.objective import Step
from search_spaces.errors import UserError

ROWS = "gradients.csv"
ANGLES = {"angle_kl": "KL, as it trains", "angle_q": "KL, through q alone", "angle_small": "CE of the small"}


class Watched(Adjoined):
    """Adjoined training that writes down what its losses want of the weights; it trains as if nobody looked."""

    every: int
    path: Path
    rows: list[dict[str, Any]] | None = None

    def forward(self, images: Tensor, target: Tensor, step: Step) -> dict[str, Tensor]:
        if self.training and step.number >= 0 and step.number % self.every == 0:
            if self.rows is None:
                self.rows = [row for row in rows_of(self.path) if row["step"] < step.number]
            with torch.random.fork_rng():
                self.rows.append(self.measured(images, target, step))
            write_csv(self.path, self.rows)
        return super().forward(images, target, step)

    def measured(self, images: Tensor, target: Tensor, step: Step) -> dict[str, Any]:
        """Losses, and angles in degrees between their gradients on the weights that the small network reads."""
        p, q = self.supernet(images, self.members.widest)
        expert = self.expert(images, p)
        losses = {
            "ce": cross_entropy(p, target, self.loss.smoothing),
            "kl": kl_divergence(expert, q, self.loss.detach_teacher),
            "q": kl_divergence(expert, q, detach_teacher=True),
            "small": cross_entropy(q, target, self.loss.smoothing),
        }
        weights = [w for w in self.supernet.backbone.parameters() if w.requires_grad]
        gradients = {name: flat(loss, weights) for name, loss in losses.items()}
        shared = (gradients["q"] != 0) | (gradients["small"] != 0)
        on_shared = {name: gradient[shared] for name, gradient in gradients.items()}
        row: dict[str, Any] = {"step": step.number, "t": step.t, "lam": self.loss.lam(step.t)}
        values = {name: float(loss.detach()) for name, loss in losses.items()}
        row |= {"ce": values["ce"], "kl": values["kl"], "ce_small": values["small"]}
        row |= {f"angle_{name}": angle(on_shared["ce"], on_shared[name]) for name in ("kl", "q", "small")}
        row |= {f"norm_{name}": float(on_shared[name].norm()) for name in ("ce", "kl")}
        return row | {"shared": float(shared.float().mean())}


def flat(loss: Tensor, weights: list[Any]) -> Tensor:
    """The gradient as one vector; 0 where the loss does not depend on a weight."""
    found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(w).flatten() if g is None else g.flatten() for w, g in zip(weights, found, strict=True)]
    )


def angle(a: Tensor, b: Tensor) -> float:
    """Degrees; not a number where one of them is nothing."""
    return float(torch.rad2deg(torch.arccos((a @ b / (a.norm() * b.norm())).clamp(-1, 1))))


def rows_of(path: Path) -> list[dict[str, Any]]:
    """A table of numbers, empty where there is none."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = [{name: float(value or "nan") for name, value in row.items()} for row in csv.DictReader(file)]
    return [row | {"step": int(row["step"])} if "step" in row else row for row in rows]


def train(args: argparse.Namespace, variant: str) -> None:
    """One variant, unless it is there."""
    folder = args.output / variant.replace(":", "-").replace("=", "-")
    if (folder / "summary.json").is_file():
        return
    first, *own = variant.split(":")
    options: dict[str, Any] = (
        {"train": "distill"} if first == "distill" else {"train": "adjoined", "kl_schedule": first}
    )
    options |= {name: yaml.safe_load(value) for name, value in (pair.split("=") for pair in own)}
    for name in (
        "checkpoint",
        "epochs",
        "lr",
        "batch_size",
        "layer_decay",
        "augment",
        "seed",
        "threads",
        "workers",
        "model",
    ):
        options.setdefault(name, getattr(args, name))
    options |= {"dataset": "folder", "data_dir": args.data_dir} if args.data_dir else {}
    what = {"arch": args.arch} if args.arch else {"space": args.space, "alpha": args.alpha}
    what |= {} if args.arch else {"model_kwargs": tuple(args.model_kwargs)}

    def watched(options: Any, supernet: Any, subnet: Any, teacher: Any) -> Watched:
        objective = Watched.of(options, supernet, subnet, teacher)
        assert isinstance(objective, Watched)
        objective.every, objective.path = args.every, folder / ROWS
        return objective

    kinds = dict(table.KINDS)
    table.KINDS["adjoined"] = replace(kinds["adjoined"], make=watched)
    try:
        run_retrain(RetrainConfig(output=folder, resume=(folder / "config.yaml").is_file(), **what | options))
    finally:
        table.KINDS.update(kinds)


def draw(args: argparse.Namespace, variants: dict[str, Path]) -> Path:
    """Angles, KL and both cross-entropies over the steps, both accuracies over the epochs."""
    figure = new_figure(11.0, 7.6, "Two losses over shared weights")
    angles, kl, losses, accuracy = figure.subplots(2, 2).flat
    for i, (variant, folder) in enumerate(variants.items()):
        color = PALETTE[i % len(PALETTE)]
        rows = pd.DataFrame(rows_of(folder / ROWS))
        if len(rows):
            for name, stroke in zip(ANGLES, ("-", "--", ":"), strict=True):
                angles.plot(rows["step"], rows[name], stroke, color=color, lw=1.2)
            kl.plot(rows["step"], rows["kl"], color=color, lw=1.4, label=variant)
            losses.plot(rows["step"], rows["ce"], color=color, lw=1.4)
            losses.plot(rows["step"], rows["ce_small"], "--", color=color, lw=1.4)
        log = pd.read_csv(folder / "log.csv")
        for who, stroke in (("large", "-"), ("subnet", "--")):
            column = f"held_out_{who}_top1"
            if column in log:
                accuracy.plot(log["epoch"], log[column], stroke, marker="o", ms=3, color=color, lw=1.4)
        accuracy.plot([], [], color=color, label=variant)
    angles.axhline(90, color="#555555", lw=0.8)
    for stroke, words in zip(("-", "--", ":"), ANGLES.values(), strict=True):
        angles.plot([], [], stroke, color="black", label=words)
    for stroke, words in (("-", "large"), ("--", "small")):
        losses.plot([], [], stroke, color="black", label=words)
        accuracy.plot([], [], stroke, color="black", label=words)
    tidy(angles, "step", "angle to the gradient of CE, large (°)")
    tidy(kl, "step", "KL (nats)")
    tidy(losses, "step", "cross-entropy")
    tidy(accuracy, "epoch", "top-1 on held-out images (%)")
    for axes in (angles, kl, losses, accuracy):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, frameon=False)
    (path,) = save(figure, args.output / "adjoined.png")
    return path


def option_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", default=["thesis", "constant", "constant:small_ce=1", "distill"])
    parser.add_argument("--arch", type=Path, help="of a search; otherwise --space at --alpha")
    parser.add_argument("--space", default="vit-an-nano")
    parser.add_argument("--alpha", type=int, default=2)
    parser.add_argument("--model")
    parser.add_argument("--model-kwargs", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--checkpoint", type=Path, help="the trained network")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", type=float, help="by default found for each variant")
    parser.add_argument("--layer-decay", type=float)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--augment", choices=["none", "light", "strong"])
    parser.add_argument("--every", type=int, default=20, help="steps between measurements")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    return parser


def main() -> None:
    """Train, draw, print."""
    args = option_parser().parse_args()
    for variant in args.variants:
        train(args, variant)
    folders = {v: args.output / v.replace(":", "-").replace("=", "-") for v in args.variants}
    print(
        f"{'variant':40} {'original':>9} {'large':>9} {'small':>9} {'angle, KL':>10} {'angle, q':>9}   (angles: mean)"
    )
    for variant, folder in folders.items():
        summary, rows = json.loads((folder / "summary.json").read_text()), pd.DataFrame(rows_of(folder / ROWS))
        top1 = [summary.get(name, {}).get("top1", float("nan")) for name in ("original", "large", "compact")]
        mean = [rows[name].mean() if len(rows) else float("nan") for name in ("angle_kl", "angle_q")]
        print(f"{variant:40} " + " ".join(f"{v:9.2f}" for v in top1) + f" {mean[0]:10.1f} {mean[1]:9.1f}")
    print(f"picture: {draw(args, folders)}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
