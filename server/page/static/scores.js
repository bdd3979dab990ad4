// Keeps the margins of the prompt being written: one request in flight, and only after a pause.

import { ApiError, postJson } from "./api.js";
import { dialsKey, isSolved, needsSolving, numberOf, requestedRefusal } from "./dials.js";
import { debounced } from "./dom.js";
import { changed, on, state } from "./store.js";

const PAUSE_MS = 200;
const SCORE = "v1/refusal/score";
// Any prompt will do where only the dials are to be solved.
const PLACEHOLDER = [{ role: "user", content: "Hello" }];

let conversation = () => null;
let scoredText = "";
let inFlight = false;
let again = false;

/** Starts; `source` returns the messages that would be sent, or null while there is no prompt. */
export function watchScores(source) {
  conversation = source;
  const later = debounced(refresh, PAUSE_MS);
  on(["draft", "dials"], later);
  on(["policy"], () => {
    forget("");
    refresh();
  });
}

async function refresh() {
  if (inFlight) {
    again = true;
    return;
  }
  inFlight = true;
  try {
    do {
      again = false;
      await update();
    } while (again);
  } finally {
    inFlight = false;
  }
}

async function update() {
  const messages = conversation();
  if (messages === null) forget("");
  if (!state.policy.report) {
    forget(
      `The policy ${state.policy.name} allows no reports, so the server tells no probabilities.`,
    );
    return;
  }
  const text = JSON.stringify(messages);
  const solves = needsSolving() && !isSolved() && state.objection === null;
  if (!solves && (messages === null || text === scoredText)) return;
  try {
    keep(messages, text, await score(messages, requestedRefusal(false), dialsKey()));
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    await complain(error, messages, text);
  }
}

async function score(messages, refusal, key) {
  const body = { model: state.model, inputs: [{ messages: messages ?? PLACEHOLDER }], refusal };
  const answer = await postJson(SCORE, body);
  const decisions = state.categories.map(({ name }) => answer.data[0].decisions[name]);
  return {
    margins: Float32Array.from(decisions, (decision) => decision.margin ?? NaN),
    solved: {
      key,
      biases: decisions.map((decision) => numberOf(decision.bias)),
      clamped: decisions.map((decision) => decision.clamped ?? null),
    },
  };
}

function keep(messages, text, { margins, solved }) {
  state.solved = solved;
  if (messages !== null) {
    state.margins = margins;
    state.marginsMissing = "";
    scoredText = text;
  }
  changed("scores");
}

async function complain(error, messages, text) {
  if (!error.param?.startsWith("refusal")) {
    forget(error.message);
    return;
  }
  const [, kind, name] = error.param.split(".");
  const category = state.categories.findIndex((entry) => entry.name === name);
  const about = kind === "categories" && category >= 0 ? category : null;
  state.objection = { category: about, message: error.message };
  changed("scores");
  if (messages === null || text === scoredText) return;
  // The prompt's own margins do not depend on dials that the server would not take.
  const refusal = state.policies.length > 1 ? { policy: state.policy.name } : {};
  const scored = await score(messages, refusal, "").catch(() => null);
  if (scored !== null) keep(messages, text, scored);
}

function forget(why) {
  scoredText = "";
  state.margins = null;
  state.marginsMissing = why;
  changed("scores");
}
