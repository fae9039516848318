"""What a distilled LoRA says about itself: how to sample with it and how it was made.

Stored as JSON under one key of the file's safetensors metadata. Metadata comes from strangers:
whatever it holds, reading it gives a checked Recipe, None or a ValueError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from .few_step import StepPlan, Timestep, check_strength, is_real
from .prediction import Prediction, check_prediction
from .schedule import NUM_TIMESTEPS
from .step_range import StepCounts, check_step_counts, is_within

RECIPE_KEY = "dmd2.recipe"
VERSION_KEY = "dmd2.recipe_version"
STEPS_KEY = "dmd2.trained_steps"
"""`trained_steps` as JSON, beside the recipe: readers that know no such thing refuse unknown keys
within it, and do well with `timesteps` alone."""
MERGED_KEY = "dmd2.merged"
"""In a checkpoint: which LoRA was baked into it, as JSON."""
VERSION = "1"
_MAX_CHARACTERS = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything a sampler needs to know, so that nobody looks up settings."""

    timesteps: tuple[Timestep, ...]
    """The steps the student was trained on, descending: 999, 749, 499, 249."""
    trained_steps: StepCounts | None = None
    """The fewest and the most steps, evenly spaced, that it was trained for, where `timesteps` are
    its usual ones among others; None: `timesteps` alone."""
    conditioning_timestep: Timestep | None = None
    """What the network is told at the first step; 399 for a one-step student."""
    prediction: Prediction = "epsilon"
    """What the base model outputs."""
    zero_terminal_snr: bool = False
    """Whether the base model's schedule has alpha_999 = 0."""
    strength: float | tuple[float, ...] = 1.0
    """Share of fresh noise per re-injection, 1 (DMD2) to 0 (deterministic)."""
    guidance: float = 1.0
    """Guidance scale at inference; 1 (none) because the teacher's is baked in."""
    teacher_guidance: float | None = None
    """The teacher's guidance scale in training."""
    lora_rank: int | None = None
    lora_alpha: float | None = None
    base_model: str | None = None
    """Name of the base model, one line for people to read."""
    base_model_hash: str | None = None
    """Hash of the base model's weights."""
    trained_with: Mapping[str, Any] | None = None
    """Training settings, anything JSON can hold."""

    def __post_init__(self) -> None:
        for field in ("timesteps", "strength"):
            if isinstance(getattr(self, field), list):
                object.__setattr__(self, field, tuple(getattr(self, field)))
        if not isinstance(self.timesteps, tuple) or len(self.timesteps) > NUM_TIMESTEPS:
            raise ValueError(
                f"timesteps must be a list of at most {NUM_TIMESTEPS} numbers, "
                f"got {_short(self.timesteps)}: give steps such as [999, 749, 499, 249]"
            )
        self.plan()
        if not isinstance(self.strength, int | float | tuple):
            raise ValueError(
                f"strength is {_short(self.strength)}: use one number, or a list of them"
            )
        check_strength(self.strength, num=len(self.timesteps) - 1)
        self._check_trained_steps()
        check_prediction(self.prediction)
        if type(self.zero_terminal_snr) is not bool:
            raise ValueError(
                f"zero_terminal_snr is {_short(self.zero_terminal_snr)}: use true or false"
            )
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError(
                "zero_terminal_snr does not go with prediction 'epsilon', which gives no x0 at "
                "zero SNR: use 'v', or set zero_terminal_snr to false"
            )
        _check_number("guidance", self.guidance, low=0.0, high=100.0)
        if self.teacher_guidance is not None:
            _check_number("teacher_guidance", self.teacher_guidance, low=0.0, high=100.0)
        if self.lora_rank is not None:
            _check_number("lora_rank", self.lora_rank, low=1, high=1 << 16, integer=True)
        if self.lora_alpha is not None:
            _check_number("lora_alpha", self.lora_alpha, low=1e-6, high=1e6)
        if self.base_model is not None:
            _check_text("base_model", self.base_model, r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]{1,200}")
        if self.base_model_hash is not None:
            _check_text("base_model_hash", self.base_model_hash, r"[0-9A-Za-z:_-]{1,128}")
        if self.trained_with is not None:
            object.__setattr__(self, "trained_with", _plain_json(self.trained_with))

    def _check_trained_steps(self) -> None:
        if self.trained_steps is None:
            return
        counts = check_step_counts("trained_steps", self.trained_steps)
        object.__setattr__(self, "trained_steps", counts)
        if not is_within(self.timesteps, counts) or self.conditioning_timestep is not None:
            raise ValueError(
                f"trained_steps is {list(counts)}, which does not go with timesteps "
                f"{_short(self.timesteps)} and conditioning timestep {self.conditioning_timestep}: "
                "give evenly spaced timesteps of such a number alone, or leave trained_steps out"
            )
        if not isinstance(self.strength, int | float):
            raise ValueError(
                f"trained_steps is {list(counts)}, but strength lists one for each step of "
                f"{len(self.timesteps)}: give one number"
            )

    def knows(self, timesteps: Sequence[Timestep]) -> bool:
        """Whether the student was trained at these timesteps, or at more with these among them."""
        if set(timesteps) <= set(self.timesteps):
            return True
        return self.trained_steps is not None and is_within(timesteps, self.trained_steps)

    def plan(self, start: int = 0) -> StepPlan:
        """The steps to take; from step `start` on for image-to-image."""
        return StepPlan(
            timesteps=self.timesteps,
            conditioning_timestep=self.conditioning_timestep,
            start=start,
        )

    def to_metadata(self) -> dict[str, str]:
        """The recipe as safetensors metadata; equal recipes give equal bytes."""
        fields_told = asdict(self)
        counts = fields_told.pop("trained_steps")
        text = json.dumps(fields_told, sort_keys=True, separators=(",", ":"), allow_nan=False)
        if len(text) > _MAX_CHARACTERS:
            raise ValueError(
                f"the recipe has {len(text)} characters, more than {_MAX_CHARACTERS}: "
                "put less into trained_with"
            )
        beside = {} if counts is None else {STEPS_KEY: json.dumps(counts)}
        return {RECIPE_KEY: text, VERSION_KEY: VERSION} | beside

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str] | None) -> Recipe | None:
        """The recipe in a file's metadata, None if there is none, ValueError if it is damaged."""
        if not metadata or RECIPE_KEY not in metadata:
            return None
        version = metadata.get(VERSION_KEY)
        if version != VERSION:
            raise ValueError(
                f"the LoRA's recipe has version {_short(version)}, this program reads {VERSION!r}: "
                "update it, or set up the sampler by hand"
            )
        try:
            told = _parse(metadata[RECIPE_KEY])
            if STEPS_KEY in metadata:
                told["trained_steps"] = _json(metadata[STEPS_KEY])
            return cls(**told)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"the LoRA's recipe is damaged ({error}): "
                "export the LoRA again, or set up the sampler by hand"
            ) from error


