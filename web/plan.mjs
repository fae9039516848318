// The plan that the Scheduler and Sample nodes will follow, computed on the page: what
// dmd2_core/few_step.py (StepPlan) and nodes/settings.py (step_plan, first_step) compute in Python.
// tests/comfy/test_browser.py compares the two.

export const NUM_TIMESTEPS = 1000
export const DEFAULT_STEPS = 4

/** 999, 999 - 1000/n, ...: n evenly spaced timesteps, noisiest first. */
export function evenly(numSteps) {
  return Array.from(
    { length: numSteps },
    (_, i) => NUM_TIMESTEPS - 1 - Math.floor((i * NUM_TIMESTEPS) / numSteps)
  )
}

/** The integers in "999, 749, 499, 249"; [] for an empty text, null for anything else. */
export function parseTimesteps(text) {
  const words = text.trim().split(/[\s,;]+/)
  if (words.length === 1 && words[0] === '') return []
  return words.every((word) => /^[+-]?[0-9]{1,9}$/.test(word)) ? words.map(Number) : null
}

/** Index of the timestep nearest to `denoise` of the way from 0 to 999; the first of two equally near. */
export function firstStep(timesteps, denoise) {
  const wanted = denoise * NUM_TIMESTEPS - 1
  let best = 0
  timesteps.forEach((timestep, index) => {
    if (Math.abs(timestep - wanted) < Math.abs(timesteps[best] - wanted)) best = index
  })
  return best
}

/**
 * {timesteps, start, assumed} for the widgets' values, or {error} with the name of what is wrong.
 * `start` is the first step that runs (past the end: none does); `assumed`: a recipe may say
 * something else, which the page cannot know before the node has run.
 */
export function planOf({ steps = 0, timesteps = '', denoise = 1 }) {
  const listed = parseTimesteps(timesteps)
  if (listed === null) return { error: 'notNumbers' }
  if (listed.length > 0 && steps !== 0 && steps !== listed.length) return { error: 'twoCounts' }
  if (listed.some((value) => value < 0 || value >= NUM_TIMESTEPS)) return { error: 'outside' }
  if (listed.some((value, i) => i > 0 && value >= listed[i - 1])) return { error: 'order' }
  const chosen = listed.length > 0 ? listed : evenly(steps || DEFAULT_STEPS)
  return {
    timesteps: chosen,
    start: denoise > 0 ? firstStep(chosen, denoise) : chosen.length,
    assumed: listed.length === 0 && steps === 0
  }
}

/** Noise-to-signal ratio of SDXL's and SD1.5's 1000 timesteps (scaled-linear betas). */
export function noiseLevels() {
  const [first, last] = [Math.sqrt(0.00085), Math.sqrt(0.012)]
  let signal = 1
  return Array.from({ length: NUM_TIMESTEPS }, (_, t) => {
    const root = first + ((last - first) * t) / (NUM_TIMESTEPS - 1)
    signal *= 1 - root * root
    return Math.sqrt((1 - signal) / signal)
  })
}
