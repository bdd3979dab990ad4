// The dials: what each asks for, which bias that is, and how far the policy lets it move.

import { biasOfFalseRefusals, biasOfRate, valueAt } from "./curves.js";
import { biasOfSensitivity, sensitivityOf } from "./decision.js";
import { changed, state } from "./store.js";

export const MODES = {
  sensitivity: { title: "Sensitivity", step: 0.01 },
  rate: { title: "Refusal rate", step: 0.01 },
  false_refusal_rate: { title: "False refusal rate", step: 0.005 },
  bias: { title: "Bias", step: 0.1 },
};
const WIDEST_FALSE_RATE = 0.25;
const LEAST_SPAN = 10;
// As many as the server gets, so that both decide alike.
const DIGITS = 9;
// Changes that come closer to each other are one movement.
const PAUSE_MS = 1200;

let lastChange = -Infinity;
let beforeMovement = [];

export const numberOf = (bias) =>
  bias === "always" ? Infinity : bias === "never" ? -Infinity : bias;

export function modesOf(category) {
  const curve = state.categories[category].curve;
  return Object.keys(MODES).filter((mode) => {
    if (mode === "rate") return curve !== null;
    return (
      mode !== "false_refusal_rate" || (curve !== null && curve[0].false_refusal_rate !== null)
    );
  });
}

export function resetDials() {
  state.dials = state.categories.map((_, c) => atDefault(c));
  noteChange();
  beforeMovement = biases();
}

export function resetDial(category) {
  noteChange();
  state.dials[category] = atDefault(category);
  changed("dials");
}

/** Moves a dial, as far as the policy's bounds. */
export function setDial(category, value, mode = state.dials[category].mode) {
  noteChange();
  const { low, high } = rangeOf(category, mode);
  const held = Number(Math.min(Math.max(value, low), high).toPrecision(DIGITS));
  state.dials[category] = { mode, value: held, moved: true };
  changed("dials");
}

/** Says the same bias in another way. */
export function setMode(category, mode) {
  setDial(category, valueIn(category, mode, biasAsked(category)), mode);
}

export function setBias(category, bias) {
  setDial(category, valueIn(category, state.dials[category].mode, bias));
}

/** Returns the slider's ends, and between which of its values the policy lets it move. */
export function rangeOf(category, mode) {
  const { floor, ceiling } = boundsOf(category);
  const [min, max] = endsOf(category, mode);
  return {
    min,
    max,
    low: floor === -Infinity ? min : valueIn(category, mode, floor),
    high: ceiling === Infinity ? (mode === "bias" ? 1e4 : 1) : valueIn(category, mode, ceiling),
  };
}

/** Returns the value by which a mode says a bias. */
export function valueIn(category, mode, bias) {
  const curve = state.categories[category].curve;
  if (mode === "sensitivity") return sensitivityOf(bias);
  if (mode === "rate") return valueAt(curve, bias, "refusal_rate");
  if (mode === "false_refusal_rate") return valueAt(curve, bias, "false_refusal_rate");
  const [min, max] = endsOf(category, "bias");
  return bias === Infinity ? max : bias === -Infinity ? min : bias;
}

/** Returns the bias that a mode's value asks for; rates are read off the calibration's curve. */
export function biasOfValue(category, mode, value) {
  const curve = state.categories[category].curve;
  if (mode === "sensitivity") return biasOfSensitivity(value);
  if (mode === "rate") return biasOfRate(curve, value);
  if (mode === "false_refusal_rate") return biasOfFalseRefusals(curve, value);
  return value;
}

export function boundsOf(category) {
  const { floor, ceiling } = state.policy.categories[state.categories[category].name];
  return {
    floor: floor === null ? -Infinity : numberOf(floor.bias),
    ceiling: ceiling === null ? Infinity : numberOf(ceiling.bias),
  };
}

function biasAsked(category) {
  const { mode, value, moved } = state.dials[category];
  return moved ? biasOfValue(category, mode, value) : defaultBias(category);
}

/** Returns the biases in force: the server's own where it has solved these very dials. */
export function biases() {
  if (isSolved()) return state.solved.biases;
  return state.categories.map((_, c) => {
    const { floor, ceiling } = boundsOf(c);
    return Math.min(Math.max(biasAsked(c), floor), ceiling);
  });
}

export const isSolved = () => state.solved !== null && state.solved.key === dialsKey();

/** Returns whether some bias is only read off a curve until the server has solved it. */
export const needsSolving = () =>
  state.dials.some(({ mode, moved }) => moved && mode !== "sensitivity" && mode !== "bias");

/** Returns the dials as a `refusal` object's `categories`: those that were moved. */
export function requestedDials() {
  const moved = {};
  state.dials.forEach((dial, c) => {
    if (dial.moved) moved[state.categories[c].name] = written(dial);
  });
  return moved;
}

export function requestedRefusal(report) {
  const categories = requestedDials();
  return {
    ...(state.policies.length > 1 ? { policy: state.policy.name } : {}),
    ...(report ? { report: true } : {}),
    ...(Object.keys(categories).length ? { categories } : {}),
  };
}

export const dialsKey = () => JSON.stringify([state.policy.name, requestedDials()]);

/** Returns the biases before the movement that goes on, or was the last. */
export const biasesBefore = () => beforeMovement;

export function defaultsOf(policy) {
  return state.categories.map(({ name }) => numberOf(policy.categories[name].default.bias));
}

export function written({ mode, value }) {
  return mode === "sensitivity" ? value : { [mode]: value };
}

function noteChange() {
  const now = performance.now();
  if (now - lastChange > PAUSE_MS && state.dials.length) beforeMovement = biases();
  lastChange = now;
  state.objection = null;
}

function atDefault(category) {
  const value = sensitivityOf(defaultBias(category));
  return { mode: "sensitivity", value, moved: false };
}

function defaultBias(category) {
  const { name } = state.categories[category];
  return numberOf(state.policy.categories[name].default.bias);
}

function endsOf(category, mode) {
  if (mode === "false_refusal_rate") return [0, WIDEST_FALSE_RATE];
  if (mode !== "bias") return [0, 1];
  const { floor, ceiling } = boundsOf(category);
  const curve = state.categories[category].curve;
  const marks = [floor, ceiling, defaultBias(category), curve?.[0].bias, curve?.at(-1).bias];
  const widest = Math.max(LEAST_SPAN, ...marks.filter(Number.isFinite).map(Math.abs));
  return [-Math.ceil(widest), Math.ceil(widest)];
}
