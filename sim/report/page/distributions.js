"use strict";
// The distributions of latencies: what share of requests is served within what time.

class Distributions {
  constructor(entries) {
    this.entries = entries;
    this.logarithmic = true;
    this.cursor = null; // {plot, index of a quantile}
    this.draw = onceAFrame(() => this.drawNow());
    this.plots = DISTRIBUTIONS.map(([key, short, long]) => this.plot(key, short, long));
    this.element = html("div", { class: "distributions" }, this.controls(),
      html("div", { class: "cdfs" }, this.plots.map(({ figure }) => figure)));
  }

  controls() {
    const group = html("div", { class: "choice", role: "group", "aria-label": "Time axis" });
    const fill = () => group.replaceChildren(...[["Log", true], ["Linear", false]].map(([label, value]) =>
      html("button", {
        type: "button", "aria-pressed": String(this.logarithmic === value),
        onclick: () => {
          this.logarithmic = value;
          fill();
          group.children[value ? 0 : 1].focus();
          this.draw();
        },
      }, label)));
    fill();
    return html("div", { class: "tools" }, html("span", { class: "hint" }, "Time axis"), group);
  }

  plot(key, short, long) {
    const lines = this.entries
      .map((entry) => ({ entry, quantiles: entry.report.latencies[key] }))
      .filter(({ quantiles }) => quantiles.length);
    const image = svg("svg", {
      role: "img", tabindex: lines.length ? 0 : null, "aria-label": cdfDescription(long, lines, key),
    });
    const figure = html("figure", { class: "cdf" }, html("figcaption", {},
      html("span", { class: "title" }, long, html("span", { class: "unit" }, ` ${short}`))), image);
    const plot = { key, long, lines, image, figure };
    image.addEventListener("pointermove", (event) => this.onMove(plot, event));
    image.addEventListener("pointerdown", (event) => this.onMove(plot, event));
    image.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.read(plot, null));
    document.addEventListener("pointerdown", (event) =>
      this.cursor?.plot === plot && !image.contains(event.target) && this.read(plot, null));
    image.addEventListener("blur", () => this.read(plot, null));
    image.addEventListener("keydown", (event) => this.onKey(plot, event));
    return plot;
  }

  onMove(plot, event) {
    if (!plot.x) return;
    const box = plot.image.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    this.read(plot, nearest(plot, x, y), event.pointerType === "mouse" ? event : null);
  }

  onKey(plot, event) {
    const last = 200;
    const at = this.cursor?.plot === plot ? this.cursor.index : null;
    const step = event.shiftKey ? 10 : 1;
    const to = {
      ArrowRight: Math.min(last, (at ?? 99) + step), ArrowUp: Math.min(last, (at ?? 99) + step),
      ArrowLeft: Math.max(0, (at ?? 101) - step), ArrowDown: Math.max(0, (at ?? 101) - step),
      Home: 0, End: last, Escape: null,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.read(plot, to);
  }

  read(plot, index, pointer = null) {
    this.cursor = index === null ? null : { plot, index };
    this.drawCursor(plot);
    if (index === null) return tooltip.hide();
    const base = plot.lines[0].quantiles[index];
    tooltip.show([
      html("strong", {}, `P${index / 2}`), ` of ${plot.long.toLowerCase()}`,
      html("table", {}, html("tbody", {}, plot.lines.map(({ entry, quantiles }, i) => html("tr", {},
        this.entries.length > 1 ? html("th", { scope: "row" }, marker(entry)) : null,
        html("td", {}, FORMATS.s(quantiles[index])),
        i > 0 && base > 0 ? html("td", {}, signedPercent((100 * (quantiles[index] - base)) / base)) : null)))),
    ], pointer);
  }

  drawNow() {
    for (const plot of this.plots) this.drawPlot(plot);
  }

  drawPlot(plot) {
    const width = plot.image.parentNode.clientWidth;
    if (!width) return;
    const height = 196;
    const [left, right, top, bottom] = [40, width - 12, 8, height - 24];
    build(plot.image, { viewBox: `0 0 ${width} ${height}`, height });
    if (!plot.lines.length) {
      plot.image.replaceChildren(svg("text", { class: "empty", x: width / 2, y: height / 2, "text-anchor": "middle" },
        "Nothing was measured"));
      return;
    }
    const { x, marks } = this.axis(plot, left, right);
    const y = linear(0, 100, bottom, top);
    Object.assign(plot, { x, y });
    plot.image.replaceChildren(
      ...[0, 25, 50, 75, 90, 100].flatMap((share) => [
        svg("line", { class: share ? "grid" : "axis", x1: left, x2: right, y1: y(share), y2: y(share) }),
        svg("text", { class: "label", x: left - 8, y: y(share) + 4, "text-anchor": "end" }, `${share}%`)]),
      ...marks.flatMap((value) => [
        svg("line", { class: "grid", x1: x(value), x2: x(value), y1: top, y2: bottom }),
        svg("text", {
          class: "label", x: x(value), y: height - 6, "text-anchor": x(value) > right - 20 ? "end" : "middle",
        }, trimmed(FORMATS.s(value)))]),
      ...plot.lines.map(({ entry, quantiles }) => svg("path", {
        class: "line", style: `--colour:${colour(entry.index)}`, "stroke-dasharray": dash(entry.index),
        d: cdfPath(quantiles, x, y) })),
      svg("g", { class: "reading" }));
    this.drawCursor(plot);
  }

  // The scale of a plot's times. Where nothing took any time, or all of it the same, it has some width still.
  axis(plot, left, right) {
    const all = plot.lines.flatMap(({ quantiles }) => quantiles);
    const highest = all.reduce((a, b) => Math.max(a, b), 0);
    const room = Math.max(2, Math.floor((right - left) / 64));
    if (!this.logarithmic || highest === 0) {
      const to = highest * 1.02 || 1e-3;
      return { x: linear(0, to, left, right), marks: ticks(0, to, roundStep(to / room)) };
    }
    const lowest = all.reduce((a, b) => (b > 0 ? Math.min(a, b) : a), highest);
    // Six decades say enough: a queue that was empty for a microsecond is an empty queue.
    const from = Math.max(lowest / 1.1, highest / 1e6);
    const ends = from * 1.5 > highest ? [from / 2, highest * 2] : [from, highest * 1.05];
    return { x: logarithmic(...ends, left, right), marks: logTicks(...ends, room) };
  }

  drawCursor(plot) {
    const reading = plot.image.querySelector(".reading");
    if (!reading) return;
    if (this.cursor?.plot !== plot) return reading.replaceChildren();
    const { index } = this.cursor;
    const level = plot.y(index / 2);
    reading.replaceChildren(
      svg("line", { class: "cursor", x1: 40, x2: plot.image.viewBox.baseVal.width - 12, y1: level, y2: level }),
      ...plot.lines.map(({ entry, quantiles }) => svg("circle", {
        cx: plot.x(quantiles[index]), cy: level, r: 4, style: `--colour:${colour(entry.index)}` })));
  }
}

// The quantile whose point on any of the curves is nearest: it reads steep and flat parts alike.
function nearest({ lines, x, y }, left, top) {
  let [best, least] = [0, Infinity];
  for (const { quantiles } of lines) {
    quantiles.forEach((value, index) => {
      const distance = (x(value) - left) ** 2 + (y(index / 2) - top) ** 2;
      if (distance < least) [best, least] = [index, distance];
    });
  }
  return best;
}

const cdfPath = (quantiles, x, y) =>
  quantiles.map((value, index) => `${index ? "L" : "M"}${x(value).toFixed(1)} ${y(index / 2).toFixed(1)}`).join("");

function cdfDescription(long, lines, key) {
  const parts = lines.map(({ entry }) => {
    const { p50, p90, p99 } = entry.report.summary[key];
    return `${entry.letter}: P50 ${FORMATS.s(p50)}, P90 ${FORMATS.s(p90)}, P99 ${FORMATS.s(p99)}`;
  });
  return `Distribution of ${long.toLowerCase()}. ${parts.join("; ") || "Nothing was measured"}`;
}
