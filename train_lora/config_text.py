"""A `Config` as text: TOML, values with their origins, and the list of all keys."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

from .config import SECTIONS, Config
from .config_effects import ineffective_keys, value_of
from .config_load import TYPES, UNKNOWN, LoadedConfig
from .config_section import Section, show_value
from .config_values import describe_type


def to_toml(config: Config) -> str:
    """A file that `load` reads back; keys without effect become comments: it would refuse them."""
    idle = ineffective_keys(config)

    def line(key: str, text: str) -> str:
        return f"# {text}  (no effect)" if key in idle else text

    return _tables(config, line)


def show(loaded: LoadedConfig) -> str:
    """TOML with the origin of each value beside it; what must still be set, as a comment."""
    idle = ineffective_keys(loaded.config)

    def line(key: str, text: str) -> str:
        if key in loaded.missing:
            unset = f"# {key.partition('.')[2]} = {UNKNOWN}"
            return f"{unset:<40}  # required"
        note = ", no effect" if key in idle else ""
        return f"{text:<40}  # {loaded.origins[key]}{note}"

    return _tables(loaded.config, line)


def key_reference() -> str:
    """Every key with its meaning, type, range and default, as shown by help."""
    lines: list[str] = []
    for section, kind in SECTIONS.items():
        documents = field_documents(kind)
        for item in fields(kind):
            key = f"{section}.{item.name}"
            facts = describe_type(TYPES[key])
            if "bounds" in item.metadata:
                facts += f", {item.metadata['bounds']}"
            required = item.default is MISSING
            facts += "; required" if required else f"; default {show_value(item.default)}"
            lines.append(f"  --{key}")
            lines += textwrap.wrap(
                f"{documents[item.name]} ({facts})",
                width=98,
                initial_indent=" " * 6,
                subsequent_indent=" " * 6,
            )
    return "\n".join(lines)


def field_documents(kind: type[Section]) -> dict[str, str]:
    """The string that stands under each field of a section's class, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    documents: dict[str, str] = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(following, ast.Expr):
            continue
        if isinstance(statement.target, ast.Name) and isinstance(following.value, ast.Constant):
            documents[statement.target.id] = " ".join(str(following.value.value).split())
    return documents


def _tables(config: Config, line: Callable[[str, str], str]) -> str:
    blocks = []
    for section, kind in SECTIONS.items():
        keys = [f"{section}.{item.name}" for item in fields(kind)]
        rows = [
            line(key, f"{key.partition('.')[2]} = {_toml(value_of(config, key))}") for key in keys
        ]
        blocks.append("\n".join([f"[{section}]", *rows]))
    return "\n\n".join(blocks) + "\n"


def _toml(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):  # JSON's escapes are TOML's, but for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(element) for element in value)}]"
    return repr(value)
