"""nodes/nag.py against closed forms, and its patch against ComfyUI's own attention block."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

Pack = Callable[[str], ModuleType]


@pytest.fixture
def nag(pack: Pack) -> Callable[..., Tensor]:
    return pack("nodes.nag").normalized_attention_guidance


def draws(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_below_the_limit_it_is_the_blended_extrapolation(nag):
    positive, negative = torch.tensor([[4.0, -2.0]]), torch.tensor([[3.0, -1.0]])
    # (4, -2) + 2 * (1, -1) = (6, -4): its norm 10 is below 2.5 * 6. Half of it, half of (4, -2).
    assert torch.equal(nag(positive, negative, 3.0), torch.tensor([[5.0, -3.0]]))


def test_above_the_limit_each_token_is_shrunk_to_tau(nag):
    positive, negative = torch.tensor([[1.0, -1.0], [4.0, -2.0]]), torch.tensor([[-1.0, 1.0]])
    # First token: (1, -1) + 4 * (2, -2) = (9, -9), of norm 18 against 2.5 * 2: times 5 / 18.
    # Second: (4, -2) + 4 * (5, -3) = (24, -14), of norm 38 against 2.5 * 6: times 15 / 38.
    expected = torch.tensor([[2.5, -2.5], [24 * 15 / 38, -14 * 15 / 38]])
    torch.testing.assert_close(nag(positive, negative, 5.0, alpha=1.0), expected)
    half = (expected + positive) / 2
    torch.testing.assert_close(nag(positive, negative, 5.0), half)


def test_scale_one_and_equal_prompts_change_nothing(nag):
    positive, negative = draws((2, 5, 8), (2, 5, 8))
    torch.testing.assert_close(nag(positive, negative, 1.0), positive)
    torch.testing.assert_close(nag(positive, positive, 7.0), positive)


def test_zeros_and_half_precision_stay_finite(nag):
    zeros = torch.zeros(1, 2, 4)
    assert torch.equal(nag(zeros, zeros, 3.0), zeros)
    [positive] = draws((1, 2, 4))
    halved = nag(1000 * positive.half(), -1000 * positive.half(), 30.0)
    assert halved.dtype == torch.float16
    assert halved.isfinite().all()


WIDTH, HEADS, CONTEXT = 32, 2, 24
SCALE = 3.0


@pytest.fixture
def guidance(pack: Pack) -> ModuleType:
    return pack("nodes.attention_guidance")


@pytest.fixture
def model(pack: Pack, guidance: ModuleType) -> Any:
    """ComfyUI's patcher around one of its transformer blocks, with fixed weights."""
    attention = sys.modules[guidance.optimized_attention.__module__]
    block = attention.BasicTransformerBlock(WIDTH, HEADS, WIDTH // HEADS, context_dim=CONTEXT)
    generator = torch.Generator().manual_seed(6)
    for weight in block.parameters():
        weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    pack("nodes.guider")  # imports ComfyUI's patcher
    patcher = sys.modules["comfy.model_patcher"].ModelPatcher
    return patcher(block.requires_grad_(False), torch.device("cpu"), torch.device("cpu"))


def options(model: Any, kinds: list[int], place: tuple[str, int] = ("input", 4)) -> dict[str, Any]:
    """What ComfyUI hands to the block in a call whose chunks are of these kinds."""
    given = model.model_options["transformer_options"]
    return given | {"block": place, "block_index": 0, "cond_or_uncond": kinds}


def attended(block: Any, n: Tensor, context: Tensor) -> Tensor:
    """The cross-attention of `block` before its output projection, by torch's own function."""
    heads = [
        y.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for y in (block.attn2.to_q(n), block.attn2.to_k(context), block.attn2.to_v(context))
    ]
    return torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


def by_hand(block: Any, x: Tensor, context: Tensor, negative: Tensor, nag: Any) -> Tensor:
    """The whole block with guided cross-attention."""
    x = x + block.attn1(block.norm1(x))
    n = block.norm2(x)
    z = nag(attended(block, n, context), attended(block, n, negative), SCALE)
    x = x + block.attn2.to_out(z)
    return x + block.ff(block.norm3(x))


def test_the_patch_is_the_formula_in_comfyuis_block(guidance, model, nag):
    # The negative prompt is longer than the positive, as a long text is.
    x, context, negative = draws((2, 9, WIDTH), (2, 7, CONTEXT), (2, 14, CONTEXT))
    plain = model.model(x, context, options(model, [0]))
    run, patched = guidance.AttentionGuidance(SCALE), model.clone()
    run.install(patched)
    assert torch.equal(patched.model(x, context, options(patched, [0])), plain)  # not switched on
    run.negative = negative
    guided = patched.model(x, context, options(patched, [0]))
    expected = by_hand(model.model, x, context, negative, nag)
    # The same sums in another order.
    torch.testing.assert_close(guided, expected, rtol=1e-5, atol=1e-5)
    assert (guided - plain).abs().max() > 0.1
    assert torch.equal(model.model(x, context, options(model, [0])), plain)  # only the clone


def test_only_positive_chunks_are_guided(guidance, model):
    x, context, negative = draws((4, 9, WIDTH), (4, 7, CONTEXT), (2, 7, CONTEXT))
    run, patched = guidance.AttentionGuidance(SCALE), model.clone()
    run.install(patched)
    run.negative = negative
    both = patched.model(x, context, options(patched, [1, 0]))
    plain = model.model(x, context, options(model, [1, 0]))
    torch.testing.assert_close(both[:2], plain[:2], rtol=1e-5, atol=1e-5)
    alone = patched.model(x[2:], context[2:], options(patched, [0]))
    torch.testing.assert_close(both[2:], alone, rtol=1e-5, atol=1e-5)


def test_a_replacement_that_is_there_already_attends(guidance, model):
    seen: list[int] = []

    def twice(q: Tensor, k: Tensor, v: Tensor, given: dict[str, Any]) -> Tensor:
        seen.append(k.shape[1])
        return 2 * guidance.plain_attention(q, k, v, given)

    x, context, negative = draws((1, 9, WIDTH), (1, 7, CONTEXT), (1, 5, CONTEXT))
    model.set_model_attn2_replace(twice, "input", 4, 0)
    run, patched = guidance.AttentionGuidance(SCALE), model.clone()
    run.install(patched)
    patched.model(x, context, options(patched, [0]))
    run.negative = negative
    patched.model(x, context, options(patched, [0]))
    assert seen == [7, 7, 5]


def test_blocks_of_unknown_names_are_left_alone(guidance, model):
    x, context, negative = draws((1, 9, WIDTH), (1, 7, CONTEXT), (1, 5, CONTEXT))
    run, patched = guidance.AttentionGuidance(SCALE), model.clone()
    run.install(patched)
    run.negative = negative
    elsewhere = patched.model(x, context, options(patched, [0], ("single_block", 4)))
    assert torch.equal(elsewhere, model.model(x, context, options(model, [0])))
