"""What is installed: two packages, their data, one command; and versions pinned in one place."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("dmd2_core", "train_lora")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built offline from a copy, since a build leaves its traces in the source."""
    source = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("pyproject.toml", "README.md", "LICENSE", "__init__.py"):
        shutil.copy(ROOT / name, source)
    for name in (*PACKAGES, "nodes", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(out)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_the_two_packages_whole_and_nothing_else(wheel):
    names = [n for n in zipfile.ZipFile(wheel).namelist() if not n.endswith("/")]
    packaged = {n for n in names if n.partition("/")[0] in PACKAGES}
    others = {n.partition("/")[0] for n in names if n not in packaged}
    assert others == {f"dmd2-{PROJECT['project']['version']}.dist-info"}
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packaged == expected


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        folder = f"dmd2-{PROJECT['project']['version']}.dist-info"
        metadata = message_from_string(archive.read(f"{folder}/METADATA").decode())
        entry_points = archive.read(f"{folder}/entry_points.txt").decode()
        assert f"{folder}/licenses/LICENSE" in archive.namelist()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert entry_points.split() == ["[console_scripts]", "dmd2", "=", "train_lora.cli:main"]


def test_installed_command_runs_from_any_folder(wheel, tmp_path):
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-index", "--no-compile", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True)

    def dmd2(*arguments: str) -> str:
        return subprocess.run(
            [target / "bin" / "dmd2", *arguments],
            cwd=tmp_path,
            env={"PYTHONPATH": str(target), "PYTHONWARNINGS": "error"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert dmd2("--version").split() == ["dmd2", PROJECT["project"]["version"]]
    assert 'path = "demo"' in dmd2("config", "--show", "--preset", "demo")


def test_versions_are_pinned_in_constraints_and_nowhere_else():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {_normalised(name) for name in pins}
    project = PROJECT["project"]
    needed = project["dependencies"][:]
    for extra in project["optional-dependencies"].values():
        needed += extra
    assert [r for r in needed if _normalised(re.split(r"[<>=]", r)[0]) not in pinned] == []
    assert [r for r in needed if "==" in r or "~=" in r] == []


def test_the_node_pack_brings_no_requirement_of_its_own():
    """ComfyUI-Manager installs requirements.txt: a pin there would break other packs."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.strip() and not line.startswith("#")] == []


def test_host_requirements_are_in_the_extra():
    """All that ComfyUI asks for is installed by `make test`, but its templates and manuals."""
    host = pytest.importorskip("comfy_host", reason="tests/comfy was left out")
    asked = (host.comfyui_folder() / "requirements.txt").read_text(encoding="utf-8")
    names = {_normalised(re.split(r"[<>=~]", line)[0]) for line in asked.splitlines()} - {""}
    extra = {_normalised(name) for name in PROJECT["project"]["optional-dependencies"]["host"]}
    missing = {n for n in names if not n.startswith("#")} - extra
    assert missing <= {"torch", "comfyui-workflow-templates", "comfyui-embedded-docs"}


def test_the_registry_gets_the_nodes_and_nothing_that_it_bans():
    """Its scanner refuses packs that start processes, and code that is run from text."""
    ignored = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    left_out = tuple(line for line in ignored if line and not line.startswith("#"))
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    published = [name for name in listed if not name.startswith(left_out)]
    assert {name.partition("/")[0] for name in published if "/" in name} == {
        *("dmd2_core", "locales", "nodes", "subgraphs", "web", "workflows"),
    }
    assert {"__init__.py", "pyproject.toml", "requirements.txt", "LICENSE"} <= set(published)
    sources = [ROOT / name for name in published if name.endswith((".py", ".js", ".mjs"))]
    assert len(sources) > 25
    banned = re.compile(r"\b(subprocess|os\.system|popen|pickle|eval\(|exec\(|pip install)", re.I)
    found = [
        (str(path), match.group())
        for path in sources
        if (match := banned.search(path.read_text(encoding="utf-8")))
    ]
    assert found == []


def test_the_page_imports_only_what_comfyui_keeps_stable():
    """Scripts of the page: the two stable modules, and the pack's own beside them."""
    imported = {
        name
        for path in (ROOT / "web").rglob("*.*js")
        for name in re.findall(r"""from\s+['"]([^'"]+)""", path.read_text(encoding="utf-8"))
    }
    assert {name for name in imported if not name.startswith("./")} <= {
        "/scripts/app.js",
        "/scripts/api.js",
    }
    assert [path.name for path in (ROOT / "web").rglob("*.js")] == ["dmd2.js"]


def test_registry_metadata():
    """docs.comfy.org/registry/specifications: the name, the version, no `web` key beside the
    entry point's WEB_DIRECTORY (every script would load twice)."""
    assert "comfyui" not in PROJECT["project"]["name"].lower()
    assert re.fullmatch(r"[0-9]+\.[0-9]+\.[0-9]+", PROJECT["project"]["version"])
    comfy = PROJECT["tool"]["comfy"]
    assert comfy["requires-comfyui"] == ">=0.3.48"
    assert "web" not in comfy


def test_make_help_lists_the_two_commands():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.search(r"^  make demo +\S", done.stdout, re.MULTILINE)
    assert re.search(r"^  make test +\S", done.stdout, re.MULTILINE)


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()
