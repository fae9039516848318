"""What the chart in a node draws after a run (web/chart.mjs): the plan as the model saw it."""

from __future__ import annotations

from typing import Any

from ..dmd2_core import StepPlan

KEY = "dmd2_plan"
"""Of the node's `ui` dictionary."""


def plan_ui(text: str, plan: StepPlan, model_sampling: Any) -> dict[str, tuple[Any, ...]]:
    """A node's `ui`: `text` in the form of ComfyUI's Preview as Text, and the plan for the chart.

    `levels` are ComfyUI's sigmas of what the network is told at each step. A plain dictionary, as
    0.3.48 takes it too.
    """
    told = [plan.told(index) for index in range(len(plan.timesteps))]
    levels = [float(model_sampling.sigmas[step]) for step in told]
    view = {"timesteps": list(plan.timesteps), "start": plan.start, "told": told, "levels": levels}
    return {"text": (text,), KEY: (view,)}