def _parse(text: object) -> dict[str, Any]:
    """The JSON object in `text`, with exactly the keys that a recipe has there."""
    data = _json(text)
    if not (isinstance(data, dict) and "timesteps" in data):
        raise ValueError(f"it is {_short(data)}, not a JSON object with timesteps")
    known = {field.name for field in fields(Recipe)} - {"trained_steps"}
    unknown = sorted(set(data) - known)
    if unknown:
        raise ValueError(f"it has the unknown key {_short(unknown[0])}")
    return data


def _json(text: object) -> Any:
    if not isinstance(text, str) or len(text) > _MAX_CHARACTERS:
        raise ValueError(f"it is not a text of at most {_MAX_CHARACTERS} characters")
    return json.loads(text)


def _short(value: object) -> str:
    """`value` for a message: one line, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_number(
    field: str, value: object, *, low: float, high: float, integer: bool = False
) -> None:
    right_kind = type(value) is int if integer else is_real(value)
    if not right_kind or not low <= value <= high:  # type: ignore[operator]
        kind = "an integer" if integer else "a number"
        raise ValueError(f"{field} is {_short(value)}: use {kind} from {low:g} to {high:g}")


def _check_text(field: str, value: object, pattern: str) -> None:
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        raise ValueError(f"{field} is {_short(value)}: use one short line of plain text")


def _plain_json(settings: object) -> dict[str, Any]:
    """A copy of `settings` made of what JSON gives back (lists, not tuples)."""
    if not isinstance(settings, Mapping) or not all(isinstance(key, str) for key in settings):
        raise ValueError(f"trained_with is {_short(settings)}: use a dictionary with text keys")
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(settings), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"trained_with is not JSON ({error}): use plain finite values") from error
    return plain
