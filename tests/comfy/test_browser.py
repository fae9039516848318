"""The pack in ComfyUI's own page: a headless Chromium opens what users open.

Pictures of what it saw are left in screenshots/ (not part of the repository).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import comfy_page
import graphs
import model_files
import pytest
import tiny_workflow
import torch
import workflow_set
from base_folder import REPOSITORY
from browser import Page
from comfy_server import ComfyServer
from test_workflow_files import SUBGRAPH, TINY_NAMES, WORKFLOWS
from tiny_pictures import write_pictures

from dmd2_core import VPSchedule

SCREENSHOTS = REPOSITORY / "screenshots"
PAGE_PX = (1760, 1000)
NAMES = sorted(workflow_set.WORKFLOWS)
CHARTS = ("DMD2_Scheduler", "DMD2_Sample")
CHART_OF = "dmd2.app.canvas.graph.nodes.find((n) => n.type === '{}')"


@pytest.fixture(scope="module")
def page(
    server: ComfyServer, model: model_files.TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Page]:
    """One browser for all tests here, with ComfyUI's page in English."""
    SCREENSHOTS.mkdir(exist_ok=True)
    write_pictures(server.base / "input")
    opened = Page(tmp_path_factory.mktemp("browser") / "profile", *PAGE_PX)
    try:
        comfy_page.start(opened, server)
        assert comfy_page.problems(opened) == []
        yield opened
    finally:
        opened.close()


@pytest.fixture(scope="module")
def object_info(server: ComfyServer) -> dict[str, Any]:
    return server.get("/object_info")


def opened(page: Page, name: str, object_info: dict[str, Any]) -> dict[str, Any]:
    """Open a shipped workflow as the tiny model can run it."""
    small = tiny_workflow.tiny(WORKFLOWS / f"{name}.json", object_info, TINY_NAMES)
    comfy_page.open_workflow(page, small, name)
    return small


def caption(page: Page, node: str) -> str:
    """The words above a node's chart."""
    return page.run(
        f"{CHART_OF.format(node)}.widgets.find((w) => w.name === 'plan_chart')"
        ".element.querySelector('.dmd2-plan-caption').textContent"
    )


def bars(page: Page, node: str, kind: str = "step") -> list[str]:
    """What the bars of a node's chart say: those that run, or those "left-out"."""
    return page.run(
        f"[...{CHART_OF.format(node)}.widgets.find((w) => w.name === 'plan_chart')"
        f".element.querySelectorAll('.dmd2-plan-{kind}')].map((bar) => bar.textContent)"
    )


def set_widgets(page: Page, node: str, **values: Any) -> None:
    """Set widgets as the page does when a user changes them."""
    page.run(f"""{{
        const node = {CHART_OF.format(node)}
        for (const [name, value] of Object.entries({json.dumps(values)})) {{
            const widget = node.widgets.find((one) => one.name === name)
            widget.value = value
            widget.callback?.(value, dmd2.app.canvas, node)
        }}
    }}""")


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_opens(name: str, page: Page, object_info: dict[str, Any]) -> None:
    small = opened(page, name, object_info)
    assert comfy_page.missing_nodes(page) == []
    prompt = comfy_page.prompt_of(page)
    for node in prompt.values():
        node.pop("_meta")
    assert prompt == graphs.api_format(small, object_info)
    shown = page.run(
        "dmd2.app.canvas.graph.nodes.filter((node) => node.widgets?.some("
        "(widget) => widget.name === 'plan_chart' && widget.element.querySelector('rect')))"
        ".map((node) => node.type)"
    )
    with_charts = [node["type"] for node in small["nodes"] if node["type"] in CHARTS]
    assert sorted(shown) == sorted(with_charts)
    comfy_page.photograph(page, SCREENSHOTS / f"{name}.png")
    assert comfy_page.problems(page) == []


