// The set's tables: refused and falsely refused by category, and the confusion matrix.

import { valueAt } from "./curves.js";
import { biases } from "./dials.js";
import { el, setStyle, setText } from "./dom.js";
import * as format from "./format.js";
import { rowOf, wilson } from "./statistics.js";
import { state } from "./store.js";

const HEADS = [
  "Category",
  "Prompts",
  "Refused",
  "95 % interval",
  "By its own token",
  "Benign refused",
  "95 % interval",
  "Asked",
  "Off by",
  "Change",
];

/** Refused and falsely refused; the last row is all categories together. */
export class RatesTable {
  constructor() {
    const names = [...state.categories.map(({ name }) => name), "All"];
    this.rows = names.map((name) => {
      const cells = HEADS.slice(1).map(() => el("td"));
      return { cells, node: el("tr", {}, el("th", { scope: "row" }, name), ...cells) };
    });
    this.node = table("Refused and falsely refused by category", HEADS, this.rows);
  }

  /** now, before: counts as `confusion` returns them. */
  show(now, before) {
    const k = state.categories.length;
    const benign = rowOf(now, k, k).prompts;
    const inForce = biases();
    let [prompts, refused, own, refusedBefore] = [0, 0, 0, 0];
    state.categories.forEach((_, c) => {
      const row = rowOf(now, c, k);
      const earlier = rowOf(before, c, k);
      prompts += row.prompts;
      refused += row.refused;
      own += row.own;
      refusedBefore += earlier.refused;
      const asked = askedRate(c, inForce[c]);
      fill(this.rows[c].cells, [
        ...shares(row.prompts, row.refused, row.own),
        ...falseShares(now[k * (k + 1) + c], benign),
        asked === null ? "–" : format.percent(asked),
        asked === null || row.prompts === 0
          ? "–"
          : format.points(row.refused / row.prompts - asked),
        format.points((row.refused - earlier.refused) / row.prompts),
      ]);
    });
    fill(this.rows[k].cells, [
      ...shares(prompts, refused, own),
      ...falseShares(rowOf(now, k, k).refused, benign),
      "",
      "",
      format.points((refused - refusedBefore) / prompts),
    ]);
  }
}

/** What prompts are, against what becomes of them. */
export class ConfusionTable {
  constructor(title) {
    const names = state.categories.map(({ name }) => name);
    this.rows = [...names, "benign"].map((name) => {
      const cells = [...names, "answered"].map(() => el("td"));
      return { cells, node: el("tr", {}, el("th", { scope: "row" }, name), ...cells) };
    });
    this.node = table(title, ["Label", ...names, "answered"], this.rows);
    this.node.classList.add("confusion");
  }

  show(counts) {
    const width = state.categories.length + 1;
    this.rows.forEach((row, label) => {
      const { prompts } = rowOf(counts, label, width - 1);
      row.cells.forEach((cell, decision) => {
        const count = counts[label * width + decision];
        setText(cell, String(count));
        setStyle(cell, "--share", prompts ? `${Math.round((count / prompts) * 32)}%` : "0%");
        cell.classList.toggle("right", label === decision);
      });
    });
  }
}

// What the dial itself says, or else what the calibration expects of its bias.
function askedRate(category, bias) {
  const dial = state.dials[category];
  if (dial.moved && dial.mode === "rate") return dial.value;
  const { curve } = state.categories[category];
  return curve === null ? null : valueAt(curve, bias, "refusal_rate");
}

function shares(prompts, refused, own) {
  if (prompts === 0) return ["0", "–", "–", "–"];
  return [
    format.number(prompts),
    format.percent(refused / prompts),
    format.interval(wilson(refused, prompts)),
    format.percent(own / prompts),
  ];
}

function falseShares(count, benign) {
  if (benign === 0) return ["–", "–"];
  return [format.percent(count / benign), format.interval(wilson(count, benign))];
}

function fill(cells, texts) {
  cells.forEach((cell, at) => setText(cell, texts[at]));
}

function table(title, heads, rows) {
  const head = el("tr", {}, ...heads.map((text) => el("th", { scope: "col", title: text }, text)));
  return el(
    "table",
    {},
    el("caption", {}, title),
    el("thead", {}, head),
    el("tbody", {}, ...rows.map((row) => row.node)),
  );
}
