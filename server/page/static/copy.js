// The dials as something to take away: a request, or a policy.

import { hasKey, origin } from "./api.js";
import { conversation } from "./chat.js";
import { defaultsOf, requestedRefusal, written } from "./dials.js";
import { byId, setText } from "./dom.js";
import { state } from "./store.js";

const FORMATS = {
  curl: asCurl,
  python: asPython,
  defaults: () => asPolicy("defaults"),
  floors: () => asPolicy("floors"),
};

export function startCopy() {
  const dialog = byId("copy-dialog");
  byId("copy-open").addEventListener("click", () => {
    show();
    dialog.showModal();
  });
  byId("copy-format").addEventListener("change", show);
  byId("copy-close").addEventListener("click", () => dialog.close());
  byId("copy-text").addEventListener("click", copy);
}

function show() {
  setText(byId("copy-code"), FORMATS[byId("copy-format").value]());
  setText(byId("copy-status"), "");
}

async function copy() {
  const text = byId("copy-code").textContent;
  try {
    await navigator.clipboard.writeText(text);
    setText(byId("copy-status"), "Copied.");
  } catch {
    // A page that did not come by https may not write the clipboard.
    getSelection().selectAllChildren(byId("copy-code"));
    setText(byId("copy-status"), "Selected: press Ctrl+C to copy.");
  }
}

function request() {
  const messages = conversation() ?? [{ role: "user", content: "Hello" }];
  return { model: state.model, messages, refusal: requestedRefusal(state.policy.report) };
}

export function asCurl(body = request()) {
  const quoted = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  const lines = [`curl '${origin}/v1/chat/completions'`, "-H 'Content-Type: application/json'"];
  if (hasKey()) lines.push('-H "Authorization: Bearer $RHEOSTAT_KEY"');
  return [...lines, `-d '${quoted}'`].join(" \\\n  ");
}

export function asPython(body = request()) {
  return `import os

from openai import OpenAI

client = OpenAI(base_url=${python(`${origin}/v1`)}, api_key=os.environ.get("RHEOSTAT_KEY", "unused"))
answer = client.chat.completions.create(
    model=${python(body.model)},
    messages=${python(body.messages)},
    extra_body=${python({ refusal: body.refusal })},
)
message = answer.choices[0].message
print(message.refusal or message.content)
`;
}

/** Writes JSON's values as Python's. */
function python(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value !== "object") return literal(value);
  const entries = Object.entries(value).map(
    ([name, entry]) => `${literal(name)}: ${python(entry)}`,
  );
  return `{${entries.join(", ")}}`;
}

// JSON's strings are Python's and YAML's too, but for line ends that only Unicode knows.
function literal(value) {
  return JSON.stringify(value).replace(
    /[\u007f-\u009f\u2028\u2029\ufeff]/g,
    (mark) => `\\u${mark.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
}

/**
 * Writes a policy file that pins the dials: as defaults, or as the least that requests may ask.
 * What stands as trained is left out.
 */
export function asPolicy(kind) {
  const biases = defaultsOf(state.policy);
  const pinned = state.categories.flatMap(({ name }, c) => {
    const dial = state.dials[c];
    if (!dial.moved && biases[c] === 0) return [];
    return [`${literal(name)}: ${yaml(dial.moved ? written(dial) : writtenBias(biases[c]))}`];
  });
  const dials = `{${pinned.join(", ")}}`;
  return `version: 1
policies:
  from-the-page:
    ${kind === "floors" ? `floors: ${dials}` : `defaults: {categories: ${dials}}`}
# Whom it is for: everybody, or tenants with keys (\`rheostat policy hash-key\` makes one).
anonymous: from-the-page
`;
}

function writtenBias(bias) {
  if (bias === Infinity) return "always";
  if (bias === -Infinity) return "never";
  return { bias: Number(bias.toPrecision(6)) };
}

function yaml(dial) {
  if (typeof dial !== "object") return String(dial);
  const [[mode, value]] = Object.entries(dial);
  return `{${mode}: ${value}}`;
}
