"""Imports point one way: nodes -> dmd2_core <- train_lora; the core stands on torch alone."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"accelerate", "diffusers", "gradio", "peft", "transformers"}


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """Every module that a file imports, anywhere in it, as absolute parts below the repository."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            module = tuple(node.module.split(".")) if node.module else ()
            base = package[: len(package) - node.level + 1] if node.level else ()
            for alias in node.names:
                yield (*base, *module, alias.name)


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def offenders(package: str, forbidden: set[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {'.'.join(parts)}"
        for path in files(package)
        for parts in imports(path)
        if parts and parts[0] in forbidden
    ]


def test_the_checker_sees_relative_and_absolute_imports() -> None:
    source = ROOT / "dmd2_core" / "few_step.py"
    assert ("dmd2_core", "schedule", "add_noise") in set(imports(source))
    assert ("torch",) in set(imports(source))


def test_core_imports_torch_and_the_standard_library_only() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "dmd2_core"}
    found = {parts[0] for path in files("dmd2_core") for parts in imports(path)}
    assert found - allowed == set()
    assert len(files("dmd2_core")) >= 9


def test_nodes_never_import_the_trainer_or_its_libraries() -> None:
    assert offenders("nodes", {"train_lora"} | HEAVY) == []


def test_the_trainer_never_imports_nodes_or_comfyui() -> None:
    assert (
        offenders("train_lora", {"nodes", "comfy", "comfy_api", "comfy_extras", "folder_paths"})
        == []
    )


@pytest.mark.parametrize("module", ["dmd2_core"])
def test_importing_is_light_and_silent(module: str) -> None:
    """Nothing but torch and what torch itself brings; no output, no random number drawn."""
    code = (
        "import sys, torch\n"
        "before, state = set(sys.modules), torch.get_rng_state()\n"
        f"import {module}\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        f"assert new <= set(sys.stdlib_module_names) | {{'torch', {module!r}}}, new\n"
        "assert torch.equal(state, torch.get_rng_state())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_core_draws_no_hidden_random_numbers() -> None:
    """Every call that draws names its generator (layers of a module initialise as torch does)."""
    draws = re.compile(r"(rand|randn|randint)(_like)?|randperm|multinomial|normal_?|uniform_")
    hidden = [
        f"{path.name}:{node.lineno}"
        for path in files("dmd2_core")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and draws.fullmatch(node.func.attr)
        and not any(keyword.arg == "generator" for keyword in node.keywords)
    ]
    assert hidden == []
