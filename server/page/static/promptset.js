// A set of prompts and its margins. It is scored once; every dial after that is arithmetic.

import { ApiError, postJson } from "./api.js";
import { state } from "./store.js";
import { labelIndex } from "./reading.js";

const SCORE = "v1/refusal/score";
const PIECE = 128;
const PIECE_CHARACTERS = 200_000;
const PLACE_OF_INPUT = /^inputs\.(\d+)/;

export class PromptSet {
  /** rows: as `readPrompts` returns them. */
  constructor(name, rows) {
    this.name = name;
    this.rows = rows;
    this.next = 0;
    this.failed = [];
    this.count = 0;
    this.categories = state.categories.map((category) => category.name);
    this.kept = new Int32Array(rows.length);
    this.margins = new Float32Array(rows.length * this.categories.length);
    this.labels = Int16Array.from(rows, (row) => labelIndex(row.label, this.categories));
  }

  get total() {
    return this.rows.length;
  }

  get done() {
    return this.next === this.rows.length;
  }

  /** Scores what is left; `progress` is called after every piece. Ends early by `signal`. */
  async score(signal, progress) {
    while (!this.done) {
      const piece = this.#piece();
      const answers = await this.#ask(piece, signal);
      for (const [row, decisions] of answers) this.#keep(row, decisions);
      this.next += piece.length;
      progress();
    }
  }

  /** Returns the set of what was scored, as dense arrays. */
  scored() {
    const kept = this.kept.subarray(0, this.count);
    return {
      rows: Array.from(kept, (row) => this.rows[row]),
      labels: Int16Array.from(kept, (row) => this.labels[row]),
      margins: this.margins.subarray(0, this.count * this.categories.length),
    };
  }

  #piece() {
    const piece = [];
    let characters = 0;
    for (let row = this.next; row < this.rows.length && piece.length < PIECE; row++) {
      characters += JSON.stringify(this.rows[row].messages).length;
      if (piece.length && characters > PIECE_CHARACTERS) break;
      piece.push(row);
    }
    return piece;
  }

  // An input that the server refuses is left out and told; the others are asked again.
  async #ask(piece, signal) {
    let rows = piece;
    const refusal = state.policies.length > 1 ? { policy: state.policy.name } : {};
    while (rows.length) {
      const inputs = rows.map((row) => ({ messages: this.rows[row].messages }));
      try {
        const answer = await postJson(SCORE, { model: state.model, inputs, refusal }, signal);
        return rows.map((row, at) => [row, answer.data[at].decisions]);
      } catch (error) {
        const wrong = error instanceof ApiError ? PLACE_OF_INPUT.exec(error.param ?? "") : null;
        if (wrong === null) throw error;
        this.failed.push({ row: rows[Number(wrong[1])], message: error.message });
        rows = rows.toSpliced(Number(wrong[1]), 1);
      }
    }
    return [];
  }

  #keep(row, decisions) {
    this.categories.forEach((name, c) => {
      this.margins[this.count * this.categories.length + c] = decisions[name].margin ?? NaN;
    });
    this.kept[this.count++] = row;
  }
}
