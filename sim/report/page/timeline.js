"use strict";
// The replay over time: panels that share one time axis, its selection, and a cursor that reads all of them.

const perSecond = (sums, timeline) => sums.map((sum) => (timeline.bucket_s ? sum / timeline.bucket_s : 0));

const meanOf = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const highestOf = (values) => values.reduce((a, b) => Math.max(a, b));

const PANELS = [
  { title: "Requests", unit: "mean", format: "count", series: [
    { name: "running", values: (t) => t.running, fill: true },
    { name: "waiting", values: (t) => t.waiting },
    { name: "swapped", values: (t) => t.swapped }] },
  { title: "Tokens a second", unit: "", suffix: " tokens/s", format: "1/s", stacked: true, series: [
    { name: "prefill", values: (t) => perSecond(t.prefill_tokens, t), fill: true },
    { name: "decode", values: (t) => perSecond(t.decode_tokens, t), fill: true }] },
  { title: "Batch", unit: "tokens a step", suffix: " tokens", format: "count", series: [
    { name: "batch", values: (t) => t.batch_tokens, fill: true }] },
  { title: "KV blocks", unit: "", suffix: " blocks", format: "count", limit: (report) => report.summary.kv.num_blocks, series: [
    { name: "used", values: (t) => t.used_blocks, fill: true },
    { name: "peak", values: (t) => t.peak_blocks, combine: highestOf }] },
  { title: "Prefix cache and waste", unit: "", format: "share", series: [
    { name: "hit rate", values: (t) => t.hit_rate },
    { name: "cached share", values: (t) => t.cached_share },
    { name: "unwritten share", values: (t) => t.unwritten_share }] },
  { title: "Requests a second", unit: "", suffix: "/s", format: "1/s", series: [
    { name: "arrived", values: (t) => perSecond(t.arrivals, t), fill: true },
    { name: "finished", values: (t) => perSecond(t.finished, t) },
    { name: "within the SLO", needs: "good", values: (t) => perSecond(t.good, t) }] },
  { title: "Replicas", unit: "up", format: "count", series: [
    { name: "up", needs: "replicas", values: (t) => t.replicas, fill: true }] },
  { title: "Preemptions", unit: "most in a bucket", format: "count", whole: true, series: [
    { name: "preemptions", values: (t) => t.preemptions, fill: true, combine: highestOf }] },
];

class Timeline {
  // entries: {report, index, letter, name}
  constructor(entries) {
    this.entries = entries.map((entry) => ({ ...entry, values: seriesValues(entry.report.timeline) }));
    const ends = this.entries.map(({ report: { timeline } }) => endOf(timeline));
    this.end = Math.max(...ends) || 1e-3;
    this.smallest = Math.min(this.end, 4 * Math.min(...this.entries.map(({ report }) => bucketOf(report.timeline))));
    this.view = [0, this.end];
    this.cursor = null;
    this.shown = entries.length > 1 ? null : this.entries[0]; // null: all of them, one series a panel
    this.hidden = new Set(); // series, where one report is shown
    this.chosen = new Map(PANELS.map((panel) => [panel, panel.series[0]])); // where all are
    this.draw = onceAFrame(() => this.drawNow());
    this.panels = PANELS.map((panel) => ({ panel, ...panelFrame(panel) }));
    this.overview = svg("svg", { class: "overview", role: "img", "aria-label": "The part of the replay that is shown" });
    this.plots = html("div", {
      class: "plots", tabindex: 0, role: "group",
      "aria-label": "Timeline. Arrow keys move the cursor, plus and minus zoom, page up and page down move "
        + "along, 0 shows everything.",
    }, this.panels.map(({ figure }) => figure));
    this.element = html("div", { class: "timeline" }, this.controls(), this.plots, this.overview);
    this.listen();
  }

  // Controls

  controls() {
    const zoom = (label, name, action) =>
      html("button", { type: "button", "aria-label": name, title: name, onclick: action }, label);
    this.range = html("output", { class: "range" });
    const choice = this.entries.length > 1 ? this.choice() : null;
    return html("div", { class: "tools" }, choice, this.range, html("span", { class: "buttons" },
      zoom("+", "Zoom in", () => this.zoom(0.5)),
      zoom("−", "Zoom out", () => this.zoom(2)),
      zoom("All", "Show everything", () => this.show(0, this.end))));
  }

