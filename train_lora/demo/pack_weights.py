"""Join what the make_*.py scripts left in a folder: `python -m train_lora.demo.pack_weights DIR`.

DIR/vae, text and unet.safetensors become DIR/teacher.safetensors in float16.
"""

from __future__ import annotations

import sys
from pathlib import Path


def pack_weights(folder: Path) -> Path:
    from safetensors.torch import load_file

    from ..models.safetensors_io import write_safetensors

    state = load_file(folder / "text.safetensors")
    for part in ("vae", "unet"):
        stored = load_file(folder / f"{part}.safetensors")
        state |= {f"{part}.{name}": value for name, value in stored.items()}
    half = {n: v.half() if v.is_floating_point() else v for n, v in state.items()}
    write_safetensors(folder / "teacher.safetensors", half, {})
    return folder / "teacher.safetensors"


if __name__ == "__main__":
    print(pack_weights(Path(sys.argv[1])))
