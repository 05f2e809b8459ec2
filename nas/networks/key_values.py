"""Constructor arguments as the command line has them: KEY=VALUE."""

import ast
from collections.abc import Sequence
from typing import Any

from search_spaces.errors import UserError


def parse_key_values(pairs: Sequence[str]) -> dict[str, Any]:
    """timm's KEY=VALUE arguments: Python literals, "a,b" as a tuple, anything else as text."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"--model-kwargs {pair!r}; expected KEY=VALUE, e.g. img_size=32")
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[key] = text
    return values
