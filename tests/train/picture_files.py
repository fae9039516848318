"""Small real files for tests of the data path: captioned pictures in every form that is read."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from PIL import Image

CAPTIONS = ("a red ring", "a green star", "a blue cross", "a pink moon")


def picture(number: int, size: tuple[int, int] = (128, 128)) -> Image.Image:
    """A gradient that differs from number to number."""
    ramp = Image.linear_gradient("L").resize(size)
    return Image.merge(
        "RGB", [ramp, ramp.rotate(90).resize(size), ramp.point(lambda v: v // (number + 1))]
    )


def picture_bytes(number: int, size: tuple[int, int] = (128, 128), kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    picture(number, size).save(stream, kind)
    return stream.getvalue()


def captioned_folder(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    """000.png + 000.txt, ..., captions in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes):
        picture(number, size).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(CAPTIONS[number % len(CAPTIONS)], "utf-8")
    return folder


def metadata_folder(folder: Path, count: int) -> Path:
    (folder / "deep").mkdir(parents=True)
    lines = []
    for number in range(count):
        picture(number).save(folder / "deep" / f"{number}.png")
        lines.append(json.dumps({"file_name": f"deep/{number}.png", "text": CAPTIONS[number]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            facts = tarfile.TarInfo(name)
            facts.size = len(content)
            archive.addfile(facts, io.BytesIO(content))
    return path


def tar_folder(folder: Path, count: int) -> Path:
    """Half of the samples in each of two tars."""
    for half in range(2):
        files = {}
        for number in range(half * count // 2, (half + 1) * count // 2):
            files[f"{number:04d}.png"] = picture_bytes(number)
            files[f"{number:04d}.txt"] = CAPTIONS[number].encode()
        write_tar(folder / f"{half:03d}.tar", files)
    return folder