  choice() {
    const options = [null, ...this.entries];
    const group = html("div", { class: "choice", role: "group", "aria-label": "Reports shown" });
    const fill = () => group.replaceChildren(...options.map((entry) =>
      html("button", {
        type: "button", "aria-pressed": String(this.shown === entry),
        onclick: () => {
          this.shown = entry;
          fill();
          group.children[options.indexOf(entry)].focus();
          this.draw();
        },
      }, entry === null ? "Overlay" : marker(entry))));
    fill();
    return group;
  }

  // One report: a button hides its series. All reports: it chooses the series that is compared.
  legend({ panel, legend, unit }) {
    const overlay = this.shown === null;
    unit.textContent = panel.stacked && !overlay ? " stacked" : ` ${panel.unit}`;
    if (panel.series.length === 1) return;
    const focused = [...legend.children].indexOf(document.activeElement);
    legend.replaceChildren(...panel.series.map((series, index) => html("button", {
      type: "button", class: overlay ? "series overlaid" : "series", style: `--colour:${colour(index)}`,
      "aria-pressed": String(overlay ? this.chosen.get(panel) === series : !this.hidden.has(series)),
      onclick: () => {
        if (overlay) this.chosen.set(panel, series);
        else if (!this.hidden.delete(series)) this.hidden.add(series);
        this.draw();
      },
    }, series.name)));
    legend.children[focused]?.focus();
  }

  // The view

  show(from, to) {
    const width = Math.min(this.end, Math.max(this.smallest, to - from));
    const start = Math.min(Math.max(0, from), this.end - width);
    this.view = [start, start + width];
    this.draw();
  }

  zoom(factor) {
    const [from, to] = this.view;
    const at = this.cursor !== null && this.cursor >= from && this.cursor <= to ? this.cursor : (from + to) / 2;
    this.show(at - (at - from) * factor, at + (to - at) * factor);
  }

  pan(share) {
    const [from, to] = this.view;
    this.show(from + share * (to - from), to + share * (to - from));
  }

  moveCursor(time, pointer = null) {
    this.cursor = time === null ? null : Math.min(this.view[1], Math.max(this.view[0], time));
    this.drawCursor();
    if (this.cursor === null) tooltip.hide();
    else tooltip.show(this.reading(), pointer);
  }

  // Input

  listen() {
    this.plots.addEventListener("pointermove", (event) => this.onMove(event));
    this.plots.addEventListener("pointerdown", (event) => this.onDown(event));
    this.plots.addEventListener("pointerleave", (event) => {
      if (event.pointerType === "mouse" && !this.dragged) this.moveCursor(null);
    });
    this.plots.addEventListener("pointerup", (event) => this.onUp(event));
    this.plots.addEventListener("pointercancel", () => this.endDrag());
    this.plots.addEventListener("dblclick", () => this.show(0, this.end));
    this.plots.addEventListener("keydown", (event) => this.onKey(event));
    this.plots.addEventListener("blur", () => this.moveCursor(null));
    this.overview.addEventListener("pointerdown", (event) => this.onOverview(event));
    // What a finger has read stays until it touches something else.
    document.addEventListener("pointerdown", (event) => this.plots.contains(event.target) || this.moveCursor(null));
  }

  timeAt(event) {
    return this.x.invert(event.clientX - this.plots.getBoundingClientRect().left);
  }

  onDown(event) {
    if (event.button !== 0 || !event.target.closest("svg")) return;
    if (event.pointerType === "mouse") {
      this.dragged = [event.clientX, this.timeAt(event)];
      this.plots.setPointerCapture(event.pointerId);
    } else this.moveCursor(this.timeAt(event));
  }

  onMove(event) {
    if (!event.target.closest("svg") && !this.dragged) return this.moveCursor(null);
    this.moveCursor(this.timeAt(event), event.pointerType === "mouse" ? event : null);
  }

  // A drag of a few pixels is a click that shook.
  onUp(event) {
    if (this.dragged && Math.abs(event.clientX - this.dragged[0]) > 4) {
      const ends = [this.dragged[1], this.timeAt(event)].sort((a, b) => a - b);
      this.show(Math.max(0, ends[0]), ends[1]);
    }
    this.endDrag();
  }

  endDrag() {
    this.dragged = undefined;
    this.drawCursor();
  }

