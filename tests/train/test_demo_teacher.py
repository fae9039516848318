"""The embedded teacher: its files, its text, its pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dmd2_core import StepPlan
from train_lora.data.training_data import encode_captions
from train_lora.demo import scenes
from train_lora.demo.classifier import load_classifier, recognised
from train_lora.demo.teacher import WEIGHTS_FILE, caption_vocabulary, load_teacher
from train_lora.models.components import Components
from train_lora.models.roles import TEACHER, SharedUNet
from train_lora.sampling import decode_latents, encode_images, sample_latents


@pytest.fixture(scope="module")
def teacher() -> Components:
    return load_teacher()


def test_all_weights_together_stay_below_8_mib() -> None:
    files = list(WEIGHTS_FILE.parent.glob("*.safetensors"))
    assert len(files) == 2
    assert sum(file.stat().st_size for file in files) <= 8 * 2**20


def test_every_word_of_a_caption_has_a_row_and_other_words_are_silent(teacher: Components) -> None:
    known = set(caption_vocabulary().tolist())
    words = {w for values in scenes.ATTRIBUTES.values() for w in values}
    ids = teacher.tokenizers[0](" ".join(sorted(words))).input_ids
    assert set(ids) <= known
    table = teacher.text_encoders[0].get_input_embeddings().weight
    assert {int(row) for row in table.abs().sum(1).nonzero()} == known


def test_vae_keeps_a_picture_recognisable_and_latents_on_unit_scale(teacher: Components) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = scenes.random_scenes(48, generator)
    latents = encode_images(teacher, scenes.draw(chosen, generator))
    # Whitened on 256 other scenes.
    assert latents.std().item() == pytest.approx(1.0, abs=0.1)
    seen = recognised(load_classifier(), decode_latents(teacher, latents), scenes.labels(chosen))
    assert seen.nanmean().item() > 0.96


def test_guidance_makes_the_teacher_obey_its_prompt(teacher: Components) -> None:
    """25 guided steps; chance would be about 0.3 of the attributes."""
    chosen = scenes.random_scenes(16, torch.Generator().manual_seed(11))
    condition = encode_captions(teacher, [scene.caption for scene in chosen], scenes.IMAGE_PX)
    latents = sample_latents(
        SharedUNet(teacher.unet, {}, seed=0), TEACHER, teacher, condition, StepPlan.evenly(25),
        seed=0, guidance=2.0, strength=0.0,
    )  # fmt: skip
    pictures = decode_latents(teacher, latents)
    assert recognised(load_classifier(), pictures, scenes.labels(chosen)).nanmean().item() > 0.93


def test_a_missing_weights_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        load_teacher(tmp_path / "absent.safetensors")
