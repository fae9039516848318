// Shows in the Scheduler and Sample nodes which timesteps they will run, and in nodes that have
// something to say what they said.

import { app } from '/scripts/app.js'
import { HEIGHT_PX, drawPlan } from './chart.mjs'
import { planOf } from './plan.mjs'
import { showReport } from './report.mjs'

const WITH_CHART = ['DMD2_Scheduler', 'DMD2_Sample']
const WITH_REPORT = ['DMD2_LoadLoRA', 'DMD2_Sample', 'DMD2_KSamplerPatch', 'DMD2_MergeCheck']
const WIDGETS = ['steps', 'timesteps', 'denoise']
const CHART = 'plan_chart'

function isLinked(node, name) {
  return node.inputs?.some((input) => input.widget?.name === name && input.link != null)
}

function planOfNode(node) {
  if (WIDGETS.some((name) => isLinked(node, name))) return { linked: true }
  const widgets = (node.widgets ?? []).filter((widget) => WIDGETS.includes(widget.name))
  return planOf(Object.fromEntries(widgets.map((widget) => [widget.name, widget.value])))
}

/** After a run the node says what really ran, with the recipe's steps and the model's levels. */
function planThatRan(node, output) {
  const said = output?.dmd2_plan?.[0]
  if (!said) return null
  const planned = planOfNode(node)
  return { ...said, recipe: Boolean(planned.assumed), assumed: false }
}

function chain(target, name, then) {
  const before = target[name]
  target[name] = function (...values) {
    const result = before?.apply(this, values)
    then.apply(this, values)
    return result
  }
}

function addChart(node) {
  const box = document.createElement('div')
  box.className = 'dmd2-plan'
  box.style.cssText = `width:100%;height:${HEIGHT_PX}px;min-height:${HEIGHT_PX}px;overflow:hidden`
  const height = () => HEIGHT_PX
  const widget = node.addDOMWidget(CHART, 'dmd2_plan', box, {
    serialize: false, // not in the prompt
    hideOnZoom: false,
    getMinHeight: height,
    getMaxHeight: height,
    getValue: () => '',
    setValue: () => {}
  })
  widget.serialize = false // not in the file

  let plan = planOfNode(node)
  const draw = () => drawPlan(box, plan, app.extensionManager?.setting?.get('Comfy.Locale') ?? 'en')
  const change = () => {
    plan = planOfNode(node)
    draw()
  }
  for (const one of node.widgets) if (WIDGETS.includes(one.name)) chain(one, 'callback', change)
  chain(node, 'onConfigure', change)
  chain(node, 'onConnectionsChange', change)
  chain(node, 'onExecuted', (output) => {
    plan = planThatRan(node, output) ?? plan
    draw()
  })
  const observer = new ResizeObserver(draw)
  observer.observe(box)
  chain(node, 'onRemoved', () => observer.disconnect())
  change()
}

app.registerExtension({
  name: 'DMD2.Nodes',
  nodeCreated(node) {
    if (WITH_CHART.includes(node.comfyClass)) addChart(node)
    if (WITH_REPORT.includes(node.comfyClass)) {
      chain(node, 'onExecuted', (output) => {
        if (output?.text) showReport(node, output.text.join('\n'))
      })
    }
  }
})
