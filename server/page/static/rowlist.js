// A long list of which only the rows in sight exist.

import { el, setStyle, setText } from "./dom.js";

const ROW_HEIGHT = 32;
const SPARE_ROWS = 6;

export class RowList {
  /**
   * columns: [{key, title, className}]. fill(row) returns a row's cells: texts, or
   * {text, colour}. open(row) is called for the row that is clicked; sort(key) for a heading.
   */
  constructor({ label, columns, fill, open, sort }) {
    this.columns = columns;
    this.fill = fill;
    this.open = open;
    this.rows = new Int32Array(0);
    this.lines = [];
    this.heads = columns.map(({ key, title, className }) =>
      el(
        "span",
        { role: "columnheader", class: className },
        el("button", { type: "button", class: "quiet", onclick: () => sort(key) }, title),
      ),
    );
    this.spacer = el("div", { class: "spacer", role: "presentation" });
    this.body = el(
      "div",
      {
        class: "rows",
        role: "rowgroup",
        tabindex: 0,
        "aria-label": label,
        onscroll: () => this.draw(),
      },
      this.spacer,
    );
    const head = el("div", { class: "row head", role: "row" }, ...this.heads);
    this.node = el(
      "div",
      { class: "list", role: "table", "aria-label": label },
      el("div", { role: "rowgroup" }, head),
      this.body,
    );
    new ResizeObserver(() => this.draw()).observe(this.body);
  }

  /** rows: Int32Array of what is listed, in order. */
  show(rows, sorted, rising) {
    this.rows = rows;
    this.node.setAttribute("aria-rowcount", rows.length + 1);
    this.columns.forEach(({ key }, at) => {
      const direction = key !== sorted ? "none" : rising ? "ascending" : "descending";
      this.heads[at].setAttribute("aria-sort", direction);
    });
    setStyle(this.spacer, "height", `${rows.length * ROW_HEIGHT}px`);
    this.draw();
  }

  draw() {
    const first = Math.max(0, Math.floor(this.body.scrollTop / ROW_HEIGHT) - SPARE_ROWS / 2);
    const room = Math.ceil(this.body.clientHeight / ROW_HEIGHT) + SPARE_ROWS;
    const count = Math.min(room, Math.max(this.rows.length - first, 0));
    while (this.lines.length < count) this.#addLine();
    this.lines.forEach((line, at) => {
      line.node.hidden = at >= count;
      if (at < count) this.#fill(line, first + at);
    });
  }

  #addLine() {
    const line = { row: -1 };
    line.button = el("button", { type: "button", onclick: () => this.open(line.row) });
    line.cells = this.columns.map(({ className }, at) =>
      el("span", { role: "cell", class: className }, at === 0 ? line.button : ""),
    );
    line.node = el("div", { class: "row", role: "row" }, ...line.cells);
    this.lines.push(line);
    this.spacer.append(line.node);
  }

  #fill(line, place) {
    line.row = this.rows[place];
    line.node.setAttribute("aria-rowindex", place + 2);
    setStyle(line.node, "transform", `translateY(${place * ROW_HEIGHT}px)`);
    this.fill(line.row).forEach((cell, at) => {
      const { text, colour } = typeof cell === "string" ? { text: cell, colour: "" } : cell;
      setText(at === 0 ? line.button : line.cells[at], text);
      setStyle(line.cells[at], "color", colour);
    });
  }
}