  onKey(event) {
    if (event.target !== this.plots || event.ctrlKey || event.metaKey || event.altKey) return;
    const bucket = Math.min(...this.visible().map(({ report }) => bucketOf(report.timeline)));
    const step = event.shiftKey ? (this.view[1] - this.view[0]) / 20 : bucket;
    // In the middle of a bucket, so that rounding never reads its neighbour.
    const at = this.cursor ?? (Math.floor((this.view[0] + this.view[1]) / 2 / bucket) - 0.5) * bucket;
    const actions = {
      ArrowLeft: () => this.moveCursor(at - step),
      ArrowRight: () => this.moveCursor(at + step),
      Home: () => this.moveCursor(this.view[0]),
      End: () => this.moveCursor(this.view[1]),
      PageUp: () => this.pan(-0.5),
      PageDown: () => this.pan(0.5),
      "+": () => this.zoom(0.5), "=": () => this.zoom(0.5),
      "-": () => this.zoom(2),
      0: () => this.show(0, this.end),
      Escape: () => this.moveCursor(null),
    };
    if (!(event.key in actions)) return;
    event.preventDefault();
    actions[event.key]();
  }

  // In the overview a handle moves one end of the view, its inside both, and a drag beside it begins anew.
  onOverview(event) {
    const left = this.overview.getBoundingClientRect().left;
    const timeAt = (moved) => this.whole.invert(moved.clientX - left);
    const [from, to] = this.view;
    const near = event.pointerType === "mouse" ? 8 : 22;
    const start = timeAt(event);
    const distance = (time) => Math.abs(this.whole(time) - (event.clientX - left));
    let move = (time) => this.show(Math.min(start, time), Math.max(start, time));
    if (Math.min(distance(from), distance(to)) < near) {
      const fixed = distance(from) < distance(to) ? to : from;
      move = (time) => this.show(Math.min(fixed, time), Math.max(fixed, time));
    } else if (start > from && start < to) move = (time) => this.show(from + time - start, to + time - start);
    const follow = (moved) => move(Math.min(this.end, Math.max(0, timeAt(moved))));
    this.overview.setPointerCapture(event.pointerId);
    this.overview.addEventListener("pointermove", follow);
    const stop = () => this.overview.removeEventListener("pointermove", follow);
    this.overview.addEventListener("pointerup", stop, { once: true });
    this.overview.addEventListener("pointercancel", stop, { once: true });
    event.preventDefault();
  }

  // Drawing

  visible() {
    return this.shown === null ? this.entries : [this.shown];
  }

  drawNow() {
    const width = this.plots.clientWidth;
    if (!width) return;
    const left = width < 600 ? 44 : 56;
    this.x = linear(...this.view, left, width - 8);
    this.step = clockStep((this.view[1] - this.view[0]) / Math.max(2, Math.floor((width - left) / 110)));
    this.times = ticks(...this.view, this.step);
    this.range.value = `${clock(this.view[0], this.step)} to ${clock(this.view[1], this.step)}`;
    for (const frame of this.panels) {
      this.legend(frame);
      this.drawPanel(frame, width, left, isLast(this.panels, this.panels.indexOf(frame)));
    }
    this.drawOverview(width, left);
    this.drawCursor();
  }

  // The lines of a panel: values of each bucket, stacked or not, with what they are drawn in. Buckets that are
  // narrower than three pixels are drawn several as one; the tooltip reads them apart all the same.
  lines(panel) {
    if (this.shown === null) {
      const series = this.chosen.get(panel);
      return this.entries.map((entry) => ({
        ...this.coarse(entry, series), base: null, fill: false, colour: colour(entry.index),
      }));
    }
    const lines = [];
    let base = null;
    panel.series.forEach((series, index) => {
      if (this.hidden.has(series)) return;
      const line = this.coarse(this.shown, series);
      if (base !== null) line.values = line.values.map((value, i) => value + base[i]);
      lines.push({ ...line, base, fill: series.fill, colour: colour(index) });
      if (panel.stacked) base = line.values;
    });
    return lines;
  }

  coarse(entry, series, scale = this.x) {
    const bucket = bucketOf(entry.report.timeline);
    const count = Math.max(1, Math.ceil(3 / (scale(bucket) - scale(0))));
    const values = entry.values.get(series);
    const combine = series.combine ?? meanOf;
    const groups = Array.from({ length: Math.ceil(values.length / count) }, (_, index) =>
      values.slice(index * count, (index + 1) * count).filter((value) => value !== null));
    return {
      entry, series, start: startOf(entry.report.timeline), bucket: bucket * count,
      values: count === 1 ? values : groups.map((group) => (group.length ? combine(group) : null)),
    };
  }

