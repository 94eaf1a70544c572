"use strict";
// The page of a sweep: what is chosen to be plotted, the plots, and the tables below them.

const data = JSON.parse(document.getElementById("data").textContent);
const keys = Object.keys(data.grid);
const varied = keys.filter((key) => data.grid[key].length > 1);

const valueOf = (metric, point) => point.summary === null ? null
  : metric.path.split(".").reduce((value, name) => value?.[name] ?? null, point.summary);
const metricName = ({ group, label }) => (label.includes("/s") || group === "fleet" ? label : `${group} ${label}`);
// The metric that a limit of the SLO speaks of: ttft_p99 is ttft_s.p99.
const limitPath = (name) => name.replace("_", "_s.");
const limitOf = (metric) =>
  Object.entries(data.slo ?? {}).find(([name]) => limitPath(name) === metric.path)?.[1] ?? null;
const settingWords = (settings, names = Object.keys(settings)) =>
  names.map((name) => `${name} ${settingText(settings[name] ?? null)}`).join(", ") || "the defaults";
const verdict = (point) => (point.slo_holds === null ? "" : point.slo_holds ? ", SLO holds" : ", SLO broken");

// A labelled choice among [value, text]; `chosen` is kept by its owner.
function select(label, options, chosen, onchange) {
  return html("label", { class: "select" }, label,
    html("select", { onchange: (event) => onchange(options[event.target.selectedIndex][0]) },
      options.map(([value, text]) => html("option", { selected: value === chosen }, text))));
}

const metricOptions = () => data.metrics.map((metric) => [metric, metricName(metric)]);
const firstMetric = (fallback) => data.metrics.find((metric) => limitOf(metric) !== null)
  ?? data.metrics.find(({ path }) => path === fallback);

function legend(names) {
  return names.length < 2 ? null : html("div", { class: "legend" }, names.map((name, index) =>
    html("span", { class: "series", style: `--colour:${colour(index)}` }, name)));
}

// The grid: a metric over one key, with another one as lines or as the rows of a heat map.
class GridPlot {
  constructor() {
    this.metric = firstMetric("ttft_s.p99");
    this.x = varied[0] ?? keys[0];
    this.series = varied.find((key) => key !== this.x) ?? null;
    this.isHeatMap = false;
    this.fixed = Object.fromEntries(keys.map((key) => [key, data.grid[key][0]]));
    this.image = svg("svg");
    this.tools = html("div", { class: "tools" });
    this.caption = html("figcaption");
    this.element = html("div", {}, this.tools, html("figure", {}, this.caption, this.image));
    this.draw = onceAFrame(() => this.drawNow());
    this.fill();
  }

  fill() {
    const choose = (name) => (value) => {
      this[name] = value;
      if (this.series === this.x) this.series = null;
      this.fill();
      this.draw();
    };
    const others = varied.filter((key) => key !== this.x && key !== this.series);
    const seriesKeys = varied.filter((key) => key !== this.x);
    this.tools.replaceChildren(
      select("Metric", metricOptions(), this.metric, choose("metric")),
      select("over", keys.map((key) => [key, key]), this.x, choose("x")),
      seriesKeys.length
        ? select("by", [[null, "nothing"], ...seriesKeys.map((key) => [key, key])], this.series, choose("series")) : "",
      this.series
        ? select("as", [[false, "lines"], [true, "heat map"]], this.isHeatMap, choose("isHeatMap")) : "",
      ...others.map((key) => select(key, data.grid[key].map((value) => [value, settingText(value)]), this.fixed[key],
        (value) => {
          this.fixed[key] = value;
          this.draw();
        })));
  }

  point(x, row) {
    const wanted = { ...this.fixed, [this.x]: x, ...(this.series ? { [this.series]: row } : {}) };
    return data.points.find(({ settings }) => keys.every((key) => settings[key] === wanted[key]));
  }

  drawNow() {
    const { metric } = this;
    const format = FORMATS[metric.unit];
    const columns = data.grid[this.x];
    const rows = this.series ? data.grid[this.series] : [null];
    const title = (point) => `${settingWords(point.settings)}: ${point.error ?? format(valueOf(metric, point))}${verdict(point)}`;
    const description = `${metricName(metric)} over ${this.x}${this.series ? ` by ${this.series}` : ""}; the table below has the values`;
    const asHeatMap = this.isHeatMap && this.series;
    this.caption.replaceChildren(html("span", { class: "title" }, `${metricName(metric)} over ${this.x}`),
      (!asHeatMap && this.series && legend(rows.map((row) => `${this.series} ${settingText(row)}`))) || "");
    if (asHeatMap) {
      heatMap(this.image, { rows, columns, format, description, cell: (row, column) => {
        const point = this.point(column, row);
        return { value: valueOf(metric, point), title: title(point) };
      } });
      return;
    }
    linePlot(this.image, {
      xs: columns, xFormat: settingText, yFormat: format, limit: limitOf(metric), description,
      series: rows.map((row) => ({ points: columns.map((x) => {
        const point = this.point(x, row);
        return { x, y: valueOf(metric, point), hollow: point.slo_holds === false, title: title(point) };
      }) })),
    });
  }
}

// The capacities: a metric over the load, every probe a point, a line for each point of the grid.
class CapacityPlot {
  constructor() {
    this.metric = firstMetric("ttft_s.p99");
    this.image = svg("svg");
    const names = data.capacities.map(({ settings }) => settingWords(settings, varied));
    this.element = html("div", {},
      html("div", { class: "tools" }, select("Metric", metricOptions(), this.metric, (metric) => {
        this.metric = metric;
        this.draw();
      })),
      html("figure", {}, html("figcaption", {}, legend(names)), this.image));
    this.draw = onceAFrame(() => this.drawNow());
  }

