// One dial: its mode, its slider over the calibration's curve, and where the prompt flips.

import { DialChart } from "./chart.js";
import { valueAt } from "./curves.js";
import { flipOf, RESPOND, sensitivityOf } from "./decision.js";
import * as dials from "./dials.js";
import { el, setStyle, setText } from "./dom.js";
import * as format from "./format.js";
import { colourOf } from "./palette.js";
import { state } from "./store.js";

// Surely on the other side, whatever order the server sums in.
const BEYOND = 0.005;
// A bound and a dial that stands at it may differ in their last digits.
const ROUNDING = 1e-6;

export class DialView {
  constructor(category) {
    this.category = category;
    const { name, description } = state.categories[category];
    this.mode = el("select", { "aria-label": `${name}: what the dial says`, onchange: this.#mode });
    this.reset = el(
      "button",
      { type: "button", class: "quiet", onclick: () => dials.resetDial(category) },
      "Reset",
    );
    this.reset.setAttribute("aria-label", `${name}: back to the policy's default`);
    this.slider = el("input", { type: "range", step: "any", oninput: this.#slide });
    this.number = el("input", { type: "number", onchange: this.#type });
    this.plot = el("div", { class: "plot", "aria-hidden": "true" });
    this.below = el("div", { class: "forbidden" });
    this.above = el("div", { class: "forbidden above" });
    this.plot.append(this.below, this.above);
    this.stripBelow = el("span");
    this.stripAbove = el("span");
    this.strip = el("div", { class: "strip", role: "img" }, this.stripBelow, this.stripAbove);
    this.readout = el("p", { class: "readout" });
    this.flip = el("button", { type: "button", class: "link", onclick: this.#toFlip });
    this.note = el("p", { class: "note", role: "status" });
    const swatch = el("span", { class: "swatch", "aria-hidden": "true" });
    setStyle(swatch, "background", colourOf(category));
    this.node = el(
      "section",
      { class: "dial", "aria-label": `Dial ${name}` },
      el("div", { class: "dial-head" }, swatch, el("h3", {}, name), this.reset, this.mode),
      el("p", { class: "description" }, description),
      el("div", { class: "track" }, this.plot, this.slider, this.strip),
      el("div", { class: "dial-foot" }, this.number, el("div", {}, this.readout, this.flip)),
      this.note,
    );
    this.chart = new DialChart(category, this.plot);
  }

  show() {
    const { category } = this;
    const dial = state.dials[category];
    const bias = dials.biases()[category];
    const range = dials.rangeOf(category, dial.mode);
    this.#showModes(dial.mode);
    this.reset.hidden = !dial.moved;
    this.slider.min = range.min;
    this.slider.max = range.max;
    this.slider.value = dial.value;
    const title = `${state.categories[category].name}: ${dials.MODES[dial.mode].title.toLowerCase()}`;
    this.slider.setAttribute("aria-label", title);
    this.slider.setAttribute(
      "aria-valuetext",
      `${dial.value.toFixed(3)}, bias ${format.bias(bias)}`,
    );
    this.number.setAttribute("aria-label", `${title}, as a number`);
    this.number.step = dials.MODES[dial.mode].step;
    if (document.activeElement !== this.number) this.number.value = Number(dial.value.toFixed(3));
    this.#showForbidden(range);
    setText(this.readout, this.#readout(dial, bias));
    this.#showStrip(dial, range);
    this.#showNote(dial);
    this.chart.show(dial, range, bias);
  }

  #showModes(chosen) {
    const modes = dials.modesOf(this.category);
    if (this.mode.children.length !== modes.length) {
      const options = modes.map((mode) => el("option", { value: mode }, dials.MODES[mode].title));
      this.mode.replaceChildren(...options);
    }
    this.mode.value = chosen;
  }

  #showForbidden({ min, max, low, high }) {
    const share = (value) => Math.min(Math.max((value - min) / (max - min), 0), 1);
    setStyle(this.below, "width", `${share(low) * 100}%`);
    setStyle(this.above, "width", `${(1 - share(high)) * 100}%`);
  }

  #readout(dial, bias) {
    const { curve } = state.categories[this.category];
    const estimated = dial.moved && dials.needsSolving() && !dials.isSolved() ? "≈ " : "";
    const said = [`bias ${estimated}${format.bias(bias)}`];
    if (dial.mode !== "sensitivity") said.push(`sensitivity ${sensitivityOf(bias).toFixed(2)}`);
    if (curve !== null) {
      said.push(`refuses ${format.percent(valueAt(curve, bias, "refusal_rate"))}`);
      if (curve[0].false_refusal_rate !== null) {
        said.push(`benign ${format.percent(valueAt(curve, bias, "false_refusal_rate"))}`);
      }
    }
    return said.join(" · ");
  }

  #showStrip(dial, { min, max, low, high }) {
    const known = state.margins !== null;
    this.strip.hidden = this.flip.hidden = !known;
    if (!known) return;
    const { category } = this;
    const { name } = state.categories[category];
    const flip = flipOf(state.margins, dials.biases(), category);
    const below = nameOf(flip.below);
    const value = dials.valueIn(category, dial.mode, flip.bias);
    const share = Math.min(Math.max((value - min) / (max - min), 0), 1);
    this.flipBias = flip.bias;
    setStyle(this.stripBelow, "width", `${share * 100}%`);
    setStyle(this.stripBelow, "background", colourOf(flip.below));
    setStyle(this.stripAbove, "width", `${(1 - share) * 100}%`);
    setStyle(this.stripAbove, "background", colourOf(category));
    const inside = flip.bias < Infinity && value >= low && value <= high;
    setText(this.flip, told(flip, value, dial.mode, inside, below));
    this.flip.disabled = !inside;
    this.strip.setAttribute(
      "aria-label",
      `This prompt over the dial ${name}: ${below} below ${value.toFixed(2)}, refused for ${name} from there on`,
    );
  }

  #showNote(dial) {
    const { category } = this;
    const objection = state.objection?.category === category ? state.objection.message : "";
    const clamped = dials.isSolved() ? state.solved.clamped[category] : null;
    const { floor, ceiling } = dials.boundsOf(category);
    const { low, high } = dials.rangeOf(category, dial.mode);
    let note = objection;
    if (!note && clamped) note = `Moved to the policy's ${clamped}.`;
    if (!note && floor > -Infinity && dial.value <= low + ROUNDING) {
      note = `At the floor of ${state.policy.name}: bias ${format.bias(floor)}.`;
    }
    if (!note && ceiling < Infinity && dial.value >= high - ROUNDING) {
      note = `At the ceiling of ${state.policy.name}: bias ${format.bias(ceiling)}.`;
    }
    setText(this.note, note);
    this.note.classList.toggle("error", objection !== "");
  }

  #slide = () => {
    const { mode } = state.dials[this.category];
    const { step } = dials.MODES[mode];
    dials.setDial(this.category, Math.round(this.slider.valueAsNumber / step) * step);
    // The slider stops at the bound, although its track goes on.
    this.slider.value = state.dials[this.category].value;
  };

  #type = () => {
    const value = this.number.valueAsNumber;
    if (Number.isFinite(value)) dials.setDial(this.category, value);
    this.number.value = Number(state.dials[this.category].value.toFixed(3));
  };

  #mode = () => dials.setMode(this.category, this.mode.value);

  #toFlip = () => dials.setBias(this.category, this.flipBias + BEYOND);
}

function told(flip, value, mode, inside, below) {
  if (flip.bias === Infinity) return `${below} wherever it stands`;
  const crowded = mode !== "bias" && (value > 0.994 || value < 0.006);
  const where = crowded ? `bias ${format.bias(flip.bias)}` : value.toFixed(2);
  return `flips at ${where}${inside ? "" : ", out of bounds"}`;
}

export const nameOf = (decision) =>
  decision === RESPOND ? "answered" : `refused for ${state.categories[decision].name}`;
