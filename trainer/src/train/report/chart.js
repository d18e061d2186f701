"use strict";
// A line chart against steps. A series is {name, color, dash, x: [step, …], y: [number or null, …]}.

const COLORS = 8;
const DASHES = ["", "6 4", "2 3", "9 3 2 3"];
const LEFT = 64, RIGHT = 10, TOP = 16, BOTTOM = 24;

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const html = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const known = (value) => typeof value === "number" && Number.isFinite(value);

function shown(value) {
  if (!known(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(2);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}

// Round numbers between low and high, about `many` of them.
function ticks(low, high, many) {
  const raw = (high - low) / many, unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((times) => times * unit >= raw) * unit;
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high + step * 1e-9; n++) found.push(Number((n * step).toPrecision(12)));
  return found;
}

// The exponential mean of what came before, as TensorBoard smooths; null stays null.
function smoothed(values, weight) {
  if (weight === 0) return values;
  let last = 0, seen = 0;
  return values.map((value) => {
    if (!known(value)) return null;
    last = last * weight + (1 - weight) * value;
    seen += 1;
    return last / (1 - weight ** seen);
  });
}

function nearest(x, at) {
  let low = 0, high = x.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (x[middle] <= at) low = middle; else high = middle;
  }
  return at - x[low] <= x[high] - at ? low : high;
}

class Chart {
  // `whole`: never smoothed, because the points are few. `marks`: [{step, label, color}], drawn as vertical lines.
  constructor(parent, title, series, { height = 220, whole = false, marks = [], format = shown } = {}) {
    this.title = title;
    this.height = height;
    this.whole = whole;
    this.marks = marks;
    this.format = format;
    this.series = series;
    this.hidden = new Set();
    this.weight = 0;
    this.plot = html("div", { class: "plot", tabindex: "0", role: "img" });
    this.tip = html("div", { class: "tip", role: "status", hidden: "" });
    this.figure = html("figure", {}, html("figcaption", {}, title), this.plot);
    if (series.length > 1) this.figure.append(this.legend());
    parent.append(this.figure);
    this.plot.addEventListener("pointermove", (event) => this.point(event.clientX - this.plot.getBoundingClientRect().left));
    this.plot.addEventListener("pointerleave", () => this.leave());
    this.plot.addEventListener("blur", () => this.leave());
    this.plot.addEventListener("keydown", (event) => this.key(event));
    this.width = 0;
    // A frame later: what is drawn changes sizes that are being observed.
    new ResizeObserver(() => requestAnimationFrame(() => {
      if (this.plot.clientWidth !== this.width) this.draw();
    })).observe(this.plot);
    this.draw();
  }

  legend() {
    const buttons = this.series.map((series, index) => {
      const key = svg("svg", { class: "key", viewBox: "0 0 18 8", "aria-hidden": "true" },
        svg("line", { x1: 0, x2: 18, y1: 4, y2: 4, stroke: color(series), "stroke-dasharray": DASHES[series.dash] }));
      const button = html("button", { type: "button", "aria-pressed": "true" }, key, series.name);
      button.addEventListener("click", () => {
        if (!this.hidden.delete(index)) this.hidden.add(index);
        button.setAttribute("aria-pressed", String(!this.hidden.has(index)));
        this.draw();
      });
      return button;
    });
    return html("div", { class: "legend" }, ...buttons);
  }

  smooth(weight) {
    if (this.whole) return;
    this.weight = weight;
    this.draw();
  }

