"""What a sweep runs: every point of its grids, every draw of its ranges, as the options of single runs. No torch."""

import itertools
import re
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, fields, replace
from io import StringIO
from pathlib import Path
from typing import Any

import tyro

from nas.config import Common, RetrainConfig, SearchConfig, with_defaults
from nas.machine.launch import launched
from nas.methods.recipe import with_recipe
from nas.sweeps.options import SweepConfig
from search_spaces.errors import UserError
from search_spaces.registry import AUTO, get_space, space_of

RETRAIN = "retrain."
OWN = {f.name for f in fields(SweepConfig)} - {f.name for f in fields(SearchConfig)}
FIXED = ("output", "resume", "list_spaces", "verbose", "processes", "ray_address", *OWN)  # not a matter of one trial
FIXED_IN_RETRAIN = ("arch", "space", "alpha", "width", "model", "model_kwargs", *FIXED)  # the search decides them
# What stage 2 takes from stage 1's options: the data, the place, the seed. Training is the space's own, or retrain.X.
SHARED = (
    "dataset", "data_dir", "train_split", "val_split", "num_classes", "labels", "val_fraction", "class_map", "download",
    "checkpoint", "pretrained", "interpolation", "crop_pct", "mean", "std", "amp", "amp_dtype", "channels_last",
    "compile", "device", "workers", "threads", "seed", "keep", "tensorboard", "recipe",
    "literature",
)  # fmt: skip
PATHS = ("arch", "data_dir", "checkpoint", "teacher_checkpoint", "class_map", "literature")
RANGES = {
    "uniform": 2, "quniform": 3, "loguniform": 2, "qloguniform": 3, "randint": 2, "qrandint": 3, "lograndint": 2,
}  # fmt: skip  # Ray's samplers and the numbers they take; choice takes any


@dataclass(frozen=True)
class Trial:
    """One search, and where asked for its retraining. values: the swept options, as {option: value}."""

    name: str
    values: Mapping[str, Any]
    search: SearchConfig
    retrain: RetrainConfig | None

    def resolved(self) -> SearchConfig:
        """The options of its search, with the space's own for what was not given."""
        search = self.search
        if search.space is not None and search.space.startswith(AUTO) and search.arch is None:
            from nas.networks.opening import settled_space

            search = replace(search, space=settled_space(search.space, search))
        space = get_space(space_of(search.space, search.arch))
        return with_defaults(with_recipe(search, space, "search"), space, "search", trained=search.arch is not None)

    def words(self) -> str:
        """budget 0.2, seed 1"""
        return ", ".join(f"{option} {short(value)}" for option, value in self.values.items())


