"""Both command lines: options from the dataclass, --config YAML, one-line errors, exit codes."""

import ast
import inspect
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from itertools import pairwise, zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tyro
import yaml

from nas.config import C
from nas.failing import errors
from nas.machine.launch import is_first, launched
from nas.machine.stopping import RESUME_ME, Preempted, at_once
from search_spaces.errors import UserError, reason

# booleans whose default is the space's, or which a recipe may set
SPACES_FLAGS = ("pretrained", "amp", "model-ema", "model-ema-warmup", "adjoined", "stage-gates")


def main(kind: type[C], run: Callable[[C], Any]) -> None:
    """Parse, run, and turn what the user can cause into one line and exit code 2.

    The program is called in its messages what it was started as: search.py, vit-nas-search.
    """
    program = Path(sys.argv[0]).name
    try:
        with errors(program), at_once():
            run(parse(kind, sys.argv[1:], program))
            if launched():
                from nas.machine.distributed import leave

                leave()
    except Preempted as stopped:
        if is_first():
            print(f"{program}: stopped by {stopped.words}; go on with --output DIR --resume", file=sys.stderr)
        if launched():
            from nas.machine.distributed import leave

            leave(RESUME_ME)
        raise
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted; go on with --output DIR --resume", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not launched():
            raise
        from nas.machine.distributed import lost_contact, report

        if not lost_contact(error):
            raise
        report(program, f"lost contact with another process ({reason(error)}); go on with --output DIR --resume")
        sys.exit(1)


def option_words(kind: type) -> dict[str, str]:
    """The docstring that follows each field of a dataclass and its bases, in the files where these stand, in a line."""
    found = {}
    for base in filter(is_dataclass, kind.__mro__):
        body = ast.parse(inspect.getsource(base)).body[0].body  # type: ignore[attr-defined]
        for statement, after in zip_longest(body, body[1:]):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                words = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                found[statement.target.id] = " ".join(str(after.value.value).split()) if words else ""
    return found


def set_help(kind: Any) -> None:
    """Give tyro the options' words as lines of their own: it breaks those of two lines where the second begins."""
    words = option_words(kind)
    for field in fields(kind):
        field.metadata = MappingProxyType({"help": words[field.name]} | dict(field.metadata))


def parse(kind: type[C], arguments: list[str], program: str) -> C:
    """The config from --config FILE (YAML, option: value) or a run to --resume, then the command line over it."""
    arguments = with_resume(arguments)
    for name in SPACES_FLAGS:
        for flag, value in ((f"--{name}", "True"), (f"--no-{name}", "False")):
            i = arguments.index(flag) if flag in arguments else -1
            if i >= 0 and arguments[i + 1 : i + 2] not in (["True"], ["False"], ["None"]):
                arguments = [*arguments[:i], f"--{name}", value, *arguments[i + 1 :]]
    arguments, sweeps = take_options(arguments, "--sweep")
    arguments += ["--sweep", *sweeps] if sweeps else []
    arguments, config_file = take_option(arguments, "--config")
    default = None
    if config_file is not None:
        default = read_yaml(kind, Path(config_file), program)
    elif "--resume" in arguments:
        _, output = take_option(arguments, "--output")
        if output is not None and (Path(output) / "config.yaml").is_file():
            from nas.runs.folder import saved_config

            default = saved_config(kind, Path(output))
    options: dict[str, Any] = {} if default is None else {"default": default}
    if {"-h", "--help"} & set(arguments):
        set_help(kind)
    config: C = tyro.cli(kind, args=arguments, prog=program, config=(tyro.conf.OmitArgPrefixes,), **options)
    return config


def with_resume(arguments: list[str]) -> list[str]:
    """--resume auto as --resume where --output holds a run, and as nothing where it does not yet."""
    at = next((i for i, pair in enumerate(pairwise(arguments)) if pair == ("--resume", "auto")), None)
    if at is not None:
        arguments = [*arguments[:at], "--resume=auto", *arguments[at + 2 :]]
    if "--resume=auto" not in arguments:
        return arguments
    arguments = [a for a in arguments if a != "--resume=auto"]
    _, output = take_option(arguments, "--output")
    if output is None:
        raise UserError("--resume auto needs --output DIR, the folder of the run to begin or to go on with")
    return [*arguments, "--resume"] if (Path(output) / "config.yaml").is_file() else arguments


def take_option(arguments: list[str], option: str) -> tuple[list[str], str | None]:
    """Remove `option VALUE` or `option=VALUE`; the last one counts."""
    rest, values = take_options(arguments, option)
    return rest, values[-1] if values else None


def take_options(arguments: list[str], option: str) -> tuple[list[str], list[str]]:
    """Remove every `option VALUE` and `option=VALUE`; also the values, in order."""
    rest: list[str] = []
    values: list[str] = []
    i = 0
    while i < len(arguments):
        if arguments[i] == option:
            if i + 1 == len(arguments):
                raise UserError(f"{option} needs a value")
            values.append(arguments[i + 1])
            i += 1
        elif arguments[i].startswith(f"{option}="):
            values.append(arguments[i].partition("=")[2])
        else:
            rest.append(arguments[i])
        i += 1
    return rest, values


def read_yaml(kind: type[C], path: Path, program: str) -> C:
    """A YAML mapping of options, parsed by the same parser as the command line."""
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"--config {path}: no such file") from None
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise UserError(f"--config {path}: not readable as YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected a mapping of options to values")
    arguments: list[str] = []
    for name, value in values.items():
        flag = f"--{str(name).replace('_', '-')}"
        if value is None:
            continue
        if isinstance(value, bool):
            optional = flag.removeprefix("--") in SPACES_FLAGS
            arguments += [flag, str(value)] if optional else [flag if value else flag.replace("--", "--no-", 1)]
        elif isinstance(value, list):
            arguments += [flag, *map(str, value)] if value else []
        elif isinstance(value, dict):
            arguments += [flag, *(f"{k}={v}" for k, v in value.items())]
        else:
            arguments += [flag, str(value)]
    return tyro.cli(kind, args=arguments, prog=f"{program} --config {path}")
