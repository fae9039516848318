"""ComfyUI's page in the tests' browser: start it, open workflows, run them, look at nodes."""

from __future__ import annotations

import json
from typing import Any

from browser import Page
from comfy_server import ComfyServer

SETTINGS = {
    "Comfy.TutorialCompleted": True,  # else the templates open at the first start
    "Comfy.Release.Status": "what's new seen",
    "Comfy.Queue.QPOV2": True,
}
READY = "window.dmd2App?.canvas?.graph"
IGNORED = (
    "/api/userdata/user.css",  # optional files that the page asks for and does not find
    "/user.css",
    "favicon",
)


def start(page: Page, server: ComfyServer, *, locale: str = "en", nodes_2: bool = False) -> None:
    """Open ComfyUI's page and wait until its nodes are registered."""
    settings = SETTINGS | {"Comfy.Locale": locale, "Comfy.VueNodes.Enabled": nodes_2}
    server.post("/settings", settings)
    page.open(f"http://127.0.0.1:{server.port}/")
    page.wait_for("document.querySelector('canvas') && document.readyState === 'complete'")
    page.run("import('/scripts/app.js').then((m) => { window.dmd2App = m.app })")
    page.wait_for(READY)
    page.wait_for("window.LiteGraph?.registered_node_types?.DMD2_Scheduler")


def problems(page: Page) -> list[str]:
    """What the page has reported since the last call."""
    found = [text for text in page.problems if not any(part in text for part in IGNORED)]
    page.problems.clear()
    return found


def open_workflow(page: Page, workflow: dict[str, Any], name: str) -> None:
    """Load a workflow file and show all of it."""
    data = json.dumps(workflow)
    page.run(f"dmd2App.loadGraphData({data}, true, true, {json.dumps(name)})")
    page.wait_for(f"dmd2App.canvas.graph.nodes.length === {len(workflow['nodes'])}", seconds=8)
    show_all(page)


def show_all(page: Page) -> None:
    """Fit the graph into the window; two frames later everything is drawn."""
    page.run("""(async () => {
        const command = dmd2App.extensionManager.command
        await command.execute('Comfy.Canvas.FitView')
        await new Promise((resolve) => setTimeout(resolve, 500))
        dmd2App.canvas.draw(true, true)
        await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))
    })()""")


def prompt_of(page: Page) -> dict[str, Any]:
    """The API-format prompt that the page makes of the open workflow."""
    return page.run("dmd2App.graphToPrompt().then((prompt) => prompt.output)")


def missing_nodes(page: Page) -> list[str]:
    """Types in the open workflow that the page does not know."""
    return page.run(
        "dmd2App.canvas.graph.nodes.filter((n) => !LiteGraph.registered_node_types[n.type] "
        "&& n.type !== 'MarkdownNote').map((n) => n.type)"
    )
