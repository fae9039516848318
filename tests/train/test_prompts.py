"""Reading captions from a text file."""

from __future__ import annotations

import pytest

from train_lora.data.prompts import read_prompts


def test_one_caption_a_line_blank_lines_skipped(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_bytes("\ufeffa red ring\r\n\r\n  a blé star, on a hill \n# 1 fan".encode())
    assert read_prompts(path) == ["a red ring", "a blé star, on a hill", "# 1 fan"]


@pytest.mark.parametrize("content", [b"", b"\n \n\t\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(tmp_path, content):
    (tmp_path / "captions.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"captions.txt' has no caption; write one"):
        read_prompts(tmp_path / "captions.txt")


def test_other_encodings_are_refused_with_the_line(tmp_path):
    (tmp_path / "captions.txt").write_bytes(b"plain\ncaf\xe9\n")
    with pytest.raises(ValueError, match=r"not UTF-8 text \(line 2\); save it as UTF-8"):
        read_prompts(tmp_path / "captions.txt")


def test_missing_files_folders_and_other_kinds(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing.txt', which does not exist"):
        read_prompts(tmp_path / "nothing.txt")
    with pytest.raises(FileNotFoundError, match=r"which is a folder"):
        read_prompts(tmp_path)
    (tmp_path / "captions.csv").write_text("a")
    with pytest.raises(ValueError, match=r"not a .txt file"):
        read_prompts(tmp_path / "captions.csv")
