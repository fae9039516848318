"""What files say about their prediction type, and what a contradiction is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dmd2_core import VPSchedule
from train_lora.models.markers import resolve, statements_of_file, statements_of_scheduler

V_TENSORS, V_ZERO = ["x", "v_pred"], ["x", "v_pred", "ztsnr"]


def of_file(names=(), metadata=None, wanted="auto", path="noob.safetensors"):
    prediction, schedule = resolve(
        Path(path), statements_of_file(list(names), metadata or {}), wanted
    )
    return prediction, schedule.has_zero_terminal_snr


def of_folder(config, wanted="auto"):
    prediction, schedule = resolve(Path("model"), statements_of_scheduler(config), wanted)
    return prediction, schedule.has_zero_terminal_snr


@pytest.mark.parametrize(
    ("names", "metadata", "expected"),
    [
        ([], {}, ("epsilon", False)),
        (V_TENSORS, {}, ("v", False)),
        (V_ZERO, {}, ("v", True)),
        (["ztsnr"], {}, ("epsilon", False)),  # ComfyUI, too, heeds it beside v_pred alone
        ([], {"modelspec.prediction_type": "v"}, ("v", False)),
        ([], {"modelspec.prediction_type": "v_prediction"}, ("v", False)),
        ([], {"modelspec.predict_key": "v"}, ("v", False)),
        (V_ZERO, {"modelspec.prediction_type": "v"}, ("v", True)),
        ([], {"modelspec.prediction_type": "epsilon"}, ("epsilon", False)),
    ],
)
def test_a_files_own_markers(names, metadata, expected):
    assert of_file(names, metadata) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ("epsilon", False)),
        ({"prediction_type": "epsilon"}, ("epsilon", False)),
        ({"prediction_type": "epsilon", "rescale_betas_zero_snr": False}, ("epsilon", False)),
        ({"prediction_type": "v_prediction"}, ("v", False)),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, ("v", True)),
        ({"prediction_type": "sample"}, ("sample", False)),
    ],
)
def test_a_folders_scheduler_config(config, expected):
    assert of_folder(config) == expected


def test_zero_terminal_snr_is_the_cores_schedule():
    _, schedule = resolve(Path("m"), statements_of_file(V_ZERO, {}), "auto")
    expected = VPSchedule.sdxl().zero_terminal_snr().alphas_cumprod
    assert torch.equal(schedule.alphas_cumprod, expected)
    assert schedule.alphas_cumprod[-1] == 0


@pytest.mark.parametrize(
    ("names", "metadata", "wanted", "expected"),
    [
        ([], {}, "v", ("v", False)),
        ([], {}, "v-zero-snr", ("v", True)),
        ([], {}, "epsilon", ("epsilon", False)),
        (V_TENSORS, {}, "v-zero-snr", ("v", True)),  # the file leaves the SNR open
        ([], {"modelspec.prediction_type": "v"}, "v-zero-snr", ("v", True)),
        # The file contradicts itself: the user decides.
        (V_TENSORS, {"modelspec.prediction_type": "epsilon"}, "v", ("v", False)),
        (V_TENSORS, {"modelspec.prediction_type": "epsilon"}, "epsilon", ("epsilon", False)),
    ],
)
def test_the_config_fills_in_and_decides(names, metadata, wanted, expected):
    assert of_file(names, metadata, wanted) == expected


@pytest.mark.parametrize(
    ("names", "metadata", "wanted", "message"),
    [
        (V_TENSORS, {}, "epsilon", r'"epsilon", but .* says v \(its tensor v_pred\)'),
        (V_ZERO, {}, "v", r'"v", but .* says zero terminal SNR \(its tensor ztsnr\)'),
        ([], {"modelspec.prediction_type": "epsilon"}, "v", r"says epsilon \(its metadata models"),
        (V_TENSORS, {"modelspec.prediction_type": "epsilon"}, "auto", "contradicts itself, its t"),
        ([], {"modelspec.prediction_type": "edm"}, "auto", "prediction type 'edm', which cannot"),
    ],
)
def test_contradictions_of_a_file_are_refused(names, metadata, wanted, message):
    with pytest.raises(ValueError, match=message) as caught:
        of_file(names, metadata, wanted)
    assert "noob.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "wanted", "message"),
    [
        ({"prediction_type": "epsilon"}, "v", "says epsilon .prediction_type in scheduler/"),
        (
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": False},
            "v-zero-snr",
            "says no zero terminal SNR",
        ),
        ({"prediction_type": "epsilon", "rescale_betas_zero_snr": True}, "auto", "impossible"),
        ({"prediction_type": "edm"}, "auto", "prediction type 'edm'"),
        ({"prediction_type": "flow"}, "epsilon", "says flow"),
    ],
)
def test_contradictions_of_a_folder_are_refused(config, wanted, message):
    with pytest.raises(ValueError, match=message):
        of_folder(config, wanted)


@pytest.mark.parametrize("name", ["noobai_vpred_1.0.safetensors", "X-v-pred.safetensors"])
def test_a_name_that_says_v_in_a_file_that_says_nothing_asks_the_user(name):
    with pytest.raises(ValueError, match="is called a v-prediction model, but nothing in it says"):
        of_file(path=name)
    assert of_file(path=name, wanted="v-zero-snr") == ("v", True)
    assert of_file(V_TENSORS, path=name) == ("v", False)
    assert of_file(path="improved-preds.safetensors") == ("epsilon", False)
