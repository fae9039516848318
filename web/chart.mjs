// Draws a plan: one bar for each step, as high as its timestep, with the timestep above it and the
// noise level below. Steps that image to image leaves out are outlines.

import { noiseLevels } from './plan.mjs'

export const HEIGHT_PX = 104
const [TOP_PX, BOTTOM_PX, GAP_PX] = [32, 14, 3]
const SVG = 'http://www.w3.org/2000/svg'
const SDXL_LEVELS = noiseLevels()

const TEXTS = {
  en: {
    steps: (active, all) => (active === all ? `${all} steps` : `${active} of ${all} steps`),
    oneStep: '1 step',
    from: (timestep) => `from ${timestep}`,
    none: 'no step runs',
    assumed: 'the recipe may differ',
    recipe: 'as the recipe says',
    linked: 'set by a connection: shown after a run',
    told: (timestep) => `told ${timestep}`,
    bar: (timestep, level) => `timestep ${timestep}, noise ${level}`,
    left: 'left out',
    notNumbers: 'timesteps: whole numbers, such as 999, 749, 499, 249',
    twoCounts: 'steps and timesteps disagree: set steps to 0',
    outside: 'timesteps go from 999 to 0',
    order: 'timesteps must descend'
  },
  zh: {
    steps: (active, all) => (active === all ? `${all} 步` : `${all} 步中的 ${active} 步`),
    oneStep: '1 步',
    from: (timestep) => `从时间步 ${timestep} 开始`,
    none: '不执行任何步',
    assumed: '以配方为准',
    recipe: '按配方',
    linked: '由连线给出：运行后显示',
    told: (timestep) => `告知 ${timestep}`,
    bar: (timestep, level) => `时间步 ${timestep}，噪声 ${level}`,
    left: '跳过',
    notNumbers: 'timesteps：请写整数，例如 999, 749, 499, 249',
    twoCounts: 'steps 与 timesteps 不一致：请将 steps 设为 0',
    outside: 'timesteps 的范围是 999 到 0',
    order: 'timesteps 必须递减'
  }
}

function svg(name, attributes, text) {
  const element = document.createElementNS(SVG, name)
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value)
  if (text !== undefined) element.textContent = text
  return element
}

const colour = (variable, fallback) => `var(${variable}, ${fallback})`
const PLAIN = colour('--input-text', '#ddd')
const MUTED = colour('--descrip-text', '#999')
const ACCENT = colour('--p-primary-color', '#3b82f6')
const WRONG = colour('--error-text', '#ff4444')

function level(plan, index) {
  const told = plan.told?.[index] ?? plan.timesteps[index]
  const value = plan.levels?.[index] ?? SDXL_LEVELS[told]
  return value >= 100 ? value.toFixed(0) : value.toPrecision(3)
}

function caption(plan, texts) {
  const all = plan.timesteps.length
  const active = all - plan.start
  if (active === 0) return texts.none
  const parts = [all === 1 ? texts.oneStep : texts.steps(active, all)]
  if (plan.start > 0) parts.push(texts.from(plan.timesteps[plan.start]))
  if (plan.told && plan.told[0] !== plan.timesteps[0]) parts.push(texts.told(plan.told[0]))
  if (plan.assumed) parts.push(texts.assumed)
  if (plan.recipe) parts.push(texts.recipe)
  return parts.join(' · ')
}

/** Fill `box` (an HTML element) with `plan`: {timesteps, start, ...}, {error} or {linked: true}. */
export function drawPlan(box, plan, locale = 'en') {
  const texts = TEXTS[locale.startsWith('zh') ? 'zh' : 'en']
  const width = Math.max(box.clientWidth, 120)
  const picture = svg('svg', { width, height: HEIGHT_PX, viewBox: `0 0 ${width} ${HEIGHT_PX}` })
  const line = (y, size, fill, text, more = {}) =>
    svg('text', { y, fill, 'font-size': size, 'text-anchor': 'middle', ...more }, text)
  const words = plan.error ? texts[plan.error] : plan.linked ? texts.linked : caption(plan, texts)
  const colourOfWords = plan.error ? WRONG : MUTED
  // A Latin letter is about half as wide as high, a Chinese one as wide.
  const halves = [...words].reduce((sum, letter) => sum + (letter > '\u2e80' ? 2 : 1), 0)
  const fitting = Math.min(11, width / (0.52 * halves))
  picture.append(line(11, fitting, colourOfWords, words, { x: width / 2, class: 'dmd2-plan-caption' }))
  if (plan.timesteps) drawBars(picture, plan, texts, line, width)
  box.replaceChildren(picture)
}

function drawBars(picture, plan, texts, line, width) {
  const slot = (width - GAP_PX) / plan.timesteps.length
  const size = Math.min(11, slot / 2)
  const floor = HEIGHT_PX - BOTTOM_PX
  plan.timesteps.forEach((timestep, index) => {
    const runs = index >= plan.start
    const height = Math.max(2, ((floor - TOP_PX) * (timestep + 1)) / 1000)
    const barWidth = Math.min(slot - GAP_PX, 60)
    const middle = GAP_PX / 2 + slot * (index + 0.5)
    const bar = svg('rect', {
      x: middle - barWidth / 2,
      y: floor - height,
      width: barWidth,
      height,
      rx: 2,
      class: runs ? 'dmd2-plan-step' : 'dmd2-plan-left-out',
      fill: runs ? ACCENT : 'none',
      'fill-opacity': plan.assumed ? 0.5 : 0.9,
      stroke: runs ? ACCENT : MUTED,
      'stroke-dasharray': runs && !plan.assumed ? 'none' : '3 2'
    })
    const about = texts.bar(timestep, level(plan, index)) + (runs ? '' : ` (${texts.left})`)
    bar.append(svg('title', {}, about))
    const fill = runs ? PLAIN : MUTED
    picture.append(bar, line(floor - height - 3, size, fill, timestep, { x: middle }))
    if (slot >= 32) picture.append(line(HEIGHT_PX - 3, 9, MUTED, `σ ${level(plan, index)}`, { x: middle }))
  })
}
