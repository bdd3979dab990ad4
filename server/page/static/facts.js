// What the server says of itself: categories, policies, calibration, the model's name.

import { getJson } from "./api.js";
import { resetDials } from "./dials.js";
import { changed, state } from "./store.js";

export async function loadFacts() {
  const [policies, categories, models] = await Promise.all([
    getJson("v1/refusal/policies"),
    getJson("v1/refusal/categories"),
    getJson("v1/models"),
  ]);
  // Requests that name no calibration use this one, as the page's do.
  const known = categories.calibrations.includes("default");
  const calibration = known ? await getJson("v1/refusal/calibration") : null;
  const curves = new Map(calibration?.categories.map((entry) => [entry.name, entry.curve]));
  state.model = models.data[0].id;
  state.policies = policies.data;
  state.categories = categories.data.map(({ name, description }) => ({
    name,
    description,
    curve: curves.get(name) ?? null,
  }));
  usePolicy(state.policies[0].name);
}

export function usePolicy(name) {
  state.policy = state.policies.find((policy) => policy.name === name);
  state.solved = null;
  resetDials();
  changed("policy");
}
