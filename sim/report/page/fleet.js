"use strict";
// What served: each group of replicas and what it took, the links, failures and starts.

// What devices draw, and what of that is assumed.
function powerWords(groups) {
  const words = groups.map(({ powers = [] }) => powers.map(({ name, value, origin, source }) =>
    `${grouped(value)}${NARROW}W ${name === "power_w" ? "while a step is under way" : "idle"}, `
      + `${[ORIGINS[origin], source].filter(Boolean).join(": ")}`).join("; "));
  if (words.every((one) => !one)) return null;
  const alike = words.every((one) => one === words[0]);
  return alike ? words[0] : groups.map(({ name }, index) => `${name}: ${words[index] || NONE}`).join("; ");
}

const perMillion = (amount, unit) => (amount === null ? null : `${significant(amount)}${unit} a million output tokens`);

function fleetParts(report) {
  const { fleet } = report;
  const power = powerWords(fleet.groups);
  return [wideTable(fleetTable(fleet)), power && html("p", { class: "hint power" }, `Power of a device: ${power}`), html("dl", { class: "settings facts" }, fleetFacts(fleet).map(([name, value]) =>
    html("div", {}, html("dt", {}, name), html("dd", {}, value))))];
}

function fleetTable(fleet) {
  const columns = [
    ["role", (g) => g.role], ["model", (g) => shortName(g.model)], ["replicas", (g) => grouped(g.replicas)],
    ["devices of each", (g) => grouped(g.devices)], ["hours", (g) => significant(g.paid_s / 3600)],
    ["busy", (g) => FORMATS.share(g.paid_s ? g.busy_s / g.paid_s : null)],
    ["Wh", (g) => significant(g.energy_wh)], ["cost", (g) => significant(g.cost)],
  ];
  return html("table", { class: "comparison groups fleet" },
    html("thead", {}, html("tr", {}, ["group", ...columns.map(([name]) => name)].map((name) =>
      html("th", { scope: "col" }, name)))),
    html("tbody", {}, fleet.groups.map((group) => html("tr", {},
      html("th", { scope: "row" }, group.name), columns.map(([, cell]) => html("td", {}, cell(group)))))));
}

function fleetFacts(fleet) {
  const { failures, links = [], scaling = [] } = fleet;
  const down = failures?.mean_down_s ?? null;
  return [
    ["energy", perMillion(fleet.wh_per_million, " Wh")], ["cost", perMillion(fleet.cost_per_million, "")],
    ...links.map((link) => [`KV over ${link.name}`, `${grouped(link.transfers)} times, ${FORMATS.bytes(link.bytes)}; `
      + `${FORMATS.s(link.mean_transfer_s)} each after ${FORMATS.s(link.mean_wait_s)}, on average`]),
    ["failures", failures ? `${grouped(failures.failures)} of replicas${down === null ? "" : `, down for ${FORMATS.s(down)} on average`}; `
      + `${grouped(failures.lost_requests - (failures.failed_requests ?? 0))} requests began anew, ${grouped(failures.lost_tokens)} tokens computed anew`
      + (failures.failed_requests ? `; ${grouped(failures.failed_requests)} requests failed with them` : "") : null],
    ["scaling", scaling.length ? `${grouped(scaling.length)} times replicas were started or stopped` : null],
  ].filter(([, value]) => value !== null);
}

// Of replicas that are alike there is nothing to say but what they took, if that is known.
const hasFleet = ({ fleet }) => fleet
  && (fleet.groups.length > 1 || fleet.energy_wh !== null || fleet.cost !== null || fleet.links || fleet.failures || fleet.scaling);
