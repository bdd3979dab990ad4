// The curves behind a slider, drawn by uPlot: refused, falsely refused, and the prompt at hand.

import { sigmoid } from "./decision.js";
import { biasOfValue, valueIn } from "./dials.js";
import { colourOf, resolved } from "./palette.js";
import { state } from "./store.js";
import uPlot from "./vendor/uPlot.esm.js";

const HEIGHT = 52;
const STEPS = 100;
const POINT = 4;

export class DialChart {
  #plot = null;
  #drawn = "";
  #x = 0;
  #y = null;

  constructor(category, host) {
    this.category = category;
    this.host = host;
    new ResizeObserver(() => this.#resize()).observe(host);
    for (const scheme of ["dark", "light"]) {
      matchMedia(`(prefers-color-scheme: ${scheme})`).addEventListener("change", () =>
        this.restyle(),
      );
    }
  }

  show(dial, range, bias) {
    const { curve } = state.categories[this.category];
    const margin = state.margins?.[this.category] ?? null;
    this.#x = Math.min(Math.max(valueIn(this.category, dial.mode, bias), range.min), range.max);
    const key = [dial.mode, range.min, range.max, margin].join();
    if (key !== this.#drawn) {
      this.#drawn = key;
      this.data = this.#curves(dial.mode, range, curve, margin);
      this.range = range;
      this.#build();
    }
    this.#y = curve === null ? (margin === null ? null : sigmoid(margin + bias)) : this.#height();
    this.#plot.redraw(false);
  }

  restyle() {
    if (this.data) this.#build();
  }

  #curves(mode, { min, max }, curve, margin) {
    const biases = curve
      ? curve.map((point) => point.bias)
      : Array.from({ length: STEPS + 1 }, (_, i) =>
          biasOfValue(this.category, mode, min + ((max - min) * i) / STEPS),
        );
    const x = biases.map((bias) => valueIn(this.category, mode, bias));
    const none = x.map(() => null);
    return [
      x,
      curve ? curve.map((point) => point.refusal_rate) : none,
      curve ? curve.map((point) => point.false_refusal_rate) : none,
      margin === null ? none : biases.map((bias) => sigmoid(margin + bias)),
    ];
  }

  #height() {
    const [x, y] = this.data;
    const at = x.findIndex((value) => value >= this.#x);
    if (at <= 0) return at < 0 ? y.at(-1) : y[0];
    const span = x[at] - x[at - 1];
    const share = span > 0 ? (this.#x - x[at - 1]) / span : 1;
    return y[at - 1] + share * (y[at] - y[at - 1]);
  }

  #build() {
    this.#plot?.destroy();
    const colour = resolved(colourOf(this.category));
    const muted = resolved("var(--muted)");
    const options = {
      width: Math.max(this.host.clientWidth, 50),
      height: HEIGHT,
      padding: [POINT + 1, 0, POINT + 1, 0],
      cursor: { show: false },
      legend: { show: false },
      axes: [{ show: false }, { show: false }],
      scales: {
        x: { time: false, range: [this.range.min, this.range.max] },
        y: { range: [0, 1] },
      },
      series: [
        {},
        { stroke: colour, width: 2, fill: `${colour}22`, points: { show: false } },
        { stroke: muted, width: 1.5, dash: [4, 3], points: { show: false } },
        { stroke: resolved("var(--text)"), width: 1, dash: [1, 3], points: { show: false } },
      ],
      hooks: { draw: [(plot) => this.#mark(plot, colour)] },
    };
    this.#plot = new uPlot(options, this.data, this.host);
  }

  #mark(plot, colour) {
    const { ctx } = plot;
    const x = plot.valToPos(this.#x, "x", true);
    const unit = devicePixelRatio;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = colour;
    ctx.lineWidth = unit;
    ctx.beginPath();
    ctx.moveTo(x, plot.bbox.top);
    ctx.lineTo(x, plot.bbox.top + plot.bbox.height);
    ctx.stroke();
    if (this.#y !== null) {
      ctx.beginPath();
      ctx.arc(x, plot.valToPos(this.#y, "y", true), POINT * unit, 0, 2 * Math.PI);
      ctx.fill();
    }
    ctx.restore();
  }

  #resize() {
    const width = this.host.clientWidth;
    if (this.#plot && width > 0 && width !== this.#plot.width) {
      this.#plot.setSize({ width, height: HEIGHT });
    }
  }
}
