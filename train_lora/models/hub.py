"""A model named by its hub id ("org/name"): downloaded once, announced before, then cached."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from .building import first_line

_FOLDERS = ("unet", "vae", "text_encoder", "text_encoder_2", "scheduler")
_FILES = ["model_index.json", *(f"{folder}/*.json" for folder in _FOLDERS)]
_WEIGHTS = [f"{folder}/*.safetensors" for folder in _FOLDERS]


def snapshot(repository: str) -> Path:
    """The local folder of a diffusers model on the hub; downloads what the cache lacks.

    Only JSON and .safetensors files of the parts that are used; of weights in two precisions the
    fp16 ones. HF_TOKEN and HF_HUB_CACHE work as everywhere.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:  # a complete earlier download needs no network
        return _complete(Path(snapshot_download(repository, local_files_only=True)))
    except LocalEntryNotFoundError:
        pass
    try:
        files = HfApi().model_info(repository, files_metadata=True).siblings or []
        sizes = {file.rfilename: file.size or 0 for file in files}
        wanted = wanted_files(sizes)
        if not wanted:
            raise ValueError(
                f"{repository} on huggingface.co is not a diffusers model with .safetensors "
                "weights: download its single file and give that file's path"
            )
        total_gb = sum(sizes[name] for name in wanted) / 1e9
        print(
            f"Downloading {repository} from huggingface.co ({len(wanted)} files, "
            f"{total_gb:.1f} GB) into the Hugging Face cache ...",
            file=sys.stderr,
        )
        return Path(snapshot_download(repository, allow_patterns=wanted))
    except Exception as error:
        if is_of_the_hub(error):
            raise _not_reached(repository, error) from error
        raise


def is_of_the_hub(error: Exception) -> bool:
    """Whether it comes from huggingface_hub or from the connection below it."""
    kinds = ("httpx", "httpx2", "huggingface_hub")
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in kinds


def _not_reached(repository: str, error: Exception) -> ValueError:
    return ValueError(
        f"{repository} is not an existing path and cannot be had from huggingface.co either "
        f"({type(error).__name__}: {first_line(error)}): check the name and the connection, set "
        "HF_TOKEN for a gated model, or give the path of a file or folder"
    )


def _complete(folder: Path) -> Path:
    """`folder`, unless an interrupted download has left it without weights."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if not (folder / "model_index.json").is_file() or not any(folder.glob("unet/*.safetensors")):
        raise LocalEntryNotFoundError("the cached copy is incomplete")
    return folder


def wanted_files(names: Iterable[str]) -> list[str]:
    """Which of a repository's files to download."""
    from fnmatch import fnmatch

    names = list(names)
    configs = [name for name in names if any(fnmatch(name, pattern) for pattern in _FILES)]
    weights = [
        name
        for name in names
        if any(fnmatch(name, pattern) for pattern in _WEIGHTS) and "ema" not in Path(name).name
    ]
    chosen = []
    for folder in _FOLDERS:
        here = [name for name in weights if name.startswith(folder + "/")]
        half = [name for name in here if ".fp16" in name]
        chosen += half or here
    return sorted(configs + chosen) if chosen else []
