// Requests to this server. The key lives in this module's memory and nowhere else.

// The page may stand behind a gateway's prefix.
const BASE = new URL(".", document.baseURI);
export const origin = BASE.href.replace(/\/$/, "");

let key = "";

export function setKey(text) {
  key = text.trim();
}

export const hasKey = () => key !== "";

/** What the server refused, in its own words. Status 0: it did not answer. */
export class ApiError extends Error {
  constructor(status, message, param = null) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

export async function getJson(path) {
  return (await ask(path, {})).json();
}

export async function postJson(path, body, signal) {
  return (await post(path, body, signal)).json();
}

/** Yields the events of a streamed answer. */
export async function* stream(path, body, signal) {
  const response = await post(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await readOrFail(reader);
    if (done) return;
    const events = (buffer + value).split("\n\n");
    buffer = events.pop();
    for (const event of events) {
      const data = event.startsWith("data: ") ? event.slice(6) : "";
      if (data === "" || data === "[DONE]") continue;
      const told = JSON.parse(data);
      if (told.error) throw failureOf(told.error.code ?? 500, told);
      yield told;
    }
  }
}

function post(path, body, signal) {
  const headers = { "content-type": "application/json" };
  return ask(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

async function ask(path, options) {
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(new URL(path, BASE), { ...options, headers, credentials: "omit" });
  } catch (error) {
    throw unreachable(error);
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  throw failureOf(response.status, told);
}

async function readOrFail(reader) {
  try {
    return await reader.read();
  } catch (error) {
    throw unreachable(error);
  }
}

function unreachable(error) {
  if (error.name === "AbortError") return error;
  return new ApiError(0, "The server does not answer. Is it still running? Try again when it is.");
}

function failureOf(status, told) {
  const message = told?.error?.message ?? `the server answered with status ${status}`;
  return new ApiError(Number(status) || 500, String(message), told?.error?.param ?? null);
}
