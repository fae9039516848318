"""What a model file says about its own prediction type, and what follows from it.

A file may say it in several places: empty tensors (the ComfyUI habit), safetensors metadata, a
diffusers scheduler config. A file that says nothing is an epsilon model, as it always was. Single
files of flow models say nothing, or are called epsilon by the tool that wrote them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from dmd2_core import Prediction, SteppedSchedule, VPSchedule

PredictionChoice = Literal["auto", "epsilon", "v", "v-zero-snr", "flow"]
"""What `model.prediction` may be; "auto": what the file says."""

V_TENSOR, ZERO_SNR_TENSOR = "v_pred", "ztsnr"
_METADATA_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
_SPELLINGS = {
    "v_prediction": "v",
    "v-prediction": "v",
    "vpred": "v",
    "eps": "epsilon",
    "flow_prediction": "flow",
}
_CHOSEN = {"epsilon": "epsilon", "v": "v", "v-zero-snr": "v", "flow": "flow"}
_V_IN_NAME = re.compile(r"(?<![a-z])v[-_ ]?pred", re.IGNORECASE)
_FLOW_IN_NAME = re.compile(r"(?<![a-z])rectified[-_ ]?flow", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Statement:
    """One place in a file and what it says; None where it says nothing."""

    source: str
    prediction: str | None = None
    zero_snr: bool | None = None


def statements_of_file(names: Collection[str], metadata: Mapping[str, str]) -> list[Statement]:
    """What the tensors' names and the metadata of a single file say."""
    statements = []
    if V_TENSOR in names:
        statements.append(Statement(source=f"its tensor {V_TENSOR}", prediction="v"))
        if ZERO_SNR_TENSOR in names:
            statements.append(Statement(source=f"its tensor {ZERO_SNR_TENSOR}", zero_snr=True))
    for key in _METADATA_KEYS:
        if metadata.get(key):
            said = metadata[key].strip().lower()
            statements.append(
                Statement(source=f"its metadata {key}", prediction=_SPELLINGS.get(said, said))
            )
    return statements


def statements_of_scheduler(config: Mapping[str, Any]) -> list[Statement]:
    """What a diffusers scheduler_config.json says."""
    statements = []
    if is_flow_scheduler(config):
        statements.append(
            Statement(
                source="_class_name in scheduler/scheduler_config.json",
                prediction="flow",
            )
        )
    if config.get("prediction_type") is not None:
        said = str(config["prediction_type"])
        statements.append(
            Statement(
                source="prediction_type in scheduler/scheduler_config.json",
                prediction=_SPELLINGS.get(said, said),
            )
        )
    if config.get("rescale_betas_zero_snr") is not None:
        statements.append(
            Statement(
                source="rescale_betas_zero_snr in scheduler/scheduler_config.json",
                zero_snr=bool(config["rescale_betas_zero_snr"]),
            )
        )
    return statements


def is_flow_scheduler(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler_config.json is of one of diffusers' flow matching schedulers."""
    return str(config.get("_class_name")).startswith("FlowMatch")


def resolve(
    path: Path, statements: Iterable[Statement], wanted: PredictionChoice
) -> tuple[Prediction, VPSchedule | SteppedSchedule]:
    """What the network predicts and on which schedule.

    An explicit choice fills in what the file leaves open and decides where the file contradicts
    itself; against all that the file says it is refused.
    """
    statements = list(statements)
    if wanted == "auto":
        prediction, zero_snr = _as_the_file_says(path, statements)
    else:
        prediction, zero_snr = _CHOSEN[wanted], wanted == "v-zero-snr"
        _refuse_contradiction(path, statements, prediction, zero_snr, wanted)
    if prediction not in get_args(Prediction):
        raise ValueError(
            f"{path} is a model of prediction type {prediction!r}, which cannot be distilled here: "
            "give one that predicts epsilon, v, sample or flow"
        )
    if prediction == "flow":
        return "flow", SteppedSchedule.flow()
    if zero_snr and prediction == "epsilon":
        raise ValueError(
            f"{path} says zero terminal SNR for a model that predicts epsilon, which is impossible "
            '(pure noise would tell nothing): set model.prediction to "v-zero-snr" or mend the file'
        )
    schedule = VPSchedule.sdxl()  # SD1.5's is the same
    return cast(Prediction, prediction), schedule.zero_terminal_snr() if zero_snr else schedule


def _as_the_file_says(path: Path, statements: list[Statement]) -> tuple[str, bool]:
    predictions = {s.prediction: s.source for s in statements if s.prediction is not None}
    zero_snr = {s.zero_snr: s.source for s in statements if s.zero_snr is not None}
    if len(predictions) > 1:
        said = " but ".join(f"{source} says {what}" for what, source in predictions.items())
        raise ValueError(
            f"{path} contradicts itself, {said}: "
            'set model.prediction to "epsilon", "v", "v-zero-snr" or "flow"'
        )
    if not predictions and _V_IN_NAME.search(path.name):
        raise ValueError(
            f"{path} is called a v-prediction model, but nothing in it says so: "
            'set model.prediction to "v-zero-snr", "v" or "epsilon"'
        )
    if set(predictions) <= {"epsilon"} and _FLOW_IN_NAME.search(path.name):
        raise ValueError(
            f"{path} is called a rectified flow model, but nothing in it says so: "
            'set model.prediction to "flow" or "epsilon"'
        )
    return next(iter(predictions), "epsilon"), next(iter(zero_snr), False)


def _refuse_contradiction(
    path: Path,
    statements: list[Statement],
    prediction: str,
    zero_snr: bool,
    wanted: PredictionChoice,
) -> None:
    predictions = {s.prediction: s.source for s in statements if s.prediction is not None}
    if prediction == "flow" and predictions.get("epsilon", "").startswith("its metadata"):
        del predictions["epsilon"]  # sd-scripts writes that for all but v
    snrs = {s.zero_snr: s.source for s in statements if s.zero_snr is not None}
    against: tuple[str, str] | None = None
    if predictions and prediction not in predictions:
        said, source = next(iter(predictions.items()))
        against = source, str(said)
    elif snrs and zero_snr not in snrs:
        said_snr, source = next(iter(snrs.items()))
        against = source, f"{'' if said_snr else 'no '}zero terminal SNR"
    if against:
        raise ValueError(
            f'model.prediction is "{wanted}", but {path} says {against[1]} ({against[0]}): '
            'set it to "auto", or mend the file if that is wrong'
        )
