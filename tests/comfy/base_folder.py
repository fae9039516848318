"""The base directory that a ComfyUI is started on: the pack, and the node for the tiny SDXL."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
CUSTOM_NODES = {"dmd2": REPOSITORY, "tiny_sdxl": HERE / "tiny_sdxl_node"}
FOLDERS = (
    *("custom_nodes", "input", "output", "user/default/workflows"),
    *("models/checkpoints", "models/loras", "models/controlnet"),
)


def make_base(base: Path) -> None:
    """Create or complete `base`; what is there stays."""
    for folder in FOLDERS:
        (base / folder).mkdir(parents=True, exist_ok=True)
    for name, target in CUSTOM_NODES.items():
        link = base / "custom_nodes" / name
        if not link.is_symlink():
            link.symlink_to(target, target_is_directory=True)
