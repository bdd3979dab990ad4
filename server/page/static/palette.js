// Colours by category: told apart by people who do not see red or green, in light and dark.

import { RESPOND } from "./decision.js";

const HUES = 8;

export const colourOf = (category) =>
  category === RESPOND ? "var(--answered)" : `var(--category-${category % HUES})`;

/** Returns what a CSS colour stands for now; a canvas knows no variables. */
export function resolved(colour) {
  const name = /^var\((.*)\)$/.exec(colour)?.[1];
  return name ? getComputedStyle(document.documentElement).getPropertyValue(name).trim() : colour;
}
