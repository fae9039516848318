"""Tokens and conditioning, against known ids and diffusers' own SDXL pipeline."""

from __future__ import annotations

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

from train_lora.models.text import Condition, encode_prompts, size_ids, token_ids
from train_lora.models.tokenizer import END, START, build_tokenizers, clip_vocabulary


@pytest.fixture(scope="module")
def tokenizers():
    return build_tokenizers()


def test_vocabulary_is_clips():
    vocabulary = clip_vocabulary()
    assert len(vocabulary) == 49408
    known = {"!": 0, "!</w>": 256, "the</w>": 518, "red</w>": 736, "cat</w>": 2368}
    known |= {START: 49406, END: 49407}
    assert {token: vocabulary[token] for token in known} == known


def test_a_caption_has_clips_ids_and_each_encoders_padding(tokenizers):
    rows = token_ids(tokenizers, ["a Red  ring on a blue background", "a red ring! on"])
    first = [49406, 320, 736, 2540, 525, 320, 1746, 5994, 49407]
    second = [49406, 320, 736, 2540, 256, 525, 49407]  # "!" stays a word, in encoder G too
    for ids, padding in zip(rows, (49407, 0), strict=True):
        assert ids.shape == (2, 77)
        assert ids[0].tolist() == first + [padding] * 68
        assert ids[1].tolist() == second + [padding] * 70


def test_byte_symbols_cover_every_script(tokenizers):
    text = "naïve café 日本 🙂 ½"
    ids = tokenizers[0](text).input_ids
    assert tokenizers[0].decode(ids, skip_special_tokens=True).replace(" ", "") == (
        text.replace(" ", "")
    )


def test_long_captions_are_cut_and_still_end(tokenizers):
    ids = token_ids(tokenizers, ["cat " * 200])[0][0].tolist()
    assert ids == [49406, *[2368] * 75, 49407]


def test_encoding_equals_diffusers_pipeline(components):
    captions = ["a red ring on a blue background", "", "two cats"]
    condition = encode_prompts(components, captions, height_px=128, width_px=96)
    pipeline = StableDiffusionXLPipeline(
        vae=components.vae,
        text_encoder=components.text_encoders[0],
        text_encoder_2=components.text_encoders[1],
        tokenizer=components.tokenizers[0],
        tokenizer_2=components.tokenizers[1],
        unet=components.unet,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    hidden, _, pooled, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
    assert torch.equal(condition.hidden, hidden)
    assert torch.equal(condition.pooled, pooled)
    assert condition.hidden.shape == (3, 77, 96)
    assert condition.time_ids.tolist() == [[128, 96, 0, 0, 128, 96]] * 3


def test_hidden_states_are_those_before_the_last_layer(components):
    encoder, rows = components.text_encoders[0], token_ids(components.tokenizers, ["a cat"])[0]
    inputs = []
    hook = encoder.encoder.layers[-1].register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append([*args, *kwargs.values()][0]),
        with_kwargs=True,
    )
    with torch.no_grad():
        encoder(rows)
    hook.remove()
    condition = encode_prompts(components, ["a cat"], 128, 128)
    assert torch.equal(condition.hidden[..., :32], inputs[0])


def test_condition_rows_joining_and_zeros(make_inputs):
    _, _, condition = make_inputs(num=4)
    assert torch.equal(condition[1].hidden, condition.hidden[1:2])
    assert torch.equal(condition[torch.tensor([3, 0])].pooled, condition.pooled[[3, 0]])
    joined = Condition.cat([condition[:1], condition[1:]])
    assert torch.equal(joined.hidden, condition.hidden)
    assert len(joined) == 4
    zeros = condition.zeros_like()
    assert not zeros.hidden.any()
    assert not zeros.pooled.any()
    assert torch.equal(zeros.time_ids, condition.time_ids)
    half = condition.to(dtype=torch.float16)
    assert (half.hidden.dtype, half.time_ids.dtype) == (torch.float16, torch.float32)


def test_bad_captions_and_sizes_are_refused(components):
    with pytest.raises(ValueError, match=r"captions is \[\]"):
        encode_prompts(components, [], 128, 128)
    with pytest.raises(ValueError, match="captions is 'a cat'"):
        encode_prompts(components, "a cat", 128, 128)
    with pytest.raises(ValueError, match="width_px is 100: use a positive multiple of 8"):
        size_ids(1, 128, 100)
