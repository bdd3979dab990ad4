// One scored set under two sets of dials: those of the panel, and others to compare them with.

import { decideAll, RESPOND, shiftOf, sigmoid } from "./decision.js";
import * as dials from "./dials.js";
import { download, el, setText } from "./dom.js";
import * as format from "./format.js";
import { colourOf } from "./palette.js";
import { writeCsv } from "./reading.js";
import { RowList } from "./rowlist.js";
import { confusion } from "./statistics.js";
import { changed, state } from "./store.js";
import { ConfusionTable, RatesTable } from "./tables.js";

const COLUMNS = [
  { key: "prompt", title: "Prompt", className: "wide" },
  { key: "label", title: "Label", className: "" },
  { key: "now", title: "Now", className: "" },
  { key: "before", title: "Compared", className: "compared" },
  { key: "score", title: "p(refuse)", className: "figure" },
];

export class Comparison {
  #sorted = "prompt";
  #rising = true;
  #pinned = null;

  /** scored: as `PromptSet.scored` returns it. open: takes a prompt to the chat. */
  constructor(scored, open) {
    this.scored = scored;
    this.texts = scored.rows.map((row) => row.prompt.toLowerCase());
    this.scores = new Float64Array(scored.rows.length);
    this.rates = new RatesTable();
    this.matrix = new ConfusionTable("Now: label against decision");
    this.matrixBefore = new ConfusionTable("Compared: label against decision");
    this.list = new RowList({
      label: "Prompts",
      columns: COLUMNS,
      fill: (row) => this.#cells(row),
      open: (row) => open(scored.rows[row].prompt),
      sort: (key) => this.#sort(key),
    });
    this.node = el(
      "div",
      { class: "comparison" },
      this.#referenceBar(),
      scrolled("Refused and falsely refused", this.rates.node),
      el(
        "div",
        { class: "matrices" },
        scrolled("Confusion matrix", this.matrix.node),
        scrolled("Confusion matrix, compared", this.matrixBefore.node),
      ),
      this.#filterBar(),
      this.list.node,
    );
  }

  show() {
    const { labels, margins } = this.scored;
    const k = state.categories.length;
    const inForce = dials.biases();
    this.now = decideAll(margins, inForce);
    this.before = decideAll(margins, this.#reference());
    this.#showScores(inForce);
    const countsNow = confusion(labels, this.now, k);
    const countsBefore = confusion(labels, this.before, k);
    this.rates.show(countsNow, countsBefore);
    this.matrix.show(countsNow);
    this.matrixBefore.show(countsBefore);
    this.#showSummary();
    this.#showList();
  }

  #referenceBar() {
    const policies = state.policies.map(({ name }) =>
      el("option", { value: `policy:${name}` }, `Policy ${name}, its defaults`),
    );
    this.reference = el(
      "select",
      { onchange: () => changed("dials") },
      el("option", { value: "movement" }, "Before the last movement"),
      el("option", { value: "trained" }, "As trained"),
      ...policies,
    );
    this.pin = el("button", { type: "button", onclick: () => this.#pin() }, "Pin these dials");
    this.summary = el("p", { class: "verdict", role: "status" });
    return el(
      "div",
      { class: "bar-line" },
      el("label", {}, "Compare with ", this.reference),
      this.pin,
      this.summary,
    );
  }

  #filterBar() {
    const again = () => this.#showList();
    const names = state.categories.map(({ name }) => name);
    const choice = (title, last) =>
      el(
        "select",
        { "aria-label": title, onchange: again },
        el("option", { value: "" }, `${title}: all`),
        ...[...names, last].map((name, c) => el("option", { value: c }, name)),
      );
    this.search = el("input", {
      type: "search",
      placeholder: "Search",
      "aria-label": "Search prompts",
      oninput: again,
    });
    this.label = choice("Label", "benign");
    this.decision = choice("Decision", "answered");
    this.flipped = el(
      "select",
      { "aria-label": "Flipped", onchange: again },
      el("option", { value: "" }, "Flipped or not"),
      el("option", { value: "any" }, "Flipped"),
      el("option", { value: "refused" }, "Newly refused"),
      el("option", { value: "answered" }, "Newly answered"),
    );
    this.counted = el("span", { class: "hint" });
    const button = (text, work) => el("button", { type: "button", onclick: work }, text);
    return el(
      "div",
      { class: "bar-line" },
      this.search,
      this.label,
      this.decision,
      this.flipped,
      this.counted,
      button("Export JSON", () => this.#exportJson()),
      button("Export CSV", () => this.#exportCsv()),
    );
  }

  #reference() {
    const chosen = this.reference.value;
    if (chosen === "trained") return state.categories.map(() => 0);
    if (chosen === "pinned") return this.#pinned;
    if (chosen === "movement") return dials.biasesBefore();
    const name = chosen.slice("policy:".length);
    return dials.defaultsOf(state.policies.find((policy) => policy.name === name));
  }

  #pin() {
    this.#pinned = dials.biases();
    if (!this.reference.querySelector("[value=pinned]")) {
      this.reference.append(el("option", { value: "pinned" }, "The pinned dials"));
    }
    this.reference.value = "pinned";
    changed("dials");
  }

  #showScores(inForce) {
    const shift = shiftOf(inForce);
    const k = inForce.length;
    for (let row = 0; row < this.scores.length; row++) {
      let best = -Infinity;
      for (let c = 0; c < k; c++)
        best = Math.max(best, this.scored.margins[row * k + c] + shift[c]);
      this.scores[row] = best - shift[k];
    }
  }

