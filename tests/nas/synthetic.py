"""Synthetic run folders, their tables, and what a figure drawn of them shows."""

import json

import numpy as np
import pandas as pd
import yaml

ALPHAS, FRACTIONS = (1, 2, 4, 8), (1.0, 0.75, 0.5, 0.25)
BLOCKS, EPOCHS, BACKBONE = 12, 30, 0.0112  # GFLOPs
PUBLISHED = pd.DataFrame(
    {
        "network": [
            "Swin-B",
            "Swin-B-DAN",
            "T2T-ViT-14",
            "AutoFormer-small",
            "DeiT-Small",
            "NVP-S",
            "LightViT-B",
        ],
        "params_m": [88, 38.66, 21.5, 22.9, None, 21, 35.2],
        "gflops": [15.4, 6.96, 4.8, 5.1, 4.6, 4.2, 3.9],
        "top1": [85.2, 85.27, 81.5, 81.7, 79.8, 82.2, 82.1],
    }
)


def choice_rows(seed=0, choices=None):
    """choices.csv as a search writes it: the first two blocks allow no 8; probabilities sharpen with time."""
    rng = np.random.default_rng(seed)
    rows = []
    for name, candidates in (choices or {"alpha": ALPHAS}).items():
        for block in range(BLOCKS):
            offered = candidates[:3] if block < 2 else candidates
            eta = rng.normal(size=len(offered))
            for epoch in range(1, EPOCHS + 1):
                p = np.exp(5 * epoch / EPOCHS * eta)
                for candidate, probability in zip(offered, p / p.sum(), strict=True):
                    rows.append((epoch, block, name, candidate, probability))
    return pd.DataFrame(rows, columns=["epoch", "block", "choice", "candidate", "probability"])


def log_rows(budget=0.5, penalty=0.3):
    t = np.arange(1, EPOCHS + 1) / EPOCHS
    lam = np.minimum(4 * t * t, 1.0)
    ce, kl = 0.4 + 1.8 * np.exp(-3 * t), lam * 0.3 * np.exp(-t)
    return pd.DataFrame(
        {
            "epoch": np.arange(1, EPOCHS + 1),
            "t": t,
            "loss": ce + kl + lam * penalty,
            "loss_ce": ce,
            "loss_kl": kl,
            "loss_penalty": lam * penalty,
            "held_out_large_top1": 98 - 80 * np.exp(-6 * t),
            "held_out_large_top5": 100 - 60 * np.exp(-8 * t),
            "held_out_subnet_top1": 96 - 85 * np.exp(-5 * t),
            "held_out_subnet_top5": 99 - 70 * np.exp(-7 * t),
            "expected_gflops": BACKBONE * (budget + 0.2 * np.exp(-4 * t)),
            "selected_gflops": BACKBONE * np.where(t < 0.4, 0.6, budget - 0.01),
            "tau": 5 * (0.1 / 5) ** t,
            "lam": lam,
            "lr": 1e-3 * (1 + np.cos(np.pi * t)) + 1e-6,
            "arch_lr": 0.02,
            "multiplier": 2 * t,
        }
    )


def make_run(folder, *, stage="search", space="swin-dan-nano", dataset="digits", budget=0.5, seed=42, top1=95.0):
    """A run's folder with every file that search.py or retrain.py leaves."""
    folder.mkdir(parents=True)
    options = {"space": space, "dataset": dataset, "seed": seed, "budget": budget, "output": str(folder)}
    (folder / "config.yaml").write_text(yaml.safe_dump(options))
    choices = choice_rows(seed)
    last = choices[choices.epoch == EPOCHS]
    picks = last.loc[last.groupby("block").probability.idxmax()].sort_values("block").candidate
    log_rows(budget).to_csv(folder / "log.csv", index=False)
    arch = {"schema": 1, "space": space, "method": "dan", "blocks": [{"alpha": int(a)} for a in picks]}
    arch |= {"backbone_flops": int(BACKBONE * 1e9), "search": {"budget": budget, "seed": seed}}
    (folder / "arch.json").write_text(json.dumps(arch))
    large = {"params": 600_000, "gflops": BACKBONE, "top1": 98.0, "top5": 100.0, "images_per_s_32": 2000.0}
    small = {
        "params": int(6e5 * budget),
        "gflops": BACKBONE * budget,
        "top1": top1,
        "images_per_s_32": 3500.0,
    }
    facts = {
        "stage": stage,
        "space": space,
        "dataset": dataset,
        "seed": seed,
        "budget": budget,
        "large": large,
        "split": "validation split",
    }
    if stage == "search":
        choices.to_csv(folder / "choices.csv", index=False)
        facts |= {"subnet": small | {"top1": top1 - 1, "held_out_top1": top1 + 1}}
    else:
        facts |= {"subnet": small, "compact": small}
    (folder / "summary.json").write_text(json.dumps(facts))
    return folder


def texts(axes):
    return [t.get_text() for t in axes.texts]


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def panel(figure, label):
    return next(axes for axes in figure.axes if axes.get_label() == label)


def luminance(color):
    from matplotlib.colors import to_rgb

    return float(np.dot(to_rgb(color), (0.2126, 0.7152, 0.0722)))
