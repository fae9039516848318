"""Values of the configuration in the type of their key: from TOML and from the command line."""

from __future__ import annotations

import tomllib
from dataclasses import MISSING
from types import NoneType
from typing import Any, Literal, get_args, get_origin


def python_value(hint: Any, text: str) -> Any:
    """What TOML would give for the command line's `text`; text that does not fit stays text."""
    if _is_optional(hint):
        return None if text == "none" else python_value(_inner(hint), text)
    if get_origin(hint) is tuple:
        if get_origin(get_args(hint)[0]) is Literal:  # the shell takes quotes away
            words = text.strip("[] ")
            return [word.strip(" \"'") for word in words.split(",")] if words else []
        if text.startswith("["):
            return _toml_value(text)
        # Captions have commas of their own.
        return [text] if get_args(hint)[0] is str else _toml_value(f"[{text}]")
    if hint is bool:
        return {"true": True, "false": False}.get(text, text)
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            return text
    return text


def _toml_value(text: str) -> Any:
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return table["value"] if len(table) == 1 else text


def _is_optional(hint: Any) -> bool:
    return NoneType in get_args(hint)


def _inner(optional: Any) -> Any:
    """T, given `T | None`."""
    return next(kind for kind in get_args(optional) if kind is not NoneType)


def fit(hint: Any, value: Any) -> Any:
    """MISSING where the value is of another type."""
    arguments = get_args(hint)
    if _is_optional(hint):
        return None if value is None or value == "none" else fit(_inner(hint), value)
    if get_origin(hint) is Literal:
        return value if value in arguments else MISSING
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            return MISSING
        if arguments[-1] is not ... and len(value) != len(arguments):
            return MISSING
        fitted = tuple(fit(arguments[0], element) for element in value)
        return MISSING if MISSING in fitted else fitted
    if hint is float and type(value) is int:
        return float(value)
    return value if type(value) is hint else MISSING


def describe_type(hint: Any) -> str:
    """A type in words, for messages and for the list of keys."""
    arguments = get_args(hint)
    if _is_optional(hint):
        return f'{describe_type(_inner(hint))} or "none"'
    if get_origin(hint) is Literal:
        return " or ".join(f'"{choice}"' for choice in arguments)
    if get_origin(hint) is tuple and get_origin(arguments[0]) is Literal:
        return f"a list in brackets of {describe_type(arguments[0])}"
    if get_origin(hint) is tuple:
        plural = {int: "whole numbers", float: "numbers", str: "texts"}[arguments[0]]
        count = "" if arguments[-1] is ... else f"{len(arguments)} "
        return f"a list of {count}{plural} in brackets"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[hint]
