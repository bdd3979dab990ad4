// What the server says of itself: categories, policies, calibration, the model's name.

import { ApiError, getJson } from "./api.js";
import { resetDials } from "./dials.js";
import { changed, state } from "./store.js";

export async function loadFacts() {
  const [policies, categories, models, calibration] = await Promise.all([
    getJson("v1/refusal/policies"),
    getJson("v1/refusal/categories"),
    getJson("v1/models"),
    loadCalibration(),
  ]);
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

async function loadCalibration() {
  try {
    return await getJson("v1/refusal/calibration");
  } catch (error) {
    if (error instanceof ApiError && error.status === 404) return null;
    throw error;
  }
}