def short(value: Any) -> str:
    """A value as a table shows it."""
    if isinstance(value, tuple):
        return " ".join(map(short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def single_search(config: SweepConfig) -> SearchConfig:
    """The options of one search. UserError where options of a sweep were given without one."""
    for name in sorted(OWN):
        if name != "sweep" and getattr(config, name) != getattr(SweepConfig, name):
            raise UserError(f"--{name.replace('_', '-')} goes with --sweep, e.g. --sweep budget=0.2,0.35,0.5")
    return SearchConfig(**{f.name: getattr(config, f.name) for f in fields(SearchConfig)})


def make_trials(config: SweepConfig) -> list[Trial]:
    """Every trial, the last grid running fastest, the draws of a grid point together; the same every time."""
    grids: dict[str, Sequence[Any]] = {}
    ranges: dict[str, str] = {}
    for spec in config.sweep:
        option, text = split_spec(spec, config.retrain_trials)
        if option in grids or option in ranges:
            raise UserError(f"--sweep {option} is given twice; name all of its values in one")
        if re.fullmatch(r"[a-z]+\(.*\)", text):
            ranges[option] = text
        else:
            grids[option] = grid_values(option, text)
    if config.trials is not None and config.trials < 1:
        raise UserError(f"--trials {config.trials}; expected at least 1")
    if ranges and config.trials is None:
        raise UserError(f"--sweep {next(iter(ranges))}={next(iter(ranges.values()))} is a range; say --trials N")
    if config.trials is not None and not ranges:
        raise UserError("--trials counts the draws of a range, and no option has one; leave it out")
    check_resources(config)
    points = [dict(zip(grids, values, strict=True)) for values in itertools.product(*grids.values())]
    draws = drawn(ranges, len(points) * (config.trials or 1), config.seed)
    per_point = config.trials or 1
    rows = [point | draws[i * per_point + k] for i, point in enumerate(points) for k in range(per_point)]
    width = max(3, len(str(len(rows) - 1)))
    of_sweep = {name: getattr(SweepConfig, name) for name in (*OWN, "ray_address")}
    base = placed(single_search(replace(config, **of_sweep)), config)
    return [make_trial(f"{i:0{width}d}", row, base, config.retrain_trials) for i, row in enumerate(rows)]


def make_trial(name: str, values: Mapping[str, Any], base: SearchConfig, with_retrain: bool) -> Trial:
    """Both stages' options, but for the folders, which the worker knows."""
    search = replace(base, **{k: v for k, v in values.items() if not k.startswith(RETRAIN)})
    if search.arch is not None:
        from nas.stages.continued import continued

        search = continued(search)
    retrain = None
    if with_retrain:
        own = {k.removeprefix(RETRAIN): v for k, v in values.items() if k.startswith(RETRAIN)}
        shared = {name: getattr(search, name) for name in SHARED}
        if search.checkpoint is not None:  # it is written down in arch.json, from which stage 2 starts
            shared |= {"checkpoint": None}
        retrain = RetrainConfig(**(shared | own))
    return Trial(name, dict(values), search, retrain)


def placed(search: SearchConfig, config: SweepConfig) -> SearchConfig:
    """Threads by the trial's cores, no CUDA without a GPU, paths as every process finds them."""
    paths = {name: getattr(search, name, None) for name in PATHS}
    found = {name: type(p)(Path(p).absolute()) for name, p in paths.items() if p and Path(p).exists()}
    threads = search.threads if search.threads is not None else max(1, int(config.cpus_per_trial))
    device = "cpu" if config.gpus_per_trial == 0 and search.device is None else search.device
    return replace(search, threads=threads, device=device, output=None, resume=False, **found)


def check_resources(config: SweepConfig) -> None:
    """Refuse shares of a machine that no trial can have."""
    if launched():
        raise UserError("--sweep under torchrun: Ray hands out the trials, one process each; start python search.py")
    if config.cpus_per_trial <= 0:
        raise UserError(f"--cpus-per-trial {config.cpus_per_trial:g}; expected more than 0")
    if config.procs_per_trial < 1:
        raise UserError(f"--procs-per-trial {config.procs_per_trial}; expected at least 1")
    if config.gpus_per_trial is not None and config.gpus_per_trial < 0:
        raise UserError(f"--gpus-per-trial {config.gpus_per_trial:g}; expected 0 or more")
    if config.max_concurrent is not None and config.max_concurrent < 1:
        raise UserError(f"--max-concurrent {config.max_concurrent}; expected at least 1")
    if config.scheduler == "asha" and config.val_fraction == 0:
        raise UserError("--scheduler asha compares trials on a held-out part; set --val-fraction above 0")


def split_spec(spec: str, with_retrain: bool) -> tuple[str, str]:
    """ "budget=0.2,0.35" -> budget and its values, the option known to the stage that it goes to."""
    name, equals, text = spec.partition("=")
    option, text = name.strip().removeprefix("--").replace("-", "_"), text.strip()
    if not equals or not option or not text:
        raise UserError(f"--sweep {spec!r}; expected OPTION=VALUE,VALUE,… e.g. budget=0.2,0.35")
    kind, own = stage_of(option)
    if kind is RetrainConfig and not with_retrain:
        raise UserError(f"--sweep {option} is for the second stage; say --retrain-trials too")
    known = {f.name for f in fields(kind)} - set(FIXED_IN_RETRAIN if kind is RetrainConfig else FIXED)
    if own not in known:
        if own in {f.name for f in fields(kind)}:
            raise UserError(f"--sweep {option}: --{own.replace('_', '-')} cannot be swept; it is not a trial's own")
        from difflib import get_close_matches

        near = " or ".join(get_close_matches(own, sorted(known))) or "one of docs/options.md"
        script = "retrain.py" if kind is RetrainConfig else "search.py"
        raise UserError(f"--sweep {option}: {own!r} is no option of {script}; expected {near}")
    return option, text


def stage_of(option: str) -> tuple[type[Common], str]:
    """The config that an option belongs to, and its name there."""
    return (RetrainConfig if option.startswith(RETRAIN) else SearchConfig), option.removeprefix(RETRAIN)


def grid_values(option: str, text: str) -> list[Any]:
    """The values between commas, or between semicolons where values hold commas."""
    separator = ";" if ";" in text else ","
    values = [typed_value(option, part.strip()) for part in text.split(separator)]
    twice = [v for i, v in enumerate(values) if v in values[:i]]
    if twice:
        raise UserError(f"--sweep {option}={text}: {short(twice[0])} stands there twice; both trials would be the same")
    return values


def typed_value(option: str, text: str) -> Any:
    """A value read as the command line reads it. UserError when it is none of the option's."""
    kind, name = stage_of(option)
    flag = f"--{name.replace('_', '-')}"
    arguments = [flag, *text.split()]
    if next(f for f in fields(kind) if f.name == name).type is bool:
        arguments = {"true": [flag], "false": [flag.replace("--", "--no-", 1)]}.get(text.lower(), arguments)
    elif text.lower() in ("true", "false", "none"):
        arguments = [flag, text.capitalize() if text.lower() != "none" or name not in ("aa", "sched") else text]
    try:
        with redirect_stderr(StringIO()):
            config: Any = tyro.cli(kind, args=arguments, config=(tyro.conf.OmitArgPrefixes,), add_help=False)
    except SystemExit:
        raise UserError(f"--sweep {option}: {text!r} is no value of {flag} (docs/options.md)") from None
    return getattr(config, name)


def drawn(ranges: Mapping[str, str], number: int, seed: int) -> list[dict[str, Any]]:
    """So many draws of every range, by Ray's samplers; the same for the same seed."""
    if not ranges:
        return [{}] * number
    import numpy as np

    domains = {option: domain_of(option, text) for option, text in ranges.items()}
    rng = np.random.RandomState(seed)  # what Ray's samplers draw from
    return [
        {option: typed_value(option, _text(domain.sample(random_state=rng))) for option, domain in domains.items()}
        for _ in range(number)
    ]


def domain_of(option: str, text: str) -> Any:
    """loguniform(1e-13,1e-11) as Ray's sampler of that name."""
    name, _, rest = text.removesuffix(")").partition("(")
    parts = [p.strip() for p in re.split(";" if ";" in rest else ",", rest)]
    known = ", ".join([*RANGES, "choice"])
    if name != "choice" and name not in RANGES:
        raise UserError(f"--sweep {option}={text}: no such range; expected one of {known}")
    from ray import tune

    if name == "choice":
        for part in parts:
            typed_value(option, part)
        return tune.choice(parts)
    try:
        numbers = [int(p) if "int" in name else float(p) for p in parts]
        if len(numbers) != RANGES[name] or not numbers[0] < numbers[1]:
            raise ValueError
        domain = getattr(tune, name)(*numbers)
        domain.sample(random_state=0)  # where Ray checks bounds
    except (ValueError, AssertionError):
        shape = "(low,high)" if RANGES[name] == 2 else "(low,high,step)"
        positive = ", low above 0" if name.startswith(("log", "qlog")) else ""
        raise UserError(
            f"--sweep {option}={text}: expected {name}{shape} in numbers, low below high{positive}"
        ) from None
    return domain


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value.item() if hasattr(value, "item") else value)


TRIALS = "trials.csv"
MEASURES = ("top1", "top5", "held_out_top1", "gflops", "params", "images_per_s", "latency")