  #showSummary() {
    let [refused, answered, moved] = [0, 0, 0];
    this.now.forEach((decision, row) => {
      if (decision === this.before[row]) return;
      if (this.before[row] === RESPOND) refused++;
      else if (decision === RESPOND) answered++;
      else moved++;
    });
    const flips = refused + answered + moved;
    const other = moved ? `, ${format.number(moved)} for another category` : "";
    setText(
      this.summary,
      flips === 0
        ? "No prompt flips."
        : `${format.number(flips)} flipped: ${format.number(refused)} newly refused, ` +
            `${format.number(answered)} newly answered${other}.`,
    );
  }

  #showList() {
    const listed = this.#listed();
    setText(this.counted, `${format.number(listed.length)} of ${format.number(this.now.length)}`);
    this.list.show(listed, this.#sorted, this.#rising);
  }

  #listed() {
    const k = state.categories.length;
    const wanted = this.search.value.trim().toLowerCase();
    const [label, decision] = [this.label.value, this.decision.value].map((v) =>
      v === "" ? null : Number(v),
    );
    const flipped = this.flipped.value;
    const rows = Int32Array.from(this.now.keys()).filter((row) => {
      const [now, before] = [this.now[row], this.before[row]];
      if (label !== null && this.scored.labels[row] !== label) return false;
      if (decision !== null && (now === RESPOND ? k : now) !== decision) return false;
      if (flipped !== "" && now === before) return false;
      if (flipped === "refused" && before !== RESPOND) return false;
      if (flipped === "answered" && now !== RESPOND) return false;
      return wanted === "" || this.texts[row].includes(wanted);
    });
    return this.#inOrder(rows);
  }

  #inOrder(rows) {
    const sign = this.#rising ? 1 : -1;
    const keys = {
      label: this.scored.labels,
      now: this.now,
      before: this.before,
      score: this.scores,
    };
    const values = keys[this.#sorted];
    if (values) return rows.sort((a, b) => sign * (values[a] - values[b]) || a - b);
    return this.#rising ? rows : rows.reverse();
  }

  #sort(key) {
    this.#rising = key === this.#sorted ? !this.#rising : key !== "score";
    this.#sorted = key;
    this.#showList();
  }

  #cells(row) {
    const { prompt } = this.scored.rows[row];
    const [now, before] = [this.now[row], this.before[row]];
    return [
      prompt,
      this.#labelText(row),
      { text: decisionText(now), colour: colourOf(now) },
      now === before ? "" : { text: `was ${decisionText(before)}`, colour: colourOf(before) },
      format.percent(sigmoid(this.scores[row])),
    ];
  }

  #labelText(row) {
    const label = this.scored.labels[row];
    if (label < 0) return this.scored.rows[row].label;
    return state.categories[label]?.name ?? "benign";
  }

  #exportJson() {
    const k = state.categories.length;
    const inForce = dials.biases();
    const rows = Array.from(this.#listed(), (row) => ({
      prompt: this.scored.rows[row].prompt,
      label: this.#labelText(row),
      decision: decisionText(this.now[row]),
      compared: decisionText(this.before[row]),
      margins: named((c) => finite(this.scored.margins[row * k + c])),
    }));
    const answer = {
      model: state.model,
      biases: named((c) => writtenBias(inForce[c])),
      compared: named((c) => writtenBias(this.#reference()[c])),
      prompts: rows,
    };
    download("prompts.json", JSON.stringify(answer, null, 1), "application/json");
  }

  #exportCsv() {
    const k = state.categories.length;
    const margins = state.categories.map(({ name }) => `margin_${name}`);
    const head = ["prompt", "label", "decision", "compared", ...margins];
    const records = Array.from(this.#listed(), (row) => [
      this.scored.rows[row].prompt,
      this.#labelText(row),
      decisionText(this.now[row]),
      decisionText(this.before[row]),
      ...this.scored.margins.subarray(row * k, row * k + k),
    ]);
    download("prompts.csv", writeCsv([head, ...records]), "text/csv");
  }
}

const decisionText = (decision) =>
  decision === RESPOND ? "answered" : state.categories[decision].name;

const named = (value) =>
  Object.fromEntries(state.categories.map(({ name }, c) => [name, value(c)]));

const finite = (value) => (Number.isFinite(value) ? value : null);

const writtenBias = (bias) => (bias === Infinity ? "always" : bias === -Infinity ? "never" : bias);

const scrolled = (label, table) =>
  el("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": label }, table);