  drawPanel({ panel, image }, width, left, hasAxis) {
    const height = (width < 600 ? 84 : 104) + (hasAxis ? 20 : 0);
    const bottom = height - (hasAxis ? 22 : 4);
    const lines = this.lines(panel);
    const limits = panel.limit ? [...new Set(this.visible().map(({ report }) => panel.limit(report)))] : [];
    const highest = Math.max(this.highest(lines), ...limits) || (panel.format === "share" ? 0.01 : 1);
    const step = Math.max(roundStep(highest / 3), panel.whole ? 1 : 0);
    const top = Math.ceil(highest / step - 1e-9) * step;
    const y = linear(0, top, bottom, 8);
    const right = width - 8;
    const shown = FORMATS[panel.format];
    build(image, { viewBox: `0 0 ${width} ${height}`, height, "aria-label": this.description(panel, lines) });
    image.replaceChildren(
      ...ticks(0, top, step).flatMap((value) => [
        svg("line", { class: value ? "grid" : "axis", x1: left, x2: right, y1: y(value), y2: y(value) }),
        svg("text", { class: "label", x: left - 8, y: y(value) + 4, "text-anchor": "end" }, axisLabel(value, shown))]),
      ...this.times.map((time) =>
        svg("line", { class: "grid", x1: this.x(time), x2: this.x(time), y1: 8, y2: bottom })),
      ...(hasAxis ? this.timeLabels(this.times, this.x, this.step, height - 5, right) : []),
      ...limits.map((limit) => svg("line", { class: "limit", x1: left, x2: right, y1: y(limit), y2: y(limit) })),
      ...lines.filter(({ fill }) => fill).map((line) => svg("path", {
        class: panel.stacked ? "area stacked" : "area", style: `--colour:${line.colour}`,
        d: areaPath(line, this.x, y, this.view) })),
      ...lines.map((line) => svg("path", {
        class: "line", style: `--colour:${line.colour}`, d: stepPath(line, this.x, y, this.view) })),
      svg("rect", { class: "selection", y: 8, height: bottom - 8 }),
      svg("line", { class: "cursor", y1: 8, y2: bottom }));
  }

  timeLabels(times, x, step, y, right) {
    return times.map((time) => svg("text", {
      class: "label", x: x(time), y, "text-anchor": x(time) > right - 24 ? "end" : "middle",
    }, clock(time, step)));
  }

  highest(lines) {
    let highest = 0;
    for (const line of lines) {
      const [first, last] = bucketsIn(line, this.view);
      for (let i = first; i < last; i++) highest = Math.max(highest, line.values[i]);
    }
    return highest;
  }

  description(panel, lines) {
    const shown = FORMATS[panel.format];
    const parts = lines.map(({ entry, series }) => {
      const values = entry.values.get(series).filter((value) => value !== null);
      const name = this.shown === null ? `${entry.letter} ${series.name}` : series.name;
      if (!values.length) return `${name}: no values`;
      return `${name}: mean ${shown(meanOf(values))}, highest ${shown(highestOf(values))}`;
    });
    return `${panel.title}. ${parts.join("; ")}`;
  }

  drawOverview(width, left) {
    const height = 62;
    const bottom = 42;
    const whole = (this.whole = linear(0, this.end, left, width - 8));
    const running = PANELS[0].series[0];
    const lines = this.visible().map((entry) => ({ ...this.coarse(entry, running, whole), base: null }));
    const highest = Math.max(...lines.map(({ values }) => values.reduce((a, b) => Math.max(a, b), 0))) || 1;
    const y = linear(0, highest, bottom, 4);
    const [from, to] = this.view.map(whole);
    const step = clockStep(this.end / Math.max(2, Math.floor((width - left) / 110)));
    build(this.overview, { viewBox: `0 0 ${width} ${height}`, height });
    this.overview.replaceChildren(
      svg("rect", { class: "ground", x: left, y: 4, width: width - 8 - left, height: bottom - 4 }),
      ...lines.map((line) => svg("path", { class: "silhouette", d: areaPath(line, whole, y, [0, this.end]) })),
      svg("rect", { class: "window", x: from, y: 4, width: Math.max(1, to - from), height: bottom - 4 }),
      ...[from, to].map((x) => svg("rect", { class: "handle", x: x - 2.5, y: 13, width: 5, height: 20, rx: 2.5 })),
      ...this.timeLabels(ticks(0, this.end, step), whole, step, height - 6, width - 8));
  }

  drawCursor() {
    if (!this.x) return;
    const x = this.x(this.cursor ?? 0);
    const from = this.dragged ? Math.min(this.x(this.dragged[1]), x) : 0;
    for (const { image } of this.panels) {
      build(image.lastChild, { x1: x, x2: x, visibility: this.cursor === null ? "hidden" : "visible" });
      build(image.lastChild.previousSibling, {
        x: from, width: this.dragged ? Math.abs(x - this.x(this.dragged[1])) : 0,
      });
    }
  }

