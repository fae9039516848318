// Shows below a node what it says after a run: what was applied, what was found, what it noticed.

const REPORT = 'report_text'
const HEIGHT_PX = 64

function addReport(node) {
  const box = document.createElement('div')
  box.className = 'dmd2-report'
  box.style.cssText =
    'overflow:auto;padding-top:6px;white-space:pre-wrap;font-size:11px;line-height:1.3;user-select:text;' +
    `min-height:${HEIGHT_PX}px;color:var(--descrip-text, #999)`
  const widget = node.addDOMWidget(REPORT, 'dmd2_report', box, {
    serialize: false, // not in the prompt
    hideOnZoom: false,
    getMinHeight: () => HEIGHT_PX,
    getValue: () => '',
    setValue: () => {}
  })
  widget.serialize = false // not in the file
  return widget
}

/** Show `text` in `node`, which grows if it has no room for it. */
export function showReport(node, text) {
  const widget = node.widgets?.find((one) => one.name === REPORT) ?? addReport(node)
  widget.element.textContent = text
  const [width, height] = node.size
  node.setSize([width, Math.max(height, node.computeSize()[1])])
}
