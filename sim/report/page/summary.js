"use strict";
// The numbers: key figures of one report, the comparison of several, the table of latencies, the settings.

const DISTRIBUTIONS = [
  ["ttft_s", "TTFT", "Time to first token"],
  ["tpot_s", "TPOT", "Time per output token"],
  ["itl_s", "ITL", "Inter-token latency: every gap between tokens, of all requests together; what AIPerf calls so is TPOT here"],
  ["e2e_s", "E2E", "End to end"],
  ["queue_s", "Queue", "Time in the queue"],
];

function metricValue(metric, report) {
  return metric.path.split(".").reduce((value, name) => value?.[name] ?? null, metric.group === "fleet" ? report : report.summary);
}

// Key figures

function keyFigures(report) {
  const { summary } = report;
  const { kv, cache, preemptions, goodput } = summary;
  const others = [[summary.num_timed_out, "timed out"], [summary.num_rejected, "rejected"], [summary.num_failed ?? 0, "failed"],
    [summary.num_skipped, "bad records left out"], [summary.num_dropped, "records without a request"]];
  const speed = summary.wall_s ? summary.duration_s / summary.wall_s : null;
  const tail = (name) => `P99 ${FORMATS.s(summary[name].p99)}, mean ${FORMATS.s(summary[name].mean)}`;
  const figures = [
    ["Output", [significant(summary.output_tokens_per_s), "tokens/s"],
      `${significant(summary.requests_per_s)} requests/s, ${significant(summary.total_tokens_per_s)} tokens/s with prompts`],
    ["TTFT, median", secondsParts(summary.ttft_s.p50), tail("ttft_s")],
    ["TPOT, median", secondsParts(summary.tpot_s.p50), tail("tpot_s")],
    ["E2E, median", secondsParts(summary.e2e_s.p50), tail("e2e_s")],
    goodput
      ? ["Goodput", [FORMATS.share(goodput.share), ""],
        `${significant(goodput.requests_per_s)} requests/s within ${limits(goodput.slo)}`]
      : ["Queue, median", secondsParts(summary.queue_s.p50), tail("queue_s")],
    ["Finished", [grouped(summary.num_finished), `of ${grouped(summary.num_requests)}`],
      others.filter(([count]) => count).map(([count, what]) => `${grouped(count)} ${what}`).join(", ") || "every request"],
    ["KV peak", [FORMATS.share(kv.num_blocks ? kv.peak_blocks / kv.num_blocks : null), ""],
      [`${grouped(kv.peak_blocks)} of ${grouped(kv.num_blocks)} blocks`,
        kv.peak_bytes === null ? null : FORMATS.bytes(kv.peak_bytes)].filter(Boolean).join(", ")],
    ["Prefix hits", [FORMATS.share(cache.hit_rate), ""],
      `of ${grouped(cache.query_tokens)} prompt tokens, ${grouped(cache.evicted_tokens)} evicted` +
        (cache.host_hit_tokens === undefined ? "" : `, ${grouped(cache.host_hit_tokens)} hit in the second tier`)],
    ["Preemptions", [grouped(preemptions.recompute + preemptions.swap), ""],
      `${grouped(preemptions.recompute)} by recompute, ${grouped(preemptions.swap)} by swap`],
    ["Duration", secondsParts(summary.duration_s),
      [`${grouped(summary.num_steps)} steps`, speed ? `replayed at ${significant(speed)}× real time` : null]
        .filter(Boolean).join(", ")],
  ];
  return html("dl", { class: "figures" }, figures.map(([label, [number, unit], note]) =>
    html("div", {}, html("dt", {}, label),
      html("dd", { class: "value" }, number, unit ? html("span", { class: "unit" }, ` ${unit}`) : null),
      html("dd", { class: "note" }, note))));
}

function limits(slo) {
  const named = Object.fromEntries(DISTRIBUTIONS.map(([key, short]) => [key, short]));
  const given = Object.entries(slo).filter(([, limit]) => limit !== null);
  return given.map(([name, limit]) => `${named[name] ?? name} ${trimmed(FORMATS.s(limit))}`).join(", ") || "no limit";
}

