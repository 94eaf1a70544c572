"use strict";
// The page: reads the data, puts the parts in order, and redraws them when their width changes.

function begin() {
  const { metrics, reports } = JSON.parse(document.getElementById("data").textContent);
  const entries = reports.map((report, index) => ({
    report, index,
    letter: String.fromCharCode(65 + (index % 26)) + (index >= 26 ? Math.floor(index / 26) : ""),
    name: shortName(`${report.trace}, ${report.kind} on ${report.model}`),
  }));
  for (const panel of PANELS) { // goodput is known with an SLO alone, replicas where they come and go
    panel.series = panel.series.filter(({ needs }) => !needs || reports.every((report) => report.timeline[needs]));
  }
  PANELS.splice(0, PANELS.length, ...PANELS.filter(({ series }) => series.length));
  const timeline = new Timeline(entries);
  const distributions = new Distributions(entries);
  const several = entries.length > 1;
  document.getElementById("page").replaceChildren(
    several ? comparisonHeader(entries) : header(reports[0]),
    html("main", {},
      several ? section("Comparison", "differences are from A", comparison(metrics, entries))
        : section(null, null, keyFigures(reports[0])),
      section("Over time", "drag to zoom, double-click for everything", timeline.element),
      section("Latency", "share of requests within a time; ITL: of all gaps between tokens, TPOT: of each request's mean gap, which AIPerf calls ITL", distributions.element,
        several ? null : latencyTable(reports[0])),
      ...entries.filter(({ report }) => report.groups?.length).map((entry) => section("By replica, tenant and class",
        several ? `of ${entry.letter}` : null, groupTables(entry.report))),
      ...entries.filter(({ report }) => hasFleet(report)).map((entry) => section("Fleet",
        several ? `of ${entry.letter}` : "what served, and what it took", fleetParts(entry.report))),
      section("Configuration", several ? "what differs comes first" : null, settings(entries)),
      ...entries.filter(({ report }) => report.constants?.length).map((entry) => section("Step times",
        `estimated, not measured${several ? `; of ${entry.letter}` : ""}`, constantsTable(entry.report)))));
  new ResizeObserver(() => {
    timeline.draw();
    distributions.draw();
  }).observe(document.getElementById("page"));
  // At first too: a page that is not shown yet may be given no frame.
  const drawNow = () => {
    timeline.drawNow();
    distributions.drawNow();
  };
  // Paper has a width of its own, and printing waits for no frame.
  const redraw = (isPaper) => {
    document.documentElement.classList.toggle("paper", isPaper);
    drawNow();
  };
  window.addEventListener("beforeprint", () => redraw(true));
  window.addEventListener("afterprint", () => redraw(false));
  drawNow();
}

function section(title, hint, ...content) {
  return html("section", { "aria-label": title ?? "Key figures" },
    title ? html("h2", {}, title, hint ? html("span", { class: "hint" }, hint) : null) : null, content);
}

function header(report) {
  const { load } = report;
  return html("header", {},
    html("p", { class: "kind" }, `pagellm · ${report.kind} replay`),
    html("h1", { title: report.trace }, shortName(report.trace)),
    html("p", { class: "subtitle" },
      [shortName(report.model), stateWords(report.summary.steady), profileErrorWords(report.profile_error), fitWords(report.fit), loadWords(load),
        `policy ${report.config.policy ?? NONE}`].filter(Boolean).join(" · ")));
}

function stateWords(steady) {
  if (!steady) return null;
  const offered = `${significant(steady.offered_per_s)} requests/s offered`;
  return steady.verdict === "steady" ? `steady, ${offered}`
    : `${offered}, ${steady.verdict === "short" ? "too short a run to be steady" : "overloaded"}`;
}

function comparisonHeader(entries) {
  const reports = entries.map(({ report }) => report);
  const traces = [...new Set(reports.map(({ trace }) => trace))];
  return html("header", {},
    html("p", { class: "kind" }, `pagellm · comparison of ${entries.length} replays`),
    html("h1", {}, traces.length === 1 ? shortName(traces[0]) : `${traces.length} traces`),
    html("ul", { class: "reports" }, entries.map((entry) => html("li", {}, marker(entry),
      html("span", {}, [distinction(entry.report, reports) || "no setting differs",
        profileErrorWords(entry.report.profile_error), fitWords(entry.report.fit)].filter(Boolean).join(" · "))))));
}

function loadWords(load) {
  const rate = load.mode === "closed"
    ? `closed load, ${load.clients ?? NONE} clients` : `open load${(load.rate_factor ?? 1) === 1 ? "" : `, arrivals × ${load.rate_factor}`}`;
  return load.replicas === 1 ? rate : `${rate} · ${load.replicas} replicas${load.router ? ` by ${load.router}` : ""}`;
}

begin();
