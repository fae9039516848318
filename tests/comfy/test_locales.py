"""The nodes' texts in English and Chinese: complete, current, and served with the help pages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import locale_files
import pytest
from base_folder import REPOSITORY
from comfy_server import ComfyServer

CHINESE = re.compile("[\u4e00-\u9fff]")
SAME_IN_CHINESE = {"CLIP", "VAE", "Latent", "sigmas"}


@pytest.fixture(scope="module")
def english(server: ComfyServer) -> dict[str, Any]:
    return locale_files.english(server.get("/object_info"))


def read(language: str) -> dict[str, Any]:
    file = locale_files.LOCALES / language / "nodeDefs.json"
    return json.loads(file.read_text(encoding="utf-8"))


def leaves(texts: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(texts, str):
        yield path, texts
    else:
        for key, value in texts.items():
            yield from leaves(value, f"{path}/{key}")


def test_english_is_what_the_nodes_say(english: dict[str, Any]) -> None:
    """After a change of a node's texts: `make workflows`, then the Chinese file by hand."""
    assert len(english) == 8
    assert read("en") == english


def test_chinese_covers_every_text(english: dict[str, Any]) -> None:
    chinese = dict(leaves(read("zh")))
    assert chinese.keys() == dict(leaves(english)).keys()
    left = [
        path
        for path, text in chinese.items()
        if text not in SAME_IN_CHINESE and not CHINESE.search(text)
    ]
    assert left == []


def test_comfyui_serves_both(server: ComfyServer) -> None:
    served = server.get("/i18n")
    for language in ("en", "zh"):
        own = {name: served[language]["nodeDefs"][name] for name in read(language)}
        assert own == read(language)


def test_every_node_has_help_in_both_languages(
    server: ComfyServer, english: dict[str, Any]
) -> None:
    """The page asks for docs/NODE/LANGUAGE.md, then for docs/NODE.md."""
    for name, texts in english.items():
        for page in (f"{name}.md", f"{name}/zh.md"):
            text = server.get_bytes(f"/extensions/dmd2/docs/{page}").decode()
            assert text == (REPOSITORY / "web" / "docs" / page).read_text(encoding="utf-8")
            for widget in texts["inputs"]:
                assert f"**{widget}**" in text, (page, widget)
        assert CHINESE.search(text)
