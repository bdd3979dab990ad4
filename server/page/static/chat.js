// The conversation: several turns, a system prompt, streamed answers with their decisions.

import { ApiError, stream } from "./api.js";
import { sigmoid } from "./decision.js";
import * as dials from "./dials.js";
import { byId, el, setStyle, setText } from "./dom.js";
import * as format from "./format.js";
import { colourOf } from "./palette.js";
import { changed, state } from "./store.js";

const CHAT = "v1/chat/completions";

let turns = [];
let running = null;

export function startChat() {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running === null) send();
    else running.abort();
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (running === null) send();
  });
  for (const id of ["prompt", "system"]) byId(id).addEventListener("input", () => changed("draft"));
  byId("again").addEventListener("click", askAgain);
  byId("clear").addEventListener("click", clear);
  byId("examples").addEventListener("click", (event) => {
    if (event.target.matches("button")) usePrompt(event.target.textContent);
  });
}

/** Returns the messages that would be sent now; after an answer, those that were sent last. */
export function conversation() {
  const draft = byId("prompt").value.trim();
  const asked = turns.findLastIndex((turn) => turn.role === "user");
  if (draft === "" && asked < 0) return null;
  if (draft === "") return [...systemTurn(), ...turns.slice(0, asked + 1)];
  return [...systemTurn(), ...turns, { role: "user", content: draft }];
}

export function usePrompt(text) {
  byId("prompt").value = text;
  byId("prompt").focus();
  changed("draft");
}

function systemTurn() {
  const content = byId("system").value.trim();
  return content === "" ? [] : [{ role: "system", content }];
}

function send() {
  const content = byId("prompt").value.trim();
  if (content === "") return;
  byId("prompt").value = "";
  turns.push({ role: "user", content });
  byId("log").append(el("article", { class: "turn user" }, el("p", { class: "text" }, content)));
  answer();
}

function askAgain() {
  if (running !== null || turns.length === 0) return;
  if (turns.at(-1).role === "assistant") turns.pop();
  answer();
}

function clear() {
  running?.abort();
  turns = [];
  byId("log").replaceChildren();
  showControls();
  changed("draft");
}

async function answer() {
  const view = new AnswerView();
  const sent = turns;
  byId("log").append(view.node);
  running = new AbortController();
  showControls();
  changed("draft");
  const asked = state.dials.map((dial) => (dial.moved ? dials.written(dial) : "default"));
  try {
    await receive(view, asked, running.signal);
  } catch (error) {
    if (error.name === "AbortError") view.stop();
    else if (error instanceof ApiError) view.fail(error.message);
    else throw error;
  } finally {
    running = null;
    if (sent === turns && view.said) turns.push(view.message());
    showControls();
    changed("draft");
  }
}

async function receive(view, asked, signal) {
  const body = {
    model: state.model,
    messages: [...systemTurn(), ...turns],
    stream: true,
    refusal: dials.requestedRefusal(state.policy.report),
  };
  for await (const event of stream(CHAT, body, signal)) {
    const choice = event.choices[0];
    if (choice === undefined) continue;
    if (choice.refusal_report) view.report(choice.refusal_report, asked);
    view.add(choice.delta);
    if (choice.finish_reason) view.end(choice.finish_reason);
  }
  view.end("stop");
}

function showControls() {
  const busy = running !== null;
  byId("send").textContent = busy ? "Stop" : "Send";
  byId("again").hidden = busy || turns.length === 0;
  byId("clear").hidden = turns.length === 0 && byId("log").children.length === 0;
  byId("examples").hidden = byId("log").children.length > 0;
}

class AnswerView {
  said = false;
  #message = { role: "assistant", content: "" };
  #category = null;
  #ended = false;

  constructor() {
    this.badge = el("span", { class: "badge" }, "Waiting…");
    this.text = el("p", { class: "text" });
    this.details = el("div", { class: "report" });
    this.node = el("article", { class: "turn assistant" }, this.badge, this.text, this.details);
  }

