"""CLIP's tokenizer, built from the merges shipped beside this file: no download, no cache."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MAX_TOKENS = 77
NUM_TOKENS = 49408
START, END = "<|startoftext|>", "<|endoftext|>"
PADDING = (END, "!")
"""What SDXL fills up a caption with, in encoder L and in encoder G ("!" has the id 0)."""


def _byte_symbols() -> list[str]:
    """One printable character per byte, in CLIP's order of ids: printable bytes, then the rest."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    num_others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(num_others)]


@cache
def _merges() -> tuple[tuple[str, str], ...]:
    text = files(__package__).joinpath("clip_merges.txt").read_text(encoding="utf-8")
    pairs = [line.split(" ") for line in text.split("\n")[:-1]]
    return tuple((left, right) for left, right in pairs)


def clip_vocabulary() -> dict[str, int]:
    """Token -> id: 256 bytes, 256 bytes that end a word, 48894 merges, start and end."""
    symbols = _byte_symbols()
    tokens = symbols + [symbol + "</w>" for symbol in symbols]
    tokens += [left + right for left, right in _merges()]
    return {token: index for index, token in enumerate([*tokens, START, END])}


def build_tokenizers(num: int = len(PADDING)) -> list[CLIPTokenizer]:
    """SDXL's two tokenizers: one vocabulary, padded with the end token and with "!".

    SD1.5 has the first of them alone.
    """
    from transformers import CLIPTokenizer

    vocabulary, merges = clip_vocabulary(), list(_merges())
    return [
        CLIPTokenizer(
            vocab=vocabulary, merges=merges, pad_token=padding, model_max_length=MAX_TOKENS
        )
        for padding in PADDING[:num]
    ]
