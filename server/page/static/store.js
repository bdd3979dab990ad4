// What the page knows, and who wants to hear of changes.

export const state = {
  model: "",
  /** In manifest order: {name, description, curve}; curve is null without a calibration. */
  categories: [],
  policies: [],
  policy: null,
  /** One a category: {mode, value, moved}; what was not moved is the policy's default. */
  dials: [],
  /** fp32 log-odds of the prompt being written, one a category; null while they are unknown. */
  margins: null,
  /** Why there are none, in words. */
  marginsMissing: "",
  /** What the server made of the dials: {key, biases, clamped}. */
  solved: null,
  /** The server's objection to the dials: {category, message}; category null: to all of them. */
  objection: null,
};

const listeners = new Map();
const waiting = new Set();
let frame = 0;

/** Calls `listener` at most once a frame after any of the topics changed. */
export function on(topics, listener) {
  for (const topic of topics) {
    listeners.set(topic, [...(listeners.get(topic) ?? []), listener]);
  }
}

export function changed(topic) {
  for (const listener of listeners.get(topic) ?? []) waiting.add(listener);
  if (frame === 0) frame = requestAnimationFrame(flush);
}

function flush() {
  frame = 0;
  const now = [...waiting];
  waiting.clear();
  for (const listener of now) listener();
}
