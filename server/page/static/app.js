// Starts the page: facts of the server, then everything that stands on them.

import { ApiError, setKey } from "./api.js";
import { startBars } from "./bars.js";
import { conversation, startChat } from "./chat.js";
import { startCopy } from "./copy.js";
import { DialView } from "./dialview.js";
import { resetDial } from "./dials.js";
import { byId, el, setText } from "./dom.js";
import { loadFacts, usePolicy } from "./facts.js";
import { startSet } from "./setview.js";
import { watchScores } from "./scores.js";
import { changed, on, state } from "./store.js";

const TABS = ["chat", "set"];

let views = [];

async function load() {
  byId("trouble").hidden = true;
  try {
    await loadFacts();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 401) askForKey(error);
    else showTrouble(error);
    return;
  }
  byId("key-form").hidden = true;
  byId("key").value = "";
  byId("work").hidden = false;
  byId("copy-open").disabled = false;
  setText(byId("model"), state.model);
}

function askForKey(error) {
  const again = !byId("key-form").hidden;
  byId("key-form").hidden = false;
  setText(byId("key-error"), again ? error.message : "");
  byId("key").focus();
}

function showTrouble(error) {
  setText(byId("trouble-text"), error.message);
  byId("trouble").hidden = false;
}

function buildPanel() {
  views = state.categories.map((_, c) => new DialView(c));
  byId("dials").replaceChildren(...views.map((view) => view.node));
  const options = state.policies.map(({ name }) => el("option", { value: name }, name));
  byId("policy").replaceChildren(...options);
  byId("policy").value = state.policy.name;
  byId("policy-choice").hidden = state.policies.length < 2;
  setText(byId("policy-note"), describe(state.policy));
}

function describe(policy) {
  const told = [];
  if (!policy.enforce) told.push("Shadow: everything is answered, decisions are only reported.");
  if (Object.values(policy.categories).some(({ floor, ceiling }) => floor || ceiling)) {
    const outside = policy.outside === "refuse" ? "refused with 403" : "moved to the bound";
    told.push(`Hatched: outside the bounds of ${policy.name}. A request there is ${outside}.`);
  }
  if (state.categories.every(({ curve }) => curve === null)) {
    told.push(
      "No calibration is loaded, so the dials know no rates (rheostat calibrate makes one).",
    );
  }
  if (policy.decision !== "greedy") {
    told.push(`The policy decides by ${policy.decision}; previews show greedy.`);
  }
  return told.join(" ");
}

function showPanel() {
  for (const view of views) view.show();
  const whole = state.objection?.category === null ? state.objection.message : "";
  setText(byId("panel-note"), whole);
}

function chooseTab(name) {
  for (const tab of TABS) {
    const chosen = tab === name;
    byId(tab).hidden = !chosen;
    byId(`tab-${tab}`).setAttribute("aria-selected", chosen);
    byId(`tab-${tab}`).tabIndex = chosen ? 0 : -1;
  }
  changed("tab");
}

function startTabs() {
  TABS.forEach((name, at) => {
    byId(`tab-${name}`).addEventListener("click", () => chooseTab(name));
    byId(`tab-${name}`).addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step === undefined) return;
      const next = TABS[(at + step + TABS.length) % TABS.length];
      chooseTab(next);
      byId(`tab-${next}`).focus();
    });
  });
}

function startControls() {
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    setKey(byId("key").value);
    load();
  });
  byId("retry").addEventListener("click", load);
  byId("policy").addEventListener("change", () => usePolicy(byId("policy").value));
  byId("reset-all").addEventListener("click", () => {
    state.categories.forEach((_, c) => resetDial(c));
  });
  // Only where the panel is a sheet, on a narrow screen, can it be put away.
  byId("panel-toggle").addEventListener("click", () => {
    const collapsed = byId("panel").classList.toggle("collapsed");
    byId("panel-toggle").setAttribute("aria-expanded", !collapsed);
    setText(byId("panel-toggle"), collapsed ? "Show" : "Hide");
  });
  byId("theme").addEventListener("change", () => {
    document.documentElement.dataset.theme = byId("theme").value;
    for (const view of views) view.chart.restyle();
    showPanel();
  });
}

startTabs();
startControls();
on(["policy"], buildPanel);
on(["policy", "dials", "scores"], showPanel);
startBars();
startChat();
startCopy();
startSet(() => chooseTab("chat"));
watchScores(conversation);
load();
