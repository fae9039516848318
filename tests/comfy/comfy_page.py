"""ComfyUI's page in the tests' browser: start it, open workflows, run them, look at nodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from browser import Page
from comfy_server import ComfyServer

SETTINGS = {
    "Comfy.TutorialCompleted": True,  # else the templates open at the first start
    "Comfy.Release.Status": "what's new seen",
    "Comfy.Minimap.Visible": False,
}
IGNORED = (
    "Content Security Policy",  # the page's own first graph asks for its models' sizes
    "graph accessed before initialization",  # by the page's own code, at its start
    "/api/userdata",  # files of the user that a new one does not have
    "/user.css",
    "favicon",
)
MARGIN_PX = 40


def start(page: Page, server: ComfyServer, *, locale: str = "en", nodes_2: bool = False) -> None:
    """Open ComfyUI's page and wait until it has shown its own first graph."""
    settings = SETTINGS | {"Comfy.Locale": locale, "Comfy.VueNodes.Enabled": nodes_2}
    server.post("/settings", settings)
    page.open(f"http://127.0.0.1:{server.port}/")
    page.wait_for("document.querySelector('canvas') && document.readyState === 'complete'")
    page.wait_for("window.LiteGraph?.registered_node_types?.DMD2_Scheduler")
    page.run(
        "Promise.all([import('/scripts/app.js'), import('/scripts/api.js')])"
        ".then(([app, api]) => { window.dmd2 = {app: app.app, api: api.api} })"
    )
    page.wait_for("dmd2.app.canvas?.graph?.nodes.length > 0")
    _hide_bars(page)


def problems(page: Page) -> list[str]:
    """What the page has reported since the last call."""
    found = [text for text in page.problems if not any(part in text for part in IGNORED)]
    page.problems.clear()
    return found


def open_workflow(page: Page, workflow: dict[str, Any], name: str) -> None:
    """Load a workflow file."""
    page.run(f"dmd2.app.loadGraphData({json.dumps(workflow)}, true, true, {json.dumps(name)})")
    page.wait_for(f"dmd2.app.canvas.graph.nodes.length === {len(workflow['nodes'])}")


def run_workflow(page: Page) -> None:
    """Queue the open workflow and wait for its pictures; RuntimeError with a node's message."""
    page.run("""new Promise((resolve, reject) => {
        const fail = (event) => reject(new Error(event.detail.exception_message))
        dmd2.api.addEventListener('execution_success', resolve, { once: true })
        dmd2.api.addEventListener('execution_error', fail, { once: true })
        dmd2.app.queuePrompt(0, 1).then((queued) => queued || reject(new Error('refused')))
    }).then(() => null)""")
    page.wait_for(
        "dmd2.app.canvas.graph.nodes.filter((node) => node.type === 'SaveImage')"
        ".every((node) => node.imgs?.length && node.imgs.every((image) => image.complete))"
    )


def photograph(page: Page, file: Path) -> None:
    """A PNG of the open graph alone: scaled to the window, without the page's bars."""
    box = page.run(f"""(async () => {{
        const canvas = dmd2.app.canvas
        const boxes = canvas.graph.nodes.map((node) => node.getBounding())
        const left = Math.min(...boxes.map((box) => box[0]))
        const top = Math.min(...boxes.map((box) => box[1]))
        const right = Math.max(...boxes.map((box) => box[0] + box[2]))
        const bottom = Math.max(...boxes.map((box) => box[1] + box[3]))
        const area = canvas.canvas.getBoundingClientRect()
        const [width, height] = [right - left, bottom - top]
        const room = 2 * {MARGIN_PX}
        const scale = Math.min((area.width - room) / width, (area.height - room) / height, 1)
        canvas.ds.scale = scale
        canvas.ds.offset = [{MARGIN_PX} / scale - left, {MARGIN_PX} / scale - top]
        canvas.draw(true, true)
        const frame = () => new Promise((done) => requestAnimationFrame(done))
        for (let i = 0; i < 4; i++) await frame()
        return {{x: area.x, y: area.y, width: width * scale + room, height: height * scale + room}}
    }})()""")
    page.screenshot(file, clip=box)


def _hide_bars(page: Page) -> None:
    """Leave nothing of the page but the graph, for `photograph`."""
    page.run("""(() => {
        const style = document.createElement('style')
        style.textContent = `
            .z-999, .p-toast, .comfyui-body-top, .comfyui-body-left { opacity: 0 !important }`
        document.head.append(style)
        dmd2.app.canvas.show_info = false
    })()""")


def prompt_of(page: Page) -> dict[str, Any]:
    """The API-format prompt that the page makes of the open workflow."""
    return page.run("dmd2.app.graphToPrompt().then((prompt) => prompt.output)")


def missing_nodes(page: Page) -> list[str]:
    """Types in the open workflow that the page does not know."""
    return page.run(
        "dmd2.app.canvas.graph.nodes.filter((n) => !LiteGraph.registered_node_types[n.type])"
        ".map((n) => n.type)"
    )
