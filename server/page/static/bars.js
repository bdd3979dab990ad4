// p(refuse) of the prompt being written, by category: as trained and with the dials.

import { decide, RESPOND, shiftOf, sigmoid } from "./decision.js";
import { nameOf } from "./dialview.js";
import * as dials from "./dials.js";
import { byId, el, setStyle, setText } from "./dom.js";
import * as format from "./format.js";
import { colourOf } from "./palette.js";
import { on, state } from "./store.js";

let rows = [];

export function startBars() {
  on(["policy"], build);
  on(["policy", "dials", "scores", "draft"], show);
}

function build() {
  rows = state.categories.map(({ name }, c) => {
    const label = el("span", { class: "bar-name", title: name }, name);
    const fill = el("span", { class: "bar-fill" });
    const trained = el("span", { class: "bar-trained" });
    setStyle(fill, "background", colourOf(c));
    const meter = el(
      "span",
      { class: "bar", role: "meter", "aria-valuemin": 0, "aria-valuemax": 1, "aria-label": name },
      fill,
      trained,
    );
    const value = el("span", { class: "bar-value" });
    return { node: el("li", {}, label, meter, value), meter, fill, trained, value };
  });
  byId("bars").replaceChildren(...rows.map((row) => row.node));
}

function show() {
  const { margins } = state;
  const biases = dials.biases();
  byId("bars").classList.toggle("unknown", margins === null);
  rows.forEach((row, c) => {
    const trained = margins === null ? 0 : sigmoid(margins[c]);
    const dialled = margins === null ? 0 : sigmoid(margins[c] + biases[c]);
    setStyle(row.fill, "width", `${dialled * 100}%`);
    setStyle(row.trained, "left", `${trained * 100}%`);
    row.trained.hidden = margins === null;
    row.meter.setAttribute("aria-valuenow", dialled.toFixed(3));
    const told = `${format.percent(dialled)} with the dials, ${format.percent(trained)} as trained`;
    row.meter.setAttribute("aria-valuetext", margins === null ? "unknown" : told);
    setText(row.value, margins === null ? "–" : format.percent(dialled));
  });
  showVerdict(margins, biases);
}

function showVerdict(margins, biases) {
  const verdict = byId("verdict");
  const decision = margins === null ? null : decide(margins, shiftOf(biases));
  verdict.classList.toggle("refused", decision !== null && decision !== RESPOND);
  if (decision === null) {
    setText(verdict, state.marginsMissing || "Write a prompt to see what would become of it.");
  } else {
    setText(verdict, `This prompt would be ${nameOf(decision)}.`);
  }
}