  // Every series of the reports that are shown, at the cursor; of several on a phone only what is drawn, or
  // the reading would hide it.
  reading() {
    const entries = this.visible();
    const at = entries.map(({ report }) => bucketAt(report.timeline, this.cursor));
    const drawnOnly = this.shown === null && window.innerWidth <= NARROW_WINDOW;
    const read = (panel) => (drawnOnly ? [this.chosen.get(panel)] : panel.series);
    const rows = PANELS.map((panel) => read(panel).map((series, index) => html("tr", {
      class: index === 0 ? "first" : null,
    }, html("th", { scope: "row" },
      this.shown === null ? null : html("span", { class: "swatch", style: `--colour:${colour(index)}` }),
      `${series.name}${panel.suffix ?? ""}`),
    entries.map((entry, i) => html("td", {}, FORMATS[panel.format](entry.values.get(series)[at[i]] ?? null))))));
    const head = entries.length > 1
      ? html("thead", {}, html("tr", {}, html("td"), entries.map((entry) => html("th", {}, marker(entry))))) : null;
    const bucket = Math.min(...entries.map(({ report }) => bucketOf(report.timeline)));
    return [html("strong", {}, clock(this.cursor, Math.min(1, bucket))), html("table", {}, head, html("tbody", {}, rows))];
  }
}

function panelFrame(panel) {
  const image = svg("svg", { role: "img" });
  const legend = html("span", { class: "legend" });
  const unit = html("span", { class: "unit" });
  const title = html("span", { class: "title" }, panel.title, unit);
  return { image, legend, unit, figure: html("figure", {}, html("figcaption", {}, title, legend), image) };
}

// Values, buckets and paths

const seriesValues = (timeline) =>
  new Map(PANELS.flatMap(({ series }) => series).map((one) => [one, one.values(timeline)]));

const bucketOf = (timeline) => timeline.bucket_s || 1e-3;
const startOf = (timeline) => timeline.time_s[0] ?? 0;
const endOf = (timeline) => startOf(timeline) + timeline.time_s.length * bucketOf(timeline);

const bucketAt = (timeline, time) => Math.floor((time - startOf(timeline)) / bucketOf(timeline));

function bucketsIn({ start, bucket, values }, [from, to]) {
  const first = Math.floor((from - start) / bucket);
  const last = Math.ceil((to - start) / bucket);
  return [Math.max(0, first), Math.min(values.length, Math.max(0, last))];
}

// Calls back with each run of buckets in view that have a value: their indices, and the x of each edge.
function runs(line, x, view, found) {
  const { start: begin, bucket, values, entry } = line;
  const end = endOf(entry.report.timeline); // the last of several buckets drawn as one may be cut short
  const [first, last] = bucketsIn(line, view);
  const edge = (index) =>
    x(Math.min(view[1], end, Math.max(view[0], begin + index * bucket))).toFixed(1);
  for (let i = first; i < last; i++) {
    if (values[i] === null) continue;
    const start = i;
    while (i + 1 < last && values[i + 1] !== null) i++;
    found(start, i, edge);
  }
}

// A value holds for its whole bucket, so lines are steps.
function stepPath(line, x, y, view) {
  let path = "";
  runs(line, x, view, (start, end, edge) => {
    path += `M${edge(start)} ${y(line.values[start]).toFixed(1)}`;
    for (let i = start; i <= end; i++) path += `V${y(line.values[i]).toFixed(1)}H${edge(i + 1)}`;
  });
  return path;
}

function areaPath(line, x, y, view) {
  let path = "";
  runs(line, x, view, (start, end, edge) => {
    const base = (i) => y(line.base === null ? 0 : line.base[i]).toFixed(1);
    path += `M${edge(start)} ${base(start)}`;
    for (let i = start; i <= end; i++) path += `V${y(line.values[i]).toFixed(1)}H${edge(i + 1)}`;
    if (line.base === null) path += `V${base(end)}`;
    else for (let i = end; i >= start; i--) path += `V${base(i)}H${edge(i)}`;
    path += "Z";
  });
  return path;
}

// 12k rather than 12,000: an axis has little room.
function axisLabel(value, shown) {
  if (value >= 1e6) return `${trimmed(significant(value / 1e6))}M`;
  return trimmed(value >= 1e4 ? `${significant(value / 1e3)}k` : shown(value));
}
