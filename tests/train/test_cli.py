"""The command line: one sentence and exit code 2 for what the user got wrong, and quick starts."""

from __future__ import annotations

import errno
import importlib
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from train_lora import cli
from train_lora.output import check_output_directory

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stand_in(monkeypatch):
    """Replaces a function that the command imports when it runs; its signature stays."""

    def put(name: str, does: Callable[..., Any]) -> None:
        module, _, function = name.rpartition(".")
        real = getattr(importlib.import_module(module), function)
        monkeypatch.setattr(name, mock.create_autospec(real, side_effect=does))

    return put


def failure(capsys, *argv: str) -> str:
    """The one line on stderr of a command that must end with exit code 2."""
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("dmd2: error: ")
    assert lines[0].endswith((".", "?"))
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "COMMAND"),
        (["distil"], "'distil'"),
        (["train"], "model.path is not set"),
        (["train", "--config", "nothing.toml"], "nothing.toml does not exist"),
        (["train", "--preset", "demo", "--model.path", "m.safetensors"], "m.safetensors does not"),
        (["train", "--preset", "demo", "--student.init", "lora"], "'lora', which does not exist"),
        (["prepare", "--preset", "demo", "--data.prompts", "p.txt"], "'p.txt', which does not"),
        (["train", "--preset", "demo", "--itertions", "3"], "--training.iterations"),
        (["train", "--preset", "demo", "--iterations", "none"], "'none'; set it to a whole number"),
        (["train", "--preset", "demo", "--iterations", "-1"], "training.iterations is -1"),
        (["train", "--preset", "demo", "--iterations=0"], "training.iterations is 0"),
        (["train", "--preset", "demo", "--iterations"], "--iterations has no value"),
        (["train", "--preset", "demo", "--gan.enabled", "--rank=3"], "has no value"),
        (["train", "--preset", "demo", "stray"], "'stray'"),
        (["train", "--preset", "demo", "--timesteps", "499,999"], "must descend"),
        (["train", "--preset", "demo", "--timesteps", "1000,1"], "at most 999"),
        (["train", "--preset", "demo", "--timesteps", "0"], "at least 1"),
        (["train", "--preset", "demo", "--ablate", "gan"], "no-gan"),
        (["demo"], "--out"),
        (["demo", "--out", "x", "--seed", "-1"], "-1"),
        (["demo", "--out", "x", "--steps", "4"], "'--steps'"),
        (["teacher", "--out", "x", "--format", "ckpt"], "'ckpt'"),
        (["config"], "--show --keys"),
        (["config", "--keys", "--preset", "demo"], "--show"),
        (["config", "--presets", "--seed", "1"], "--show"),
    ],
)
def test_mistakes_end_as_one_sentence(capsys, argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in failure(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["train", "demo", "teacher"])
def test_a_folder_with_something_in_it_is_left_alone(capsys, tmp_path, command):
    kept = tmp_path / "result.txt"
    kept.write_text("precious")
    options = {
        "train": ["--preset", "demo", "--output.directory", str(tmp_path)],
        "demo": ["--out", str(tmp_path)],
        "teacher": ["--out", str(tmp_path)],
    }[command]
    assert "not empty" in failure(capsys, command, *options)
    assert [path.name for path in tmp_path.iterdir()] == ["result.txt"]
    assert kept.read_text() == "precious"


def test_output_directories(tmp_path):
    assert check_output_directory(tmp_path, "--out") == tmp_path
    assert check_output_directory(tmp_path / "new", "--out") == tmp_path / "new"
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--out is .*file', which is a file; name a folder"):
        check_output_directory(tmp_path / "file", "--out")
    with pytest.raises(ValueError, match=r"--out is .*run', but .*file is a file; name a folder"):
        check_output_directory(tmp_path / "file" / "deep" / "run", "--out")
    with pytest.raises(ValueError, match=r"--out is .* not empty; name another one"):
        check_output_directory(tmp_path, "--out")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match=r"but .* cannot be written to; name another"):
        check_output_directory(tmp_path / "run", "--out")
    tmp_path.chmod(0o700)


def test_a_full_disk_is_named_with_what_to_do(capsys, tmp_path, stand_in):
    def train(config):
        raise OSError(errno.ENOSPC, "No space left on device", "run/lora.safetensors")

    stand_in("train_lora.trainer.train", train)
    argv = ["train", "--preset", "demo", "--directory", str(tmp_path / "run")]
    sentence = failure(capsys, *argv)
    assert "No space left on device: run/lora.safetensors. What was saved before is" in sentence
    assert sentence.endswith("a training goes on with dmd2 train --resume RUNDIR.")


def test_train_hands_the_configuration_over(capsys, tmp_path, stand_in):
    seen = []
    result = types.SimpleNamespace(lora=Path("a/lora"))
    stand_in("train_lora.trainer.train", lambda config: seen.append(config) or result)
    out = str(tmp_path / "run")
    argv = ["train", "--preset", "demo", "--directory", out, "--ablate", "no-gan", "--ablate"]
    assert cli.main([*argv, "critic-1to1", "--student.rank", "4"]) == 0
    assert capsys.readouterr().out == "a/lora\n"
    (config,) = seen
    assert config.output.directory == out
    assert config.student.rank == 4
    assert not config.gan.enabled
    assert config.critic.updates_per_generator == 1


