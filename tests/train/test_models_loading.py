"""Saving and loading in both forms: the same weights, the same hash, and clear refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmd2_core import VPSchedule
from train_lora.models.fingerprint import unet_hash
from train_lora.models.loading import load_components
from train_lora.models.roles import LoraSpec, SharedUNet
from train_lora.models.safetensors_io import read_safetensors, write_safetensors
from train_lora.models.saving import save_diffusers_folder, save_single_file


def networks(components):
    return [components.unet, components.vae, *components.text_encoders]


def assert_same_weights(one, other, dtype=None):
    for first, second in zip(networks(one), networks(other), strict=True):
        expected, found = first.state_dict(), second.state_dict()
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            stored = tensor if dtype is None else tensor.to(dtype).float()
            assert torch.equal(found[name], stored), name


def assert_same_pictures(one, other, make_inputs):
    """The networks compute the same, which weights alone (heads, activations) do not say."""
    x_t, t, condition = make_inputs()
    added = {"text_embeds": condition.pooled, "time_ids": condition.time_ids}
    for call in (
        lambda c: c.unet(x_t, t, condition.hidden, added_cond_kwargs=added).sample,
        lambda c: c.vae.decode(x_t).sample,
        lambda c: c.text_encoders[0](torch.arange(77)[None]).last_hidden_state,
        lambda c: c.text_encoders[1](torch.arange(49331, 49408)[None]).text_embeds,
    ):
        with torch.no_grad():
            assert torch.equal(call(one), call(other))


@pytest.fixture(scope="module")
def file(shared_components, tmp_path_factory):
    """The tiny model in float32; tests only read it."""
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_single_file(shared_components, path, dtype=torch.float32)
    return path


def test_single_file_round_trip(components, file, make_inputs):
    loaded = load_components(file)
    assert_same_weights(components, loaded)
    assert_same_pictures(components, loaded, make_inputs)
    assert loaded.base_hash == components.base_hash
    assert (loaded.name, loaded.kind, loaded.prediction) == ("model", "sdxl", "epsilon")
    assert loaded.vae.config.sample_size == 128
    assert loaded.unet.config.sample_size == 16
    assert not any(p.requires_grad for network in networks(loaded) for p in network.parameters())


def test_folder_round_trip(components, tmp_path, make_inputs):
    (tmp_path / "model").mkdir()  # an empty folder is fine
    save_diffusers_folder(components, tmp_path / "model")
    loaded = load_components(tmp_path / "model")
    assert_same_weights(components, loaded)
    assert_same_pictures(components, loaded, make_inputs)
    assert loaded.base_hash == components.base_hash
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_float16_file_halves_and_keeps_the_hash(components, tmp_path):
    save_single_file(components, tmp_path / "half.safetensors")
    loaded = load_components(tmp_path / "half.safetensors")
    assert_same_weights(components, loaded, dtype=torch.float16)
    assert loaded.base_hash == components.base_hash
    brain = load_components(tmp_path / "half.safetensors", dtype=torch.bfloat16)
    assert brain.unet.dtype == torch.bfloat16
    assert brain.vae.dtype == brain.text_encoders[1].dtype == torch.float32
    assert brain.base_hash == components.base_hash


def test_the_hash_sees_one_changed_value_and_not_adapters(components):
    SharedUNet(components.unet, {"student": LoraSpec(rank=2, alpha=1)}, seed=0)
    assert unet_hash(components.unet) == components.base_hash
    components.unet.conv_out.bias.data[0] += 0.01
    assert unet_hash(components.unet) != components.base_hash


def test_saving_is_byte_for_byte_and_valid_for_the_library(components, file, tmp_path):
    save_single_file(components, tmp_path / "again.safetensors", dtype=torch.float32)
    assert file.read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    stored = load_file(file)
    unet, encoder_g = components.unet.state_dict(), components.text_encoders[1].state_dict()
    ldm = stored["model.diffusion_model.output_blocks.5.0.skip_connection.weight"]
    assert torch.equal(ldm, unet["up_blocks.2.resnets.1.conv_shortcut.weight"])
    projection = stored["conditioner.embedders.1.model.text_projection"]
    assert torch.equal(projection, encoder_g["text_projection.weight"].T)
    attention = stored["first_stage_model.encoder.mid.attn_1.q.weight"]
    assert attention.shape == (64, 64, 1, 1)
    fused = stored["conditioner.embedders.1.model.transformer.resblocks.2.attn.in_proj_bias"]
    key = encoder_g["text_model.encoder.layers.2.self_attn.k_proj.bias"]
    assert torch.equal(fused[64:128], key)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_v_prediction_and_terminal_snr_survive_both_forms(components, tmp_path, zero_snr):
    schedule = VPSchedule.sdxl()
    schedule = schedule.zero_terminal_snr() if zero_snr else schedule
    model = replace(components, prediction="v", schedule=schedule)
    save_single_file(model, tmp_path / "v.safetensors")
    save_diffusers_folder(model, tmp_path / "v")
    assert ("ztsnr" in load_file(tmp_path / "v.safetensors")) == zero_snr
    for path in (tmp_path / "v.safetensors", tmp_path / "v"):
        loaded = load_components(path)
        assert loaded.prediction == "v"
        assert torch.equal(loaded.schedule.alphas_cumprod, schedule.alphas_cumprod)


def test_what_a_single_file_cannot_say_is_refused(components, tmp_path):
    with pytest.raises(ValueError, match="has no mark in a single file"):
        save_single_file(replace(components, prediction="sample"), tmp_path / "a.safetensors")
    components.unet.register_to_config(attention_head_dim=(2, 2, 3))
    with pytest.raises(ValueError, match="2 attention heads on 32 channels"):
        save_single_file(components, tmp_path / "a.safetensors")
    components.unet.register_to_config(attention_head_dim=(1, 2, 3), norm_num_groups=16)
    with pytest.raises(ValueError, match=r"16 groups in a norm .* which means 8 here"):
        save_single_file(components, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"dtype is .*bfloat16: save in"):
        save_single_file(components, tmp_path / "a.safetensors", dtype=torch.bfloat16)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(components, file):
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"model.safetensors exists: choose another name"):
        save_single_file(components, file)
    with pytest.raises(ValueError, match="exists and is not empty: choose another folder"):
        save_diffusers_folder(components, file.parent)
    with pytest.raises(ValueError, match="exists and is not empty"):
        save_diffusers_folder(components, file)
    assert file.read_bytes() == before


def test_a_broken_write_leaves_nothing(tmp_path):
    with pytest.raises(NotImplementedError):
        write_safetensors(tmp_path / "a", {"x": torch.ones(2, device="meta")}, {})
    assert not list(tmp_path.iterdir())


def test_our_writer_against_the_library(tmp_path):
    tensors = {
        "b": torch.randn(3, 5).half(),
        "a": torch.arange(7),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0),
        "strided": torch.randn(4, 6).T,
        "brain": torch.randn(3).bfloat16(),
    }
    metadata = {"name": 'ring "ß"', "a": "1"}
    write_safetensors(tmp_path / "ours.safetensors", tensors, metadata)
    found, read = read_safetensors(tmp_path / "ours.safetensors")
    assert read == metadata
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


# Refusals: the file, what is wrong, what to do


def rewritten(file, tmp_path, change):
    tensors = load_file(file)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "bad.safetensors")
    return tmp_path / "bad.safetensors"


def renamed_prefix(old, new):
    def change(tensors):
        for name in [name for name in tensors if name.startswith(old)]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


UNET, CLIP_L, CLIP_G = (
    "model.diffusion_model.",
    "conditioner.embedders.0.transformer.",
    "conditioner.embedders.1.model.",
)


def test_the_config_overrides_silence_and_not_the_file(components, file, tmp_path):
    """`model.prediction` reaches the loader in both forms."""
    silent = rewritten(file, tmp_path, lambda tensors: None)  # no metadata, no marks
    loaded = load_components(silent, prediction="v-zero-snr")
    assert (loaded.prediction, loaded.schedule.has_zero_terminal_snr) == ("v", True)
    with pytest.raises(ValueError, match=r'model.prediction is "v", but .* says epsilon'):
        load_components(file, prediction="v")  # its modelspec.prediction_type is epsilon
    save_diffusers_folder(replace(components, prediction="v"), tmp_path / "v")
    with pytest.raises(ValueError, match=r'"epsilon", but .* says v \(prediction_type in sched'):
        load_components(tmp_path / "v", prediction="epsilon")


def test_pickles_are_known_by_their_content_too(tmp_path):
    torch.save({"x": torch.zeros(2)}, tmp_path / "renamed.safetensors")
    with pytest.raises(ValueError, match="is a pickle"):
        load_components(tmp_path / "renamed.safetensors")
    (tmp_path / "bare.safetensors").write_bytes(b"\x80\x02}q\x00X\x01\x00\x00")
    with pytest.raises(ValueError, match="is a pickle"):
        read_safetensors(tmp_path / "bare.safetensors")
    # A header of 640 = 0x0280 bytes begins like a pickle of protocol 2 and is none.
    header = b'{"__metadata__":{"x":"1"}}'.ljust(640)
    (tmp_path / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert read_safetensors(tmp_path / "odd.safetensors") == ({}, {"x": "1"})


def test_folders_that_are_something_else_say_what_was_expected(components, file, tmp_path):
    with pytest.raises(ValueError, match=r"name the file itself, such as .*model.safetensors"):
        load_components(file.parent)
    folder = tmp_path / "bin"
    save_diffusers_folder(components, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"unet holds only .bin weights, which are pickles"):
        load_components(folder)
    with pytest.raises(ValueError, match="is one network of a diffusers folder, not a checkpoint"):
        load_components(folder / "vae" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed_prefix("", "net."), "is neither an SDXL nor an SD1.5 checkpoint"),
        (
            lambda t: t.update({"model.diffusion_model.double_blocks.0": torch.zeros(1)}),
            "is a diffusion transformer",
        ),
        (renamed_prefix(CLIP_L, "cond_stage_model.model."), "is a Stable Diffusion 2.x checkpoint"),
        (renamed_prefix(CLIP_G, "conditioner.embedders.0.model."), "is an SDXL refiner"),
        (renamed_prefix("first_stage_model.", "vae."), r"has no tensors first_stage_model\.\*"),
        (lambda t: t.update({"edm_mean": torch.zeros(1)}), "trained on an EDM schedule"),
        (lambda t: t.pop(UNET + "out.2.bias"), "1 of its tensors are missing, first model.diff"),
        (lambda t: t.update({UNET + "extra": torch.zeros(1)}), "1 tensors more than the structure"),
        (
            lambda t: t.update({UNET + "input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}),
            "inpainting or editing model with 9 input channels",
        ),
        (lambda t: t.update({UNET + "out.0.bias": torch.zeros(7)}), "SDXL's structure"),
        (
            lambda t: t.update({CLIP_G + "token_embedding.weight": torch.zeros(9, 64)}),
            r"text encoder with \(tokens, length\) \(9, 77\)",
        ),
    ],
)
def test_other_architectures_are_named(file, tmp_path, change, message):
    path = rewritten(file, tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        load_components(path)
    assert str(path) in str(caught.value)
    assert "give an SDXL or SD1.5 checkpoint" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_lora_is_not_a_checkpoint(tmp_path):
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1, 1)}, tmp_path / "l.safetensors")
    with pytest.raises(ValueError, match="is a LoRA, not a checkpoint"):
        load_components(tmp_path / "l.safetensors")


def test_missing_damaged_and_foreign_file(file, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere does not exist: give an SDXL or SD1\.5"):
        load_components(tmp_path / "nowhere")
    (tmp_path / "short.safetensors").write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="damaged, incomplete or not a safetensors file"):
        load_components(tmp_path / "short.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match="damaged, incomplete or not a safetensors file"):
        load_components(tmp_path / "text.safetensors")
    (tmp_path / "old.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is a pickle, which can run any code .* convert it"):
        load_components(tmp_path / "old.ckpt")


def test_bad_folders(components, tmp_path):
    with pytest.raises(
        ValueError, match=r"is a folder without model_index.json, so it is no diffusers"
    ):
        load_components(tmp_path)
    folder = tmp_path / "model"
    save_diffusers_folder(components, folder)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps(config | {"beta_end": 0.02}))
    with pytest.raises(ValueError, match=r"beta_end 0.02, SDXL's and SD1.5's is 0.012"):
        load_components(folder)
    scheduler.write_text(json.dumps(config | {"prediction_type": "score"}))
    with pytest.raises(ValueError, match="prediction type 'score', which cannot be distilled"):
        load_components(folder)
    scheduler.write_text(json.dumps(config))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"unet cannot be loaded \("):
        load_components(folder)
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="holds a FluxPipeline, not one of StableDiffusionXL"):
        load_components(folder)
