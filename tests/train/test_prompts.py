"""Reading captions from text files and tables."""

from __future__ import annotations

import json

import pytest

from train_lora.data.prompts import read_prompt_file, read_prompts
from train_lora.data.settings import DataConfig


def prompts_of(path, **options):
    return read_prompts(DataConfig(prompts=str(path), **options))


def test_one_caption_a_line_blank_lines_skipped(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_bytes("\ufeffa red ring\r\n\r\n  a blé star, on a hill \n# 1 fan".encode())
    assert prompts_of(path) == ["a red ring", "a blé star, on a hill", "# 1 fan"]


@pytest.mark.parametrize("content", [b"", b"\n \n\t\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(tmp_path, content):
    (tmp_path / "captions.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"captions.txt' has no caption; write at least one"):
        prompts_of(tmp_path / "captions.txt")


@pytest.mark.parametrize("name", ["captions.txt", "captions.csv", "captions.jsonl"])
def test_other_encodings_are_refused_with_the_line(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "plain"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"not UTF-8 text \(line 2\); save it as UTF-8"):
        prompts_of(
            tmp_path / name, **({"prompt_column": '{"text": "plain"}'} if "csv" in name else {})
        )


def test_missing_files_folders_and_other_kinds(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing.txt', which does not exist"):
        prompts_of(tmp_path / "nothing.txt")
    with pytest.raises(ValueError, match=r"a folder without captions; name a .txt, .jsonl"):
        prompts_of(tmp_path)
    (tmp_path / "captions.docx").write_text("a")
    with pytest.raises(ValueError, match=r"captions.docx', whose format is unknown; name a .txt"):
        prompts_of(tmp_path / "captions.docx")


def test_json_lines(tmp_path):
    path = tmp_path / "captions.jsonl"
    rows = [{"caption": "a, b", "tags": "x"}, {"caption": " ", "tags": "y"}, {"caption": "c\nd"}]
    path.write_text("\n".join(json.dumps(row) for row in rows[:2]) + "\n\n" + json.dumps(rows[2]))
    assert prompts_of(path) == ["a, b", "c\nd"]
    path.write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[1]))
    assert prompts_of(path, prompt_column="tags") == ["x", "y"]
    with pytest.raises(
        ValueError, match=r"no column 'text'; set data.prompt_column to one of capt"
    ):
        prompts_of(path, prompt_column="text")
    path.write_text('{"text": "a"}\n["b"]\n')
    with pytest.raises(ValueError, match=r"line 2 is no JSON object"):
        prompts_of(path)
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"line 2 is not JSON"):
        prompts_of(path)


def test_csv_with_quotes_and_line_breaks(tmp_path):
    path = tmp_path / "captions.csv"
    path.write_text('\ufeffid,prompt\n1,"a red, ""big"" ring"\n2,\n3,"two\nlines"\n', "utf-8")
    assert prompts_of(path) == ['a red, "big" ring', "two\nlines"]
    path.write_text("id,label\n1,a\n")
    with pytest.raises(
        ValueError, match=r"none of the columns text, caption, prompt; set data.pro"
    ):
        prompts_of(path)


def test_partiprompts_as_they_are_published(tmp_path):
    """Tab-separated, quotes are part of a prompt, and the column is called Prompt."""
    path = tmp_path / "PartiPrompts.tsv"
    rows = [
        "Prompt\tCategory\tChallenge\tNote",
        "bond\tAbstract\tBasic\tBiology-inspired concepts",
        'A wall. The words "Fly an airplane" are on it.\tOutdoor Scenes\tComplex\t',
        '"Hello\tAbstract\tWriting & Symbols\t',
        "a red cube, a blue one \tAbstract\tBasic\t",
    ]
    path.write_text("\n".join(rows), "utf-8")
    expected = [
        "bond",
        'A wall. The words "Fly an airplane" are on it.',
        '"Hello',
        "a red cube, a blue one",
    ]
    assert prompts_of(path) == expected
    assert read_prompt_file(path, "--prompts") == expected
    assert prompts_of(path, prompt_column="Category")[0] == "Abstract"
    path.write_text("Id\tCategory\n1\tAbstract\n")
    with pytest.raises(ValueError, match=r"set the caption's name to one of Id, Category"):
        read_prompt_file(path, "--prompts")
    (tmp_path / "p.pdf").write_text("a")
    with pytest.raises(ValueError, match=r"--prompts is .*\.pdf', whose format is unknown"):
        read_prompt_file(tmp_path / "p.pdf", "--prompts")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "captions.parquet"
    table = pyarrow.table({"text": ["a", None, " b ", ""] * 3, "n": list(range(12))})
    parquet.write_table(table, path, row_group_size=5)
    assert prompts_of(path) == ["a", "b"] * 3
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"captions.parquet cannot be read as parquet"):
        prompts_of(path)
