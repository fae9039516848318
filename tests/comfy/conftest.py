"""Fixtures for the tests in a real ComfyUI. They fail when it cannot be had; to leave them out on
purpose, say so: pytest --ignore=tests/comfy, or -m "not comfy"."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent
PACK = "dmd2_pack"
"""Name under which these tests import the node pack: like ComfyUI, never as `nodes`."""
sys.path.insert(0, str(HERE))

import base_folder  # noqa: E402
import comfy_host  # noqa: E402
import comfy_server  # noqa: E402
import model_files  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "comfy: needs ComfyUI, which is downloaded once (20 MB)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.comfy)


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """ComfyUI's folder."""
    return comfy_host.comfyui_folder()


@pytest.fixture(scope="session")
def pack(comfyui: Path) -> Callable[[str], ModuleType]:
    """`pack("nodes.settings")` imports a module of the node pack in this process, on the CPU.

    ComfyUI's folder comes first on sys.path while it imports, and leaves again: it holds top-level
    modules with names such as `nodes`, `utils` and `tests`.
    """
    spec = importlib.util.spec_from_file_location(
        PACK,
        base_folder.REPOSITORY / "__init__.py",
        submodule_search_locations=[str(base_folder.REPOSITORY)],
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = package
    spec.loader.exec_module(package)

    def load(name: str) -> ModuleType:
        sys.path.insert(0, str(comfyui))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # ComfyUI's own
                importlib.import_module("comfy.cli_args").args.cpu = True
                return importlib.import_module(f"{PACK}.{name}")
        finally:
            sys.path.remove(str(comfyui))

    return load


@pytest.fixture(scope="session")
def server(
    comfyui: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[comfy_server.ComfyServer]:
    """One running ComfyUI with the pack installed, for all tests; ended by its own pid."""
    base = tmp_path_factory.mktemp("comfyui")
    base_folder.make_base(base)
    running = comfy_server.ComfyServer(
        comfyui=comfyui, base=base, custom_nodes=tuple(base_folder.CUSTOM_NODES)
    )
    running.start()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def model(server: comfy_server.ComfyServer) -> model_files.TinyModel:
    """The tiny model in diffusers; its files lie where the server finds them."""
    return model_files.build(server.base / "models")