// The table of latencies

const STATISTICS = [["mean", "mean"], ["p50", "P50"], ["p90", "P90"], ["p95", "P95"], ["p99", "P99"], ["max", "max"]];

function latencyTable(report) {
  const head = html("tr", {}, html("th", { scope: "col" }, "Latency"),
    STATISTICS.map(([key, label]) => html("th", { scope: "col", class: key }, label)),
    html("th", { scope: "col", class: "count" }, "count"));
  const rows = DISTRIBUTIONS.map(([key, short, long]) => {
    const found = report.summary[key];
    return html("tr", {}, html("th", { scope: "row", title: long }, short),
      STATISTICS.map(([name]) => html("td", { class: name }, FORMATS.s(found[name]))),
      html("td", { class: "count" }, grouped(found.count)));
  });
  return wideTable(html("table", { class: "latencies" }, html("thead", {}, head), html("tbody", {}, rows)));
}

// The comparison: each group of metrics is a table; a column for each report, differences from the first.

function comparison(metrics, reports) {
  const groups = [...new Set(metrics.map((metric) => metric.group))];
  const tables = groups.map((group) => {
    const rows = metrics.filter((metric) => metric.group === group)
      .map((metric) => [metric, reports.map(({ report }) => metricValue(metric, report))])
      .filter(([, values]) => values.some((value) => value !== null));
    if (!rows.length) return null;
    const title = DISTRIBUTIONS.find(([, short]) => short.toLowerCase() === group.toLowerCase())?.[2];
    return wideTable(html("table", { class: "comparison" },
      html("thead", {}, html("tr", {},
        html("th", { scope: "col" }, title ?? group[0].toUpperCase() + group.slice(1)),
        reports.map((entry) => html("th", { scope: "col" }, marker(entry))))),
      html("tbody", {}, rows.map(([metric, values]) => comparisonRow(metric, values)))));
  });
  return html("div", { class: reports.length > 2 ? "comparisons broad" : "comparisons" }, tables);
}

function comparisonRow(metric, values) {
  const [base, ...others] = values;
  return html("tr", {}, html("th", { scope: "row" }, metric.label),
    html("td", {}, FORMATS[metric.unit](base)),
    others.map((value) => html("td", {}, FORMATS[metric.unit](value), difference(metric, base, value))));
}

// A signed percentage over a bar that grows from the middle, full at half as much again or half as much less.
// Where it is better or worse, its colour and its mark say so.
function difference(metric, base, value) {
  if (base === null || value === null || (base === 0 && value !== 0)) {
    return html("span", { class: "difference" }, NONE);
  }
  const percent = value === base ? 0 : (100 * (value - base)) / base;
  const length = Math.min(50, Math.abs(percent));
  const sense = percent * goodDirection(metric);
  const kind = sense > 0 ? "better" : sense < 0 ? "worse" : null;
  const size = Math.abs(percent) >= 5 ? "difference large" : "difference";
  return html("span", { class: kind ? `${size} ${kind}` : size, title: kind },
    signedPercent(percent),
    html("span", { class: "bar", "aria-hidden": "true" },
      html("span", { style: `width:${length}%;${percent < 0 ? "right" : "left"}:50%` })));
}

// 1 where more is better, -1 where less is, 0 where neither is.
function goodDirection({ group, unit, path }) {
  if (group === "throughput") return path === "duration_s" ? -1 : 1;
  if (unit === "s" || group === "preemptions" || group === "fleet") return -1;
  if (path === "cache.hit_rate" || path === "cache.host_hit_tokens") return 1;
  return ["num_timed_out", "num_rejected", "num_failed", "kv.mean_unwritten_share", "cache.evicted_tokens"].includes(path) ? -1 : 0;
}

// The figures by replica, tenant and class