def test_a_file_saved_by_the_page_is_the_one_that_was_opened(
    page: Page, object_info: dict[str, Any]
) -> None:
    """Widgets' values survive: the chart adds none."""
    small = opened(page, "dmd2_4step", object_info)
    saved = page.run("dmd2.app.canvas.graph.serialize()")
    values = {node["id"]: node.get("widgets_values", []) for node in saved["nodes"]}
    assert values == {node["id"]: node["widgets_values"] for node in small["nodes"]}


def test_the_chart_follows_the_widgets(page: Page, object_info: dict[str, Any]) -> None:
    opened(page, "dmd2_4step", object_info)
    node = "DMD2_Scheduler"
    assert caption(page, node) == "4 steps · the recipe may differ"
    set_widgets(page, node, steps=3)
    assert caption(page, node) == "3 steps"
    assert [bar.split(",")[0] for bar in bars(page, node)] == [
        "timestep 999",
        "timestep 666",
        "timestep 333",
    ]
    set_widgets(page, node, steps=4, denoise=0.5)
    assert caption(page, node) == "2 of 4 steps · from 499"
    assert bars(page, node) == ["timestep 499, noise 1.61", "timestep 249, noise 0.693"]
    assert bars(page, node, "left-out") == [
        "timestep 999, noise 14.6 (left out)",
        "timestep 749, noise 4.08 (left out)",
    ]
    set_widgets(page, node, steps=0, timesteps="499, 749", denoise=1)
    assert caption(page, node) == "timesteps must descend"
    assert bars(page, node) == []
    set_widgets(page, node, timesteps="", denoise=0)
    assert caption(page, node) == "no step runs"
    page.run(f"""{{
        const node = {CHART_OF.format(node)}
        const number = LiteGraph.createNode('PrimitiveInt')
        dmd2.app.canvas.graph.add(number)
        number.connect(0, node, node.inputs.findIndex((input) => input.widget?.name === 'steps'))
    }}""")
    assert caption(page, node) == "set by a connection: shown after a run"
    assert bars(page, node) == []
    assert comfy_page.problems(page) == []


def test_after_a_run_the_chart_shows_what_ran(page: Page, object_info: dict[str, Any]) -> None:
    """The one-step LoRA's recipe, which the page cannot know before."""
    opened(page, "dmd2_1step", object_info)
    set_widgets(page, "DMD2_LoadLoRA", strength=0.99)  # what ComfyUI has cached says nothing
    comfy_page.run_workflow(page)
    node = "DMD2_Scheduler"
    assert caption(page, node) == "1 step · told 399 · as the recipe says"
    assert bars(page, node) == ["timestep 999, noise 1.16"]
    report = page.run(
        f"{CHART_OF.format('DMD2_LoadLoRA')}.widgets.find((w) => w.name === 'report_text')"
        ".element.textContent"
    )
    assert "modules applied at strength 0.99." in report
    saved = page.run("dmd2.app.canvas.graph.serialize()")
    values = {node["type"]: node.get("widgets_values") for node in saved["nodes"]}
    assert values["DMD2_LoadLoRA"] == [model_files.ONE_STEP_LORA, 0.99, "from the file"]
    comfy_page.photograph(page, SCREENSHOTS / "after_a_run.png")
    set_widgets(page, node, steps=2)
    assert caption(page, node) == "2 steps"
    assert comfy_page.problems(page) == []


def settings_cases() -> list[dict[str, Any]]:
    steps, amounts = range(17), (0.0, 0.01, 0.124, 0.125, 0.3, 0.375, 0.5, 0.625, 0.7, 0.99, 1.0)
    evenly = [{"steps": s, "denoise": d} for s, d in itertools.product(steps, amounts)]
    lists = (
        *("999, 749, 499, 249", "999;500 120", " 10 ", "0", "999,998", "999 , 759 , 499 , 259"),
        *("499, 749", "999, 999", "1000", "-1", "+5, 3", "four", "9.5", "1,,2", ",", "1e2", "5,"),
    )
    listed = [
        {"steps": s, "timesteps": text, "denoise": d}
        for text, s, d in itertools.product(lists, (0, 1, 4), (1.0, 0.6))
    ]
    return evenly + listed