  message() {
    return this.#message;
  }

  add(delta) {
    if (delta.refusal_category) this.#category = delta.refusal_category;
    const refusal = typeof delta.refusal === "string" ? delta.refusal : "";
    // With `refusal_in`, a refusal's text stands in both.
    const content = refusal ? "" : (delta.content ?? "");
    if (delta.refusal_category || refusal) this.#decide("Refused");
    else if (content) this.#decide("Answered");
    this.text.append(refusal + content);
    this.#remember(refusal, content);
    this.node.scrollIntoView({ block: "nearest" });
  }

  report(report, asked) {
    this.#category = report.category;
    this.#decide(report.refused ? "Refused" : "Answered");
    if (report.would_refuse) this.badge.append(` · would be refused for ${report.would_refuse}`);
    this.details.replaceChildren(reportTable(report, asked));
  }

  end(reason) {
    if (this.#ended) return;
    this.#ended = true;
    if (reason === "length") this.details.append(el("p", { class: "note" }, "Cut at the limit."));
    announce(`${this.badge.textContent}. ${this.text.textContent}`);
  }

  stop() {
    this.#ended = true;
    setText(this.badge, this.said ? `${this.badge.textContent} · stopped` : "Stopped");
  }

  fail(message) {
    this.#ended = true;
    this.node.classList.add("failed");
    setText(this.badge, "Failed");
    this.details.append(el("p", { class: "note error" }, message));
    announce(`Failed. ${message}`);
  }

  #remember(refusal, content) {
    if (this.#category !== null) {
      const said = (this.#message.refusal ?? "") + refusal;
      const category = { refusal_category: this.#category };
      this.#message = { role: "assistant", content: null, refusal: said, ...category };
    } else if (content) {
      this.#message.content += content;
    }
  }

  #decide(word) {
    this.said = true;
    const refused = word === "Refused";
    const category = state.categories.findIndex(({ name }) => name === this.#category);
    const told = refused && this.#category ? `Refused · ${this.#category}` : word;
    if (!this.badge.textContent.startsWith(told)) setText(this.badge, told);
    this.node.classList.toggle("refused", refused);
    setStyle(this.node, "--decision", colourOf(refused ? category : -1));
  }
}

function announce(text) {
  setText(byId("announcement"), text);
}

function reportTable(report, asked) {
  const heads = ["Category", "Margin", "Asked", "Bias", "p(refuse)", "Rule"];
  const rows = state.categories.map(({ name }, c) => {
    const { margin, bias, refused, clamped } = report.decisions[name];
    const added = dials.numberOf(bias);
    const dialled = margin === null ? NaN : sigmoid(margin + added);
    return el(
      "tr",
      {},
      el("th", { scope: "row" }, name),
      el("td", {}, margin === null ? "–" : format.bias(margin)),
      el("td", {}, askedText(asked[c])),
      el("td", {}, format.bias(added), clamped ? el("em", {}, ` ${clamped}`) : null),
      el("td", {}, format.percent(dialled)),
      el("td", {}, refused ? "refuses" : "answers"),
    );
  });
  const head = el("tr", {}, ...heads.map((text) => el("th", { scope: "col" }, text)));
  const replaced = report.replaced_decision
    ? el("p", { class: "note" }, `Decided by greedy: the policy has floors.`)
    : null;
  return el(
    "details",
    {},
    el("summary", {}, "Margins and biases"),
    el(
      "div",
      { class: "scroll", tabindex: 0, role: "group", "aria-label": "Margins and biases" },
      el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows)),
    ),
    replaced,
  );
}

function askedText(asked) {
  if (typeof asked === "string") return asked;
  if (typeof asked === "number") return asked.toFixed(3);
  const [[mode, value]] = Object.entries(asked);
  return `${mode.replaceAll("_", " ")} ${value.toFixed(3)}`;
}
