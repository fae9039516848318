"""`dmd2 pairs`: the teacher's image of each noise; stopped and gone on with; refused when stale."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dmd2_core import StepPlan, add_noise, coefficients, to_x0
from train_lora import cli, prepare
from train_lora.config import Config
from train_lora.data import teacher_pairs
from train_lora.data.cache import PAIRS
from train_lora.data.encode import encode_captions
from train_lora.data.freshness import changed_sources
from train_lora.data.training_data import TrainingData, load_training_data
from train_lora.inputs import check_inputs

from .prepared import contents
from .tiny import demo_config

pytestmark = pytest.mark.usefixtures("tiny_model")


@pytest.fixture
def config(tmp_path: Path, prompts: Path) -> Callable[..., Config]:
    """Five pairs in shards of two; `section__key=value` overrides."""

    def make(**overrides: Any) -> Config:
        options = {
            "data__prompts": prompts,
            "data__real_images": None,
            "gan__enabled": "false",
            "sampling__steps": 1,
            "regression__warmup_iterations": 2,
            "regression__pairs": tmp_path / "pairs",
            "regression__num_pairs": 5,
            "regression__teacher_steps": 2,
            "training__batch_size": 2,
        }
        given = {k: v for k, v in (options | overrides).items() if v is not None}
        return demo_config(tmp_path / "run", **given)

    return make


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_pairs, "UNIT_PAIRS", 2)


def all_pairs(data: TrainingData, count: int = 5) -> dict[str, torch.Tensor]:
    assert data.pairs is not None
    return data.pairs.rows(torch.arange(count))


def test_an_image_is_the_teachers_deterministic_guided_answer_to_its_noise(
    config, shared_components
) -> None:
    """Two DDIM steps written out, from the noise and the caption that the pair holds."""
    settings = config()
    report = json.loads(prepare.make_pairs(settings).read_text("utf-8"))
    assert (report["pairs"], report["buckets"]) == (5, {"128x128": 5})
    data = load_training_data(settings, shared_components)
    found, captions = all_pairs(data), data.pairs.captions(range(5))
    assert set(captions) <= set(data.captions)
    assert found["noise"].std().item() == pytest.approx(1, abs=0.05)

    condition = encode_captions(shared_components, captions, 128)
    schedule, guidance = shared_components.schedule, settings.distribution_matching.guidance
    x = found["noise"]

    @torch.no_grad()
    def output(told: Any, t: torch.Tensor) -> torch.Tensor:
        added = {"text_embeds": told.pooled, "time_ids": told.time_ids}
        return shared_components.unet(
            x, t, encoder_hidden_states=told.hidden, added_cond_kwargs=added
        ).sample

    assert StepPlan.evenly(2).timesteps == (999, 499)
    for t, t_next in ((999, 499), (499, None)):
        told = torch.full((5,), t)
        without, with_text = output(condition.zeros_like(), told), output(condition, told)
        eps = without + guidance * (with_text - without)
        x0 = to_x0("epsilon", eps, x, *coefficients(schedule, told, x))
        x = x0 if t_next is None else add_noise(schedule, x0, eps, torch.full((5,), t_next))
    # The images are kept in float16; guidance in one batch of 2B has other last bits.
    torch.testing.assert_close(found["latents"], x, rtol=2e-3, atol=2e-3 * x.abs().max().item())
    torch.testing.assert_close(found["hidden"], condition.hidden, rtol=2e-3, atol=2e-3)


def test_stopped_pairs_go_on_and_end_in_the_same_bytes(
    config, tmp_path, monkeypatch, shared_components
) -> None:
    prepare.make_pairs(config(regression__pairs=tmp_path / "whole"))
    write, written = prepare.write_shard, []

    def killed(path: Path, *rest: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        write(path, *rest)
        written.append(path.name)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare.make_pairs(config())
    with pytest.raises(ValueError, match=r"regression.pairs .* is incomplete.*run dmd2 pairs agai"):
        load_training_data(config(), shared_components)
    written.clear()
    monkeypatch.setattr(
        prepare, "write_shard", lambda path, *rest: written.append(path.name) or write(path, *rest)
    )
    prepare.make_pairs(config())
    assert written == ["pairs-000002.safetensors"]
    assert contents(tmp_path / "pairs") == contents(tmp_path / "whole")
    assert len(contents(tmp_path / "pairs")) == 3 + 3  # manifest, report, sources


def test_pairs_of_something_else_are_refused(config, shared_components, prompts) -> None:
    settings = config()
    prepare.make_pairs(settings)
    for change, message in (
        (
            {"regression__num_pairs": 6},
            r"pairs' was prepared with regression.num_pairs 5, but .* 6",
        ),
        ({"distribution_matching__guidance": 3.0}, r"with distribution_matching.guidance 2.0, but"),
        ({"regression__teacher_steps": 3}, r"regression.teacher_steps 2, .* run dmd2 pairs"),
        ({"training__seed": 1}, r"training.seed 0"),
    ):
        with pytest.raises(ValueError, match=message):
            load_training_data(config(**change), shared_components)
        with pytest.raises(ValueError, match=message):
            prepare.make_pairs(config(**change))
    assert changed_sources(settings, PAIRS) is None
    os.utime(prompts, ns=(1, 1))
    message = r"regression.pairs .* is older than data.prompts: .* dmd2 pairs found them \(1 chan"
    assert re.match(message, changed_sources(settings, PAIRS) or "")
    shard = Path(settings.regression.pairs) / "pairs-000001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"000001.safetensors is missing or damaged; run dmd2 pai"):
        load_training_data(settings, shared_components)


def test_each_pass_shows_every_pair_once_with_its_own_noise_and_caption(
    config, shared_components
) -> None:
    for text in ("cached", "online"):
        settings = config(data__text=text, regression__pairs=Path(config().regression.pairs) / text)
        prepare.make_pairs(settings)
        data = load_training_data(settings, shared_components)
        rows, captions = all_pairs(data), data.pairs.captions(range(5))
        assert ("hidden" in rows) == (text == "cached")
        batch = data.pair_batch(first=10, size=5, seed=3)
        places = [
            int((rows["noise"] - noise).abs().flatten(1).amax(1).argmin()) for noise in batch.noise
        ]
        assert sorted(places) == list(range(5))
        assert torch.equal(batch.noise, rows["noise"][places])
        assert torch.equal(batch.latents, rows["latents"][places])
        told = encode_captions(shared_components, [captions[place] for place in places], 128)
        torch.testing.assert_close(batch.condition.hidden, told.hidden, rtol=2e-3, atol=2e-3)
        assert torch.equal(batch.condition.time_ids, told.time_ids)
        part = data.pair_batch(first=12, size=2, seed=3)
        assert torch.equal(part.noise, batch.noise[2:4])


def test_the_command_and_what_it_refuses(config, prompts, tmp_path, capsys) -> None:
    argv = ["pairs", "--preset", "demo", "--data.prompts", str(prompts), "--sampling.steps", "1"]
    argv += ["--regression.num_pairs", "3", "--regression.teacher_steps", "1"]
    argv += ["--regression.pairs", str(tmp_path / "pairs")]
    assert cli.main(argv) == 2
    assert "no effect, because regression.warmup_iterations is 0" in capsys.readouterr().err
    argv += ["--regression.warmup_iterations", "2"]
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["pairs: 3", "  128x128: 3", str(tmp_path / "pairs" / "report.json")]
    with pytest.raises(ValueError, match=r"There are no pairs to make"):
        prepare.make_pairs(demo_config(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"is '.*gone', which does not exist; run dmd2 pairs"):
        check_inputs(config(regression__pairs=tmp_path / "gone"), warm=True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"regression.pairs is .* not empty and no cache"):
        prepare.make_pairs(config(regression__pairs=tmp_path / "thesis"))