  draw() {
    const width = this.width = this.plot.clientWidth || 420;
    const lines = this.lines = this.series.filter((_, index) => !this.hidden.has(index))
      .map((series) => ({ ...series, line: smoothed(series.y, this.weight) }));
    const x = lines.flatMap((series) => series.x.filter((_, n) => known(series.y[n])));
    const y = lines.flatMap((series) => series.y.concat(this.weight ? series.line : [])).filter(known);
    const frame = svg("svg", { viewBox: `0 0 ${width} ${this.height}`, height: this.height, "aria-hidden": "true" });
    this.plot.replaceChildren(frame, this.tip);
    this.leave();
    this.plot.setAttribute("aria-label", this.label(lines));
    if (y.length === 0) {
      frame.append(svg("text", { x: width / 2, y: this.height / 2, "text-anchor": "middle" }, "no values"));
      this.span = null;
      return;
    }
    const extent = (values) => values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
    let [left, right] = extent(x), [low, high] = extent(y);
    if (left === right) [left, right] = [left - 1, right + 1];
    // Values that differ by rounding alone are a flat line: there are no ticks between them.
    const size = Math.max(Math.abs(low), Math.abs(high)), flat = high - low <= size * 1e-9;
    const room = flat ? size * 0.05 || 1 : (high - low) * 0.06;
    // What is never negative keeps its zero.
    [low, high] = [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
    const across = (step) => LEFT + (step - left) / (right - left) * (width - LEFT - RIGHT);
    const down = (value) => TOP + (high - value) / (high - low) * (this.height - TOP - BOTTOM);
    this.span = { left, right, across, down };

    for (const value of ticks(low, high, 6)) {
      frame.append(
        svg("line", { class: "grid-line", x1: LEFT, x2: width - RIGHT, y1: down(value), y2: down(value) }),
        svg("text", { x: LEFT - 6, y: down(value) + 4, "text-anchor": "end" }, this.format(value)));
    }
    for (const step of ticks(left, right, Math.max(2, width / 110)).filter(Number.isInteger)) {
      const anchor = across(step) > width - RIGHT - 16 ? "end" : "middle";
      frame.append(svg("text", { x: across(step), y: this.height - 7, "text-anchor": anchor }, step.toLocaleString("en")));
    }
    frame.append(svg("text", { x: LEFT - 12, y: this.height - 7, "text-anchor": "end" }, "step"));
    const bottom = this.height - BOTTOM;
    frame.append(svg("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: bottom, y2: bottom }));
    for (const { step, label, color: number } of this.marks.filter(({ step }) => step >= left && step <= right)) {
      const place = across(step), stroke = number === null ? "var(--soft)" : `var(--c${number % COLORS})`;
      frame.append(svg("line", { class: "mark", x1: place, x2: place, y1: TOP, y2: bottom, stroke }));
      if (label) {
        const end = place > width - 30;
        frame.append(svg("text", { x: place, y: TOP - 5, "text-anchor": end ? "end" : "middle" }, label));
      }
    }
    for (const series of lines) {
      if (this.weight) frame.append(this.path(series, series.y, "raw"));
      frame.append(this.path(series, series.line, "line"));
      // A point without neighbours is no line; where there are few, each is shown.
      const few = series.x.length <= 40;
      series.line.forEach((value, n) => {
        const alone = !known(series.line[n - 1]) && !known(series.line[n + 1]);
        if (known(value) && (few || alone)) {
          frame.append(svg("circle", { cx: across(series.x[n]), cy: down(value), r: few && !alone ? 2.2 : 3, fill: color(series) }));
        }
      });
    }
    this.frame = frame;
  }

  path(series, values, kind) {
    let d = "", pen = false;
    values.forEach((value, n) => {
      if (!known(value)) { pen = false; return; }
      d += `${pen ? "L" : "M"}${this.span.across(series.x[n]).toFixed(1)} ${this.span.down(value).toFixed(1)}`;
      pen = true;
    });
    return svg("path", { class: kind, d, stroke: color(series), "stroke-dasharray": DASHES[series.dash] });
  }

  label(lines) {
    const parts = lines.slice(0, 8).map((series) => {
      const all = series.y.map((value, n) => [series.x[n], value]).filter(([, value]) => known(value));
      if (all.length === 0) return `${series.name}: no values`;
      const [first, last] = [all[0], all[all.length - 1]];
      return `${series.name}: ${this.format(first[1])} at step ${first[0]}, ${this.format(last[1])} at step ${last[0]}`;
    });
    const best = this.marks.map(({ step, label }) => (label ? ` Marked: ${label}, step ${step}.` : "")).join("");
    return `${this.title}. ${parts.join("; ")}.${best} Arrow keys read values.`;
  }

  point(place) {
    if (!this.span) return;
    const { left, right } = this.span;
    const at = left + (place - LEFT) / (this.width - LEFT - RIGHT) * (right - left);
    const steps = this.lines.filter((series) => series.x.length > 0).map((series) => series.x[nearest(series.x, at)]);
    if (steps.length === 0) return;
    this.read(steps.reduce((best, step) => Math.abs(step - at) < Math.abs(best - at) ? step : best));
  }

  key(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") this.leave();
    if (move === undefined || !this.span) return;
    event.preventDefault();
    const steps = [...new Set(this.lines.flatMap((series) => series.x))].sort((a, b) => a - b);
    const here = this.at === null ? (move > 0 ? -1 : steps.length) : nearest(steps, this.at);
    this.read(steps[Math.min(steps.length - 1, Math.max(0, here + move))]);
  }

  read(step) {
    this.at = step;
    const place = this.span.across(step);
    this.cross?.remove();
    this.cross = svg("line", { class: "cross", x1: place, x2: place, y1: TOP, y2: this.height - BOTTOM });
    this.frame.append(this.cross);
    const values = this.lines.filter((series) => series.x.length > 0).map((series) => {
      const n = nearest(series.x, step);
      const raw = this.weight && known(series.y[n]) ? ` (${this.format(series.y[n])})` : "";
      return { series, value: series.line[n], text: this.format(series.line[n]) + raw };
    });
    const most = 12;
    const rows = values.filter(({ value }) => known(value)).sort((a, b) => b.value - a.value).slice(0, most)
      .map(({ series, text }) => html("div", { style: `color: ${color(series)}` }, html("span", {}, series.name), html("span", {}, text)));
    if (rows.length === 0) rows.push(html("div", {}, "no number"));
    if (values.length > most) rows.push(html("div", {}, `and ${values.length - most} more`));
    this.tip.replaceChildren(html("strong", {}, `step ${step.toLocaleString("en")}`), ...rows);
    this.tip.hidden = false;
    const half = place > this.width / 2;
    this.tip.style.left = half ? "auto" : `${place + 10}px`;
    this.tip.style.right = half ? `${this.width - place + 10}px` : "auto";
  }

  leave() {
    this.at = null;
    this.cross?.remove();
    this.tip.hidden = true;
  }
}

const color = (series) => `var(--c${series.color % COLORS})`;