def test_the_page_plans_what_python_plans(page: Page, pack: Callable[[str], ModuleType]) -> None:
    settings = pack("nodes.settings")
    cases = settings_cases()
    planned = page.run(
        "import('/extensions/dmd2/plan.mjs')"
        f".then((plan) => {json.dumps(cases)}.map((one) => plan.planOf(one)))"
    )
    num_right = 0
    for case, found in zip(cases, planned, strict=True):
        values = {"timesteps": "", **case}
        try:
            plan = settings.step_plan(
                **values | {"denoise": case["denoise"] or 1.0},
                recipe=None,
                conditioning_timestep=None,
            )
        except ValueError:
            assert "error" in found, (case, found)
            continue
        num_right += 1
        assert found["timesteps"] == list(plan.timesteps), case
        start = plan.start if case["denoise"] else len(plan.timesteps)
        assert found["start"] == start, case
    assert 200 < num_right < len(cases)


def test_the_page_knows_sdxls_noise_levels(page: Page) -> None:
    found = page.run("import('/extensions/dmd2/plan.mjs').then((plan) => plan.noiseLevels())")
    expected = VPSchedule.sdxl().k_sigma(torch.arange(1000))
    assert found == pytest.approx(expected.tolist(), rel=1e-5)


def test_the_blueprint_is_one_node_that_runs(
    page: Page, server: ComfyServer, object_info: dict[str, Any]
) -> None:
    small = tiny_workflow.tiny(SUBGRAPH, object_info, TINY_NAMES)
    comfy_page.open_workflow(page, small, "blueprint")
    [widgets] = page.run(
        "dmd2.app.canvas.graph.nodes.map((node) => node.widgets.map((widget) => widget.value))"
    )
    assert tiny_workflow.CAPTION in widgets
    assert graphs.CHECKPOINT in widgets
    comfy_page.photograph(page, SCREENSHOTS / "blueprint.png")
    prompt = comfy_page.prompt_of(page)
    [decode] = [key for key, node in prompt.items() if node["class_type"] == "VAEDecode"]
    save = {"images": [decode, 0], "filename_prefix": "blueprint"}
    run = server.run(prompt | {"save": {"class_type": "SaveImage", "inputs": save}})
    assert run.error is None, f"{run.failed_node}: {run.error}"
    assert len(run.outputs["save"]["images"]) == 1
    assert comfy_page.problems(page) == []


def test_nodes_2_shows_the_chart(
    page: Page, server: ComfyServer, object_info: dict[str, Any]
) -> None:
    comfy_page.start(page, server, nodes_2=True)
    opened(page, "dmd2_text_to_image", object_info)
    page.wait_for("document.querySelector('.lg-node .dmd2-plan svg')?.clientHeight > 50")
    set_widgets(page, "DMD2_Sample", steps=2)
    assert caption(page, "DMD2_Sample") == "2 steps"
    page.wait_for("document.querySelectorAll('.lg-node textarea, .lg-node input').length > 5")
    comfy_page.photograph(page, SCREENSHOTS / "nodes_2.png")
    assert comfy_page.problems(page) == []


def test_the_page_in_chinese(page: Page, server: ComfyServer, object_info: dict[str, Any]) -> None:
    comfy_page.start(page, server, locale="zh")
    opened(page, "dmd2_4step", object_info)
    title = page.run(f"{CHART_OF.format('DMD2_Scheduler')}.title")
    assert title == "DMD2 调度器"
    assert caption(page, "DMD2_Scheduler") == "4 步 · 以配方为准"
    comfy_page.photograph(page, SCREENSHOTS / "chinese.png")
    assert comfy_page.problems(page) == []