  drawNow() {
    const { metric } = this;
    const format = FORMATS[metric.unit];
    const load = (point) => point.settings.rate_factor;
    linePlot(this.image, {
      xs: data.capacities.flatMap(({ probes }) => probes.map(load)),
      xFormat: (value) => `×${NARROW}${significant(value)}`, yFormat: format, limit: limitOf(metric),
      description: `${metricName(metric)} over the rate factor; the table below has the capacities`,
      series: data.capacities.map(({ probes, rate_factor }) => ({
        mark: rate_factor,
        points: probes.toSorted((a, b) => load(a) - load(b)).map((probe) => ({
          x: load(probe), y: valueOf(metric, probe), hollow: !probe.slo_holds,
          title: `${settingWords(probe.settings)}: ${probe.error ?? format(valueOf(metric, probe))}${verdict(probe)}`,
        })),
      })),
    });
  }
}

// Tables

function table(names, rows) {
  return wideTable(html("table", { class: "comparison" },
    html("thead", {}, html("tr", {}, names.map((name) => html("th", { scope: "col" }, name)))),
    html("tbody", {}, rows.map((cells) => html("tr", {}, cells)))));
}

const settingCells = (settings) => keys.map((key) => html("td", {}, settingText(settings[key])));

function gridTable() {
  const paths = ["requests_per_s", "output_tokens_per_s", "ttft_s.p50", "ttft_s.p99", "tpot_s.p99", "e2e_s.p99"];
  const known = data.metrics.filter((metric) => metric.group === "fleet"
    && data.points.some((point) => valueOf(metric, point) !== null));
  const wanted = new Set([...paths, ...known.map(({ path }) => path), ...Object.keys(data.slo ?? {}).map(limitPath)]);
  const shown = data.metrics.filter(({ path }) => wanted.has(path));
  const slo = (point) => html("td", { class: point.slo_holds ? "better" : "worse" }, point.slo_holds ? "holds" : "broken");
  return table([...keys, ...(data.slo ? ["SLO"] : []), ...shown.map(metricName)], data.points.map((point) => [
    ...settingCells(point.settings),
    ...(point.error !== null
      ? [html("td", { class: "error", colspan: shown.length + (data.slo ? 1 : 0) }, point.error)]
      : [data.slo ? slo(point) : null,
        ...shown.map((metric) => html("td", {}, FORMATS[metric.unit](valueOf(metric, point))))]),
  ]));
}

function capacityTable() {
  const said = {
    found: () => "",
    never: ({ range }) => `never holds, down to × ${significant(range[0])}`,
    always: ({ range }) => `holds up to × ${significant(range[1])}, the highest tried`,
    failed: ({ error }) => error,
    transient: ({ transient }) => `refused: ${transient}`,
  };
  return table([...keys, "rate factor", "offered/s", "requests/s", "probes", ""], data.capacities.map((capacity) => [
    ...settingCells(capacity.settings),
    html("td", {}, capacity.rate_factor === null ? NONE : settingText(capacity.rate_factor)), html("td", {}, significant(capacity.offered_per_s ?? null, 4)), html("td", {}, significant(capacity.requests_per_s, 4)),
    html("td", {}, String(capacity.probes.length)), html("td", { class: "error" }, said[capacity.status](capacity)),
  ]));
}

function section(title, hint, ...content) {
  return html("section", { "aria-label": title },
    html("h2", {}, title, hint ? html("span", { class: "hint" }, hint) : null), content);
}

function begin() {
  // Limits of each request are kept by a share of them.
  const { attainment, ...seconds } = data.slo ?? {};
  const words = ([name, limit]) => `${name} ${trimmed(FORMATS.s(limit))}`;
  const all = Object.entries(seconds).filter(([name]) => name.includes("_")).map(words);
  const each = Object.entries(seconds).filter(([name]) => !name.includes("_")).map(words);
  const limits = [...all, ...(attainment === undefined ? [] : [`${FORMATS.share(attainment)} of requests within ${each.join(" and ")}`])];
  const plots = [data.capacities ? new CapacityPlot() : null, keys.length ? new GridPlot() : null];
  const [capacity, grid] = plots;
  document.getElementById("page").replaceChildren(
    html("header", {},
      html("p", { class: "kind" }, `pagellm · sweep of ${grouped(data.points.length)} points`),
      html("h1", { title: data.trace }, shortName(data.trace)),
      html("p", { class: "subtitle" }, [shortName(data.cost_model), profileErrorWords(data.profile_error), fitWords(data.fit),
        limits.length ? `SLO ${limits.join(", ")}` : null]
        .filter(Boolean).join(" · "))),
    html("main", {},
      capacity ? section("Capacity", "the highest load at which the SLO holds; hollow points break it",
        capacity.element, capacityTable()) : null,
      section("Grid", data.slo ? "hollow points break the SLO" : null, grid?.element, gridTable())));
  const shown = plots.filter(Boolean);
  new ResizeObserver(() => shown.forEach((plot) => plot.draw())).observe(document.getElementById("page"));
  // Paper has a width of its own, and printing waits for no frame.
  const redraw = (isPaper) => {
    document.documentElement.classList.toggle("paper", isPaper);
    shown.forEach((plot) => plot.drawNow());
  };
  window.addEventListener("beforeprint", () => redraw(true));
  window.addEventListener("afterprint", () => redraw(false));
  shown.forEach((plot) => plot.drawNow()); // a page that is not shown yet may be given no frame
}

begin();