def test_demo_hands_folder_and_seed_over(tmp_path, stand_in):
    seen = []
    stand_in("train_lora.demo.run.run_demo", lambda out, seed: seen.append((out, seed)))
    assert cli.main(["demo", "--out", str(tmp_path), "--seed", "7"]) == 0
    assert seen == [(tmp_path, 7)]


@pytest.mark.parametrize(
    ("form", "written"),
    [
        ("diffusers", ["dmd2_demo_teacher"]),
        ("single", ["dmd2_demo_teacher.safetensors"]),
        ("both", ["dmd2_demo_teacher", "dmd2_demo_teacher.safetensors"]),
    ],
)
def test_teacher_writes_the_forms_asked_for(capsys, tmp_path, stand_in, form, written):
    saving = "train_lora.models.saving"
    stand_in("train_lora.demo.teacher.load_teacher", lambda: "components")
    stand_in(f"{saving}.save_diffusers_folder", lambda components, path: path.mkdir())
    stand_in(f"{saving}.save_single_file", lambda components, path: path.write_text(components))
    out = tmp_path / "out"
    assert cli.main(["teacher", "--out", str(out), "--format", form]) == 0
    assert sorted(path.name for path in out.iterdir()) == written
    assert capsys.readouterr().out.split() == [str(out / name) for name in written]


def test_config_show_and_keys(capsys):
    assert cli.main(["config", "--show", "--preset", "demo", "--iterations", "3"]) == 0
    shown = capsys.readouterr().out
    assert any(line.split() == ["iterations", "=", "3", "#", "cli"] for line in shown.splitlines())
    assert cli.main(["config", "--show", "--preset", "sdxl-4step"]) == 0
    assert "# prompts = ...                           # required\n" in capsys.readouterr().out
    assert cli.main(["config", "--keys"]) == 0
    assert "--training.iterations" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (FileNotFoundError("The file x is missing; name another."), "The file x is missing"),
        (PermissionError(13, "Permission denied", "/x"), "Permission denied: /x."),
        (ModuleNotFoundError("No module", name="peft"), "peft is not installed"),
        (ModuleNotFoundError("No module", name="torch_fidelity"), "pip install '.[metrics]'"),
    ],
)
def test_errors_of_the_users_making_while_training(capsys, tmp_path, stand_in, error, sentence):
    def train(config):
        raise error

    stand_in("train_lora.trainer.train", train)
    argv = ["train", "--preset", "demo", "--directory", str(tmp_path / "run")]
    assert sentence in failure(capsys, *argv)


def test_our_own_mistakes_keep_their_traceback(tmp_path, stand_in):
    def train(config):  # the ValueError comes from outside our packages
        raise ValueError("not enough values to unpack")

    stand_in("train_lora.trainer.train", train)
    with pytest.raises(ValueError, match="not enough values"):
        cli.main(["train", "--preset", "demo", "--directory", str(tmp_path / "run")])


def test_traceback_on_request(capsys, monkeypatch):
    monkeypatch.setenv("DMD2_TRACEBACK", "1")
    assert cli.main(["train"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("dmd2: error: model.path")


def test_interrupt(capsys, tmp_path, stand_in):
    def train(config):
        raise KeyboardInterrupt

    stand_in("train_lora.trainer.train", train)
    assert cli.main(["train", "--preset", "demo", "--directory", str(tmp_path / "run")]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["demo", "--help"]])
def test_help_exits_cleanly(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 0
    assert ("--training.iterations" in capsys.readouterr().out) == (argv[0] == "train")


def test_start_up_imports_only_the_standard_library():
    """Importing torch alone takes seconds; help, a wrong option and a shown config take none, nor
    does a file that is not there."""
    code = (
        "import sys; before = set(sys.modules)\n"
        "from train_lora import cli\n"
        "assert cli.main(['config', '--show', '--preset', 'demo']) == 0\n"
        "absent = ['--preset', 'demo', '--model.path', 'absent.safetensors', '--directory', 'x']\n"
        "assert cli.main(['train', *absent]) == cli.main(['prepare', *absent]) == 2\n"
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "foreign = loaded - set(sys.stdlib_module_names) - {'train_lora'}\n"
        "sys.exit(f'imported: {sorted(foreign)}' if foreign else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_export_takes_the_checkpoint_that_is_named(stand_in, tmp_path, capsys):
    seen = []
    stand_in(
        "train_lora.export_checkpoint.export_checkpoint",
        lambda source, out, which=None: seen.append((source, which)) or [out],
    )
    for number, words in enumerate((["--checkpoint", "best"], [])):
        out = tmp_path / f"{number}.safetensors"
        assert cli.main(["export", "run", *words, "--out", str(out)]) == 0
        assert capsys.readouterr().out.strip() == str(out)
    assert seen == [(Path("run"), "best"), (Path("run"), None)]
