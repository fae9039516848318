"""Which errors are the user's to mend, and the sentence for each."""

from __future__ import annotations

import errno
import traceback

TRAIN_LIBRARIES = (
    *("accelerate", "diffusers", "huggingface_hub", "numpy", "peft", "PIL", "safetensors"),
    *("psutil", "tensorboard", "torch", "tqdm", "transformers"),
)
DATA_LIBRARIES = ("datasets", "pyarrow")
METRIC_LIBRARIES = ("torch_fidelity", "torchmetrics", "torchvision")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def user_sentence(error: Exception) -> str | None:
    """The sentence for an error that the user can mend; None for ours, which keeps its traceback.

    A ValueError counts if our own code raised it, not if it escaped from a library.
    """
    if isinstance(error, ModuleNotFoundError) and error.name in TRAIN_LIBRARIES:
        return (
            f"The library {error.name} is not installed; "
            "install the trainer's: pip install '.[train]' -c constraints.txt."
        )
    if isinstance(error, ModuleNotFoundError) and error.name in DATA_LIBRARIES:
        return (
            f"The library {error.name}, which reads this kind of data, is not installed; "
            "install it: pip install '.[data]' -c constraints.txt."
        )
    if isinstance(error, ModuleNotFoundError) and error.name in METRIC_LIBRARIES:
        return (
            f"The library {error.name}, which this metric needs, is not installed; "
            "install it: pip install '.[metrics]' -c constraints.txt."
        )
    if isinstance(error, OSError):
        return _of_the_system(error)
    if isinstance(error, ValueError | FloatingPointError) and _raised_by_us(error):
        return " ".join(str(error).split())
    return None


def _of_the_system(error: OSError) -> str:
    what = str(error) if error.filename is None else f"{error.strerror}: {error.filename}"
    if error.errno in NO_ROOM:
        return (
            f"{what.removesuffix('.')}. What was saved before is untouched: make room, then start "
            "again; a training goes on with dmd2 train --resume RUNDIR."
        )
    return what if error.filename is None else f"{what}."


def _raised_by_us(error: Exception) -> bool:
    module = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__", "")
    return module.partition(".")[0] in ("train_lora", "dmd2_core") or module == "__main__"
