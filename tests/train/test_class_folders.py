"""Folders of pictures as classes: which is which, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from train_lora.data.class_folders import class_files

from .tiny_edm import tree


def test_sorted_names_are_the_classes_unless_they_are_numbers(tmp_path: Path) -> None:
    named = tree(
        tmp_path / "named", "n02/a.png", "n01/b.JPEG", "n01/deep/c.png", "n03/d.webp", ".x/e.png"
    )
    found, labels = class_files(named, 3)
    assert [path.name for path in found] == ["b.JPEG", "c.png", "a.png", "d.webp"]
    assert labels.tolist() == [0, 0, 1, 2]
    numbered = tree(tmp_path / "numbered", "10/a.png", "9/b.png", "0002/c.png", "notes.txt")
    found, labels = class_files(numbered, 11)
    assert [path.name for path in found] == ["c.png", "b.png", "a.png"]
    assert labels.tolist() == [2, 9, 10]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/1.png", "b/1.png", "c/1.png", "d/1.png"], "4 folders, but the network has 3 classes"),
        (["a/1.png", "b/1.png"], "2 folders, but the network has 3 classes"),
        (["0/1.png", "3/1.png"], "a folder '3', but the network's classes are 0 to 2"),
        (["1/1.png", "01/1.png"], "are the same class"),
        (["0/1.png", "1/readme.txt"], "1 holds no picture"),
        (["1.png"], "0 folders"),
    ],
)
def test_other_folders_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_files(tree(tmp_path / "pictures", *names), 3)
