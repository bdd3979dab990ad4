// Files of labelled prompts: JSON Lines, a JSON list, or CSV.

const PROMPT_FIELDS = ["prompt", "messages", "text", "question"];
const LABEL_FIELDS = ["category", "label"];
const BENIGN = new Set(["", "benign", "none", "null", "safe", "answer", "respond"]);

/** The file is not what can be read; the message says where. */
export class ReadingError extends Error {}

/**
 * Returns the file's prompts as [{messages, prompt, label}]: what is scored, its text, and the
 * label as written.
 */
export function readPrompts(text) {
  const start = text.trimStart();
  if (start === "") throw new ReadingError("The file has no prompts.");
  const rows = start.startsWith("{")
    ? jsonLines(text)
    : start.startsWith("[")
      ? list(text)
      : csv(text);
  if (rows.length === 0) throw new ReadingError("The file has no prompts.");
  return rows;
}

/** Returns a label's index in `names`, their count for benign, or -1 where it is no category. */
export function labelIndex(label, names) {
  const at = names.indexOf(label);
  if (at >= 0) return at;
  return BENIGN.has(label.trim().toLowerCase()) ? names.length : -1;
}

/** Returns the records of a CSV text (RFC 4180), as lists of fields. */
export function parseCsv(text, separator = ",") {
  const records = [];
  let record = [];
  let field = "";
  let quoted = false;
  for (let at = text.startsWith("\ufeff") ? 1 : 0; at < text.length; at++) {
    const mark = text[at];
    if (quoted) {
      if (mark !== '"') field += mark;
      else if (text[at + 1] === '"') field += text[++at];
      else quoted = false;
    } else if (mark === '"' && field === "") quoted = true;
    else if (mark === separator) {
      record.push(field);
      field = "";
    } else if (mark === "\n" || mark === "\r") {
      if (mark === "\r" && text[at + 1] === "\n") at++;
      records.push([...record, field]);
      record = [];
      field = "";
    } else field += mark;
  }
  if (quoted) throw new ReadingError("A quote is opened and never closed.");
  if (field !== "" || record.length) records.push([...record, field]);
  return records.filter((fields) => fields.length > 1 || fields[0] !== "");
}

/** Returns a CSV text; no cell is taken for a formula by a spreadsheet. */
export function writeCsv(records) {
  return records.map((record) => `${record.map(cell).join(",")}\r\n`).join("");
}

function cell(value) {
  if (typeof value === "number") return String(value);
  const safe = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
  return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

function jsonLines(text) {
  const rows = [];
  text.split("\n").forEach((line, at) => {
    if (line.trim() === "") return;
    rows.push(rowOf(parsed(line, `line ${at + 1}`), `line ${at + 1}`));
  });
  return rows;
}

function list(text) {
  return parsed(text, "The file").map((entry, at) => rowOf(entry, `entry ${at + 1}`));
}

function parsed(text, where) {
  try {
    return JSON.parse(text);
  } catch {
    throw new ReadingError(`${where} is not JSON.`);
  }
}

function csv(text) {
  const head = text.slice(0, text.search(/[\r\n]|$/));
  const separator = [",", ";", "\t"].reduce((best, mark) =>
    head.split(mark).length > head.split(best).length ? mark : best,
  );
  const [names, ...records] = parseCsv(text, separator);
  const fields = (names ?? []).map((name) => name.trim().toLowerCase());
  if (!PROMPT_FIELDS.some((name) => fields.includes(name))) {
    throw new ReadingError("The first line must name the columns: prompt and category.");
  }
  return records.map((record, at) => {
    const entry = Object.fromEntries(fields.map((name, column) => [name, record[column] ?? ""]));
    delete entry.messages;
    return rowOf(entry, `record ${at + 2}`);
  });
}

function rowOf(entry, where) {
  if (entry === null || typeof entry !== "object") throw new ReadingError(`${where} is no object.`);
  const field = PROMPT_FIELDS.find((name) => entry[name] !== undefined && entry[name] !== "");
  if (field === undefined) throw new ReadingError(`${where} has no prompt.`);
  const value = entry[field];
  const messages = Array.isArray(value) ? value : [{ role: "user", content: String(value) }];
  const last = messages.at(-1)?.content;
  const prompt = typeof last === "string" ? last : JSON.stringify(messages);
  const labelField = LABEL_FIELDS.find((name) => entry[name] !== undefined);
  return { messages, prompt, label: String(entry[labelField] ?? "") };
}
