"""What the nodes share: their menu category and the connection that carries a recipe.

Schemas use only arguments that ComfyUI 0.3.48 accepts (tests/comfy/test_schema.py).
"""

from __future__ import annotations

import dataclasses

from comfy_api.latest import io

CATEGORY = "DMD2"
DMD2Recipe = io.Custom("DMD2_RECIPE")
"""Carries a dmd2_core Recipe, or None when the LoRA's file has none."""

SCHEMA_ARGUMENTS = frozenset(field.name for field in dataclasses.fields(io.Schema))
"""What this host's Schema accepts."""


def search_aliases(*words: str) -> dict[str, list[str]]:
    """For io.Schema: other words that people look for; nothing on a host that knows no such
    argument, where it would keep the whole pack from loading."""
    return {"search_aliases": list(words)} if "search_aliases" in SCHEMA_ARGUMENTS else {}


def recipe_input(follows: str) -> io.ComfyTypeI.Input:
    """The optional recipe socket; `follows` names the widgets that obey it."""
    return DMD2Recipe.Input(
        "recipe",
        optional=True,
        tooltip=f"The recipe from DMD2 Load LoRA. It sets {follows}, unless you change that from "
        "its default here.",
    )
