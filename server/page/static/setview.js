// The tab of a set of prompts: load it, score it once, then watch every dial move it.

import { ApiError } from "./api.js";
import { usePrompt } from "./chat.js";
import { Comparison } from "./comparison.js";
import { byId, el, setText } from "./dom.js";
import * as format from "./format.js";
import { PromptSet } from "./promptset.js";
import { labelIndex, ReadingError, readPrompts } from "./reading.js";
import { on, state } from "./store.js";

const DEMO = "page/demo.jsonl";
const MOST_PROMPTS = 50_000;
const MOST_BYTES = 64 * 2 ** 20;

let set = null;
let running = null;
let comparison = null;
let showTab = () => {};

/** openChat: shows the chat. */
export function startSet(openChat) {
  showTab = openChat;
  byId("choose").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", () => {
    if (byId("file").files.length) loadFile(byId("file").files[0]);
    byId("file").value = "";
  });
  byId("take-demo").addEventListener("click", loadDemo);
  byId("stop-scoring").addEventListener("click", () => running?.abort());
  byId("go-on").addEventListener("click", score);
  startDrop(byId("set"));
  on(["policy"], () => {
    byId("take-demo").hidden = false;
    if (set && set.categories.length !== state.categories.length) forget();
  });
  on(["dials", "scores", "policy", "tab"], () => {
    if (!byId("set").hidden) comparison?.show();
  });
}

function startDrop(area) {
  area.addEventListener("dragover", (event) => {
    event.preventDefault();
    area.classList.add("over");
  });
  area.addEventListener("dragleave", () => area.classList.remove("over"));
  area.addEventListener("drop", (event) => {
    event.preventDefault();
    area.classList.remove("over");
    const [file] = event.dataTransfer.files;
    if (file) loadFile(file);
  });
}

async function loadFile(file) {
  if (file.size > MOST_BYTES) say(`${file.name} is larger than 64 MB.`);
  else begin(file.name, await file.text());
}

async function loadDemo() {
  try {
    const response = await fetch(new URL(DEMO, document.baseURI));
    if (!response.ok) throw new TypeError(`status ${response.status}`);
    begin("The demo's prompts", await response.text());
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    say("The server does not answer. Is it still running?");
  }
}

function begin(name, text) {
  running?.abort();
  try {
    const rows = readPrompts(text);
    if (rows.length > MOST_PROMPTS) {
      say(
        `${name} has ${format.number(rows.length)} prompts; ${format.number(MOST_PROMPTS)} is the most.`,
      );
      return;
    }
    set = new PromptSet(name, rows);
  } catch (error) {
    if (!(error instanceof ReadingError)) throw error;
    say(`${name}: ${error.message}`);
    return;
  }
  score();
}

async function score() {
  const own = new AbortController();
  const scored = set;
  running = own;
  byId("results").hidden = true;
  byId("results").replaceChildren();
  comparison = null;
  say("");
  showProgress(scored);
  try {
    await scored.score(own.signal, () => showProgress(scored));
  } catch (error) {
    if (error instanceof ApiError) say(explain(error));
    else if (error.name !== "AbortError") throw error;
  }
  if (running !== own) return; // Another set has taken its place.
  running = null;
  showProgress(scored);
  if (scored.count) showResults(scored);
}

function explain(error) {
  if (error.status === 403) return `Prompts cannot be scored here: ${error.message}`;
  return error.message;
}

function showProgress({ name, next, total, done }) {
  byId("progress-line").hidden = false;
  byId("set").classList.add("loaded");
  byId("progress").max = total;
  byId("progress").value = next;
  byId("progress").hidden = done;
  byId("stop-scoring").hidden = running === null || done;
  byId("go-on").hidden = running !== null || done;
  const counted = done ? format.number(total) : `${format.number(next)} of ${format.number(total)}`;
  setText(byId("progress-text"), `${name}: ${counted} prompts scored`);
}

function showResults(scored) {
  const told = [];
  if (scored.failed.length) {
    const [{ row, message }] = scored.failed;
    told.push(`${scored.failed.length} left out, the first is number ${row + 1}: ${message}`);
  }
  const strange = new Set(
    scored.rows
      .map(({ label }) => label)
      .filter((label) => labelIndex(label, scored.categories) < 0),
  );
  if (strange.size) {
    const shown = [...strange].slice(0, 5).map((label) => JSON.stringify(label));
    told.push(`Labels that are no category count in no table: ${shown.join(", ")}.`);
  }
  comparison = new Comparison(scored.scored(), (text) => {
    showTab();
    usePrompt(text);
  });
  byId("results").replaceChildren(
    ...told.map((text) => el("p", { class: "note" }, text)),
    comparison.node,
  );
  byId("results").hidden = false;
  comparison.show();
}

function forget() {
  running?.abort();
  set = comparison = null;
  byId("results").replaceChildren();
  byId("progress-line").hidden = true;
  byId("set").classList.remove("loaded");
}

function say(text) {
  setText(byId("set-note"), text);
}
