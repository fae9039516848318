"""The nodes' definitions under the oldest supported ComfyUI, 0.3.48.

That host is not to be had here (the oldest ComfyUI in a source archive of PyPI is 0.16.3), so what
its API accepts stands below: the names of the arguments in its comfy_api/latest/_io.py. One unknown
argument would make the whole pack fail to load.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

Pack = Callable[[str], ModuleType]

INPUT = {"id", "display_name", "optional", "tooltip", "lazy", "extra_dict"}
WIDGET = (INPUT - {"extra_dict"}) | {"default", "socketless"}
NUMBER = {"min", "max", "step", "display_mode", "force_input"}
WIDGETS = {
    "Boolean": WIDGET | {"label_on", "label_off", "force_input"},
    "Int": WIDGET | NUMBER | {"control_after_generate"},
    "Float": WIDGET | NUMBER | {"round"},
    "String": WIDGET | {"multiline", "placeholder", "dynamic_prompts", "force_input"},
    "Combo": WIDGET | {"options", "control_after_generate", "upload", "image_folder", "remote"},
}
SOCKETS = ("Model", "Clip", "Vae", "Conditioning", "Latent", "Image", "Sigmas", "Sampler")
OUTPUT = {"id", "display_name", "tooltip", "is_output_list"}
SCHEMA = {
    *("node_id", "display_name", "category", "inputs", "outputs", "hidden", "description"),
    *("is_input_list", "is_output_node", "is_deprecated", "is_experimental", "is_api_node"),
    *("not_idempotent", "enable_expand"),
}


def restrict(monkeypatch: pytest.MonkeyPatch, cls: type, allowed: set[str]) -> None:
    """Let `cls` be constructed with these keyword arguments only, and at most the id by place."""
    original = cls.__init__

    def construct(self: Any, *places: Any, **names: Any) -> None:
        unknown = names.keys() - allowed
        if type(self) is cls and (unknown or len(places) > 1):
            raise TypeError(f"{cls.__qualname__} of 0.3.48 does not know {sorted(unknown)}")
        original(self, *places, **names)

    monkeypatch.setattr(cls, "__init__", construct)


def nodes(pack: Pack) -> list[Any]:
    extension = pack("nodes.extension").DMD2Extension()
    return asyncio.run(extension.get_node_list())


@pytest.fixture
def oldest(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The pack's nodes, under 0.3.48's arguments."""
    found = nodes(pack)
    common = pack("nodes.common")
    for name, allowed in WIDGETS.items():
        restrict(monkeypatch, getattr(common.io, name).Input, allowed)
    for name in (*SOCKETS, *WIDGETS):
        kind = getattr(common.io, name)
        restrict(monkeypatch, kind.Output, OUTPUT)
        if name in SOCKETS:
            restrict(monkeypatch, kind.Input, INPUT)
    restrict(monkeypatch, common.DMD2Recipe.Input, INPUT)
    restrict(monkeypatch, common.DMD2Recipe.Output, OUTPUT)
    restrict(monkeypatch, common.io.Schema, SCHEMA)
    monkeypatch.setattr(common, "SCHEMA_ARGUMENTS", frozenset(SCHEMA))
    return found


def test_the_oldest_host_can_define_every_node(oldest: list[Any]) -> None:
    assert len(oldest) == 8
    for node in oldest:
        schema = node.define_schema()
        assert not schema.search_aliases
        # 0.3.48 wants ids that are unique among inputs and outputs together.
        ids = [part.id for part in (*schema.inputs, *schema.outputs) if part.id is not None]
        assert len(ids) == len(set(ids))


def test_a_newer_argument_would_be_seen(oldest: list[Any], pack: Pack) -> None:
    io = pack("nodes.common").io
    with pytest.raises(TypeError, match="does not know"):
        io.Int.Input("steps", advanced=True)
    with pytest.raises(TypeError, match="does not know"):
        io.Schema(node_id="DMD2_Test", search_aliases=["dmd"])


def test_a_newer_host_finds_the_nodes_by_other_words(pack: Pack) -> None:
    for node in nodes(pack):
        aliases = node.define_schema().search_aliases
        assert len(aliases) >= 3, node
        assert len({alias.lower() for alias in aliases}) == len(aliases)
