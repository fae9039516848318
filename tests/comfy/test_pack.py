"""Rules for the node pack that can be read off its files: hosts, imports, the shipped workflow."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import comfy_host
import graphs
import pytest

REPOSITORY = graphs.REPOSITORY
NODE_FILES = sorted((REPOSITORY / "nodes").glob("*.py"))
CORE_FILES = sorted((REPOSITORY / "dmd2_core").glob("*.py"))

HOST_PACKAGES = {"comfy", "comfy_api", "folder_paths", "latent_preview"}
HOST_PACKAGES |= {"PIL", "safetensors", "torch", "tqdm"}
FORBIDDEN_NAMES = {"eval", "exec", "subprocess", "system", "popen", "__import__"}


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def imported(file: Path) -> Iterator[str]:
    """Top-level packages that a file imports absolutely, anywhere in it."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).split(".")[0]


@pytest.mark.parametrize("file", NODE_FILES, ids=lambda file: file.name)
def test_nodes_import_the_pack_relatively_and_the_host_only(file: Path) -> None:
    assert set(imported(file)) <= HOST_PACKAGES | sys.stdlib_module_names


@pytest.mark.parametrize("file", NODE_FILES, ids=lambda file: file.name)
def test_nodes_start_no_process_and_run_no_text(file: Path) -> None:
    names = {node.id for node in ast.walk(tree(file)) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree(file)) if isinstance(node, ast.Attribute)}
    assert not names & FORBIDDEN_NAMES


@pytest.mark.parametrize("file", CORE_FILES, ids=lambda file: file.name)
def test_the_core_loads_inside_comfyui_without_being_installed(file: Path) -> None:
    assert set(imported(file)) <= {"torch"} | sys.stdlib_module_names


def test_the_entry_point_imports_nothing_by_itself() -> None:
    docstring, web_directory, entry_point = tree(REPOSITORY / "__init__.py").body
    assert isinstance(docstring, ast.Expr)
    assert ast.unparse(web_directory) == "WEB_DIRECTORY = './web'"
    assert isinstance(entry_point, ast.AsyncFunctionDef)
    assert entry_point.name == "comfy_entrypoint"


@pytest.mark.parametrize(
    "file", sorted((REPOSITORY / "workflows").glob("*.json")), ids=lambda file: file.stem
)
def test_a_workflow_file_is_consistent(file: Path) -> None:
    workflow = json.loads(file.read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert workflow["last_node_id"] == max(nodes)
    assert workflow["last_link_id"] == max(link[0] for link in workflow["links"])
    for number, origin, output, target, place, type_ in workflow["links"]:
        source, socket = nodes[origin]["outputs"][output], nodes[target]["inputs"][place]
        assert number in source["links"]
        assert socket["link"] == number
        assert source["type"] == type_
        assert socket["type"] in (type_, "*")
    linked = [socket["link"] for node in nodes.values() for socket in node["inputs"]]
    assert sorted(filter(None, linked)) == sorted(link[0] for link in workflow["links"])


def test_a_wrong_comfyui_path_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"has no main\.py"):
        comfy_host.comfyui_folder()


def test_an_altered_archive_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def download(command: list[str], **_: object) -> object:
        Path(command[command.index("--dest") + 1], "comfy.tar.gz").write_bytes(b"other")
        return comfy_host.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(comfy_host.subprocess, "run", download)
    with pytest.raises(RuntimeError, match="not the pinned"):
        comfy_host.comfyui_folder()
    assert not list((tmp_path / "dmd2").iterdir())


def test_importing_the_pack_is_quick_and_brings_nothing_else(
    pack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What each start of ComfyUI pays for it, the host's own modules being there already."""
    pack("nodes.extension")
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    seconds = []
    for name in ("dmd2_pack_compiled", "dmd2_pack_again"):
        before = set(sys.modules)
        spec = importlib.util.spec_from_file_location(
            name, REPOSITORY / "__init__.py", submodule_search_locations=[str(REPOSITORY)]
        )
        package = sys.modules[name] = importlib.util.module_from_spec(spec)
        start = time.process_time()  # of this process alone: others may load the machine
        spec.loader.exec_module(package)
        nodes = asyncio.run(asyncio.run(package.comfy_entrypoint()).get_node_list())
        seconds.append(time.process_time() - start)
        new = set(sys.modules) - before
        for module in new:
            del sys.modules[module]
        assert len(nodes) >= 6
        assert {module.split(".")[0] for module in new} == {name}
    assert seconds[1] < 0.1