function groupTables(report) {
  const kinds = [...new Set(report.groups.map(({ by }) => by))];
  const hasSlo = report.groups.some(({ goodput_share: share }) => share !== null);
  const columns = [
    ["requests", (g) => grouped(g.num_requests)], ["finished", (g) => grouped(g.num_finished)],
    ["tokens/s", (g) => significant(g.output_tokens_per_s)],
    ["cached", (g) => FORMATS.share(g.prompt_tokens ? g.cached_tokens / g.prompt_tokens : null)],
    ...(hasSlo ? [["in SLO", (g) => FORMATS.share(g.goodput_share)]] : []),
    ["TTFT P50", (g) => FORMATS.s(g.ttft_s.p50)], ["TTFT P99", (g) => FORMATS.s(g.ttft_s.p99)],
    ["TPOT P50", (g) => FORMATS.s(g.tpot_s.p50)], ["TPOT P99", (g) => FORMATS.s(g.tpot_s.p99)],
    ["E2E P99", (g) => FORMATS.s(g.e2e_s.p99)],
  ];
  return kinds.map((kind) => wideTable(html("table", { class: "comparison groups" },
    html("thead", {}, html("tr", {}, [kind, ...columns.map(([name]) => name)].map((name) =>
      html("th", { scope: "col" }, name)))),
    html("tbody", {}, report.groups.filter(({ by }) => by === kind).map((group) => html("tr", {},
      html("th", { scope: "row" }, group.name), columns.map(([, cell]) => html("td", {}, cell(group)))))))));
}

// Settings of this machine, which say nothing of an estimate for another one, and files that may be gone.
const OF_THIS_MACHINE = ["num_threads", "quantization"];
const OF_FILES = ["step_log", "swap_dir", "generation_config", "reasoning_markers"];
const applies = (part, name, report) => part !== "config"
  || !(OF_FILES.includes(name) || (report.kind === "simulated" && report.constants?.length && OF_THIS_MACHINE.includes(name)));

// The settings, those that differ between the reports first

function settings(reports) {
  const shown = (value) => String(value ?? NONE);
  const rows = ["load", "config"].flatMap((part) => {
    const names = [...new Set(reports.flatMap(({ report }) =>
      Object.keys(report[part]).filter((name) => applies(part, name, report))))];
    return names.map((name) => [name, reports.map(({ report }) => shown(report[part][name]))]);
  });
  const differs = ([, values]) => values.some((value) => value !== values[0]);
  const list = (some) => html("dl", { class: "settings" }, some.map(([name, values]) =>
    html("div", { class: differs([name, values]) ? "differs" : null }, html("dt", {}, name),
      (differs([name, values]) ? values : values.slice(0, 1)).map((value, index) =>
        html("dd", {}, differs([name, values]) ? marker(reports[index]) : null, " ", value)))));
  const different = rows.filter(differs);
  return [different.length ? list(different) : null, list(rows.filter((row) => !differs(row)))];
}

// The constants of estimated step times, each with whether it was assumed and where that is from.
const ORIGINS = { assumed: "assumed", device: "of this device", fitted: "fitted", given: "given" };
function constantsTable(report) {
  const row = ({ name, value, origin, source }) => html("div", {}, html("dt", {}, name),
    html("dd", {}, `${value} ${ORIGINS[origin]}${source ? `: ${source}` : ""}`));
  return html("dl", { class: "constants" }, report.constants.map(row));
}

// A report's letter in its colour.
const marker = (entry) =>
  html("span", { class: "marker", style: `--colour:${colour(entry.index)}`, title: entry.name }, entry.letter);

// What sets a report apart from the others, as words.
function distinction(report, reports) {
  const found = [];
  for (const name of ["trace", "model", "kind"]) {
    if (reports.some((other) => other[name] !== report[name])) found.push(shortName(report[name]));
  }
  for (const part of ["load", "config"]) {
    for (const [name, value] of Object.entries(report[part])) {
      if (applies(part, name, report) && reports.some((other) => other[part][name] !== value)) found.push(`${name} ${value ?? NONE}`);
    }
  }
  return found.join(" · ");
}
