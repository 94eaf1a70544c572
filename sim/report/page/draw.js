"use strict";
// Elements, numbers as text, and scales: what every part of the page is drawn with.

const SVG = "http://www.w3.org/2000/svg";

// Children are elements or text. Text never becomes markup, so a name may hold anything.
function build(element, attributes = {}, ...children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, value === true ? "" : value);
    }
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}
const html = (tag, ...rest) => build(document.createElement(tag), ...rest);
const svg = (tag, ...rest) => build(document.createElementNS(SVG, tag), ...rest);

// Numbers

const NONE = "–";
const NARROW = "\u202f"; // between a number and its unit, never broken

const grouped = (value, digits = 0) =>
  value.toLocaleString("en-GB", { minimumFractionDigits: digits, maximumFractionDigits: digits });

function significant(value, digits = 3) {
  if (value === null) return NONE;
  if (value === 0) return "0";
  const size = Math.floor(Math.log10(Math.abs(value)) + 1e-9);
  return grouped(value, Math.min(6, Math.max(0, digits - 1 - size)));
}

// A latency or a duration, in the unit that it reads best in: the number and the unit apart.
function secondsParts(value) {
  if (value === null) return [NONE, ""];
  if (value === 0) return ["0", "s"];
  if (value < 1e-3) return [significant(value * 1e6), "µs"];
  if (value < 1) return [significant(value * 1e3), "ms"];
  if (value < 600) return [significant(value), "s"];
  if (value < 2 * 3600) return [significant(value / 60), "min"];
  return [significant(value / 3600), "h"];
}

const FORMATS = {
  s: (value) => secondsParts(value).filter(Boolean).join(NARROW),
  share: (value) => (value === null ? NONE : `${grouped(100 * value, 1)}${NARROW}%`),
  "1/s": (value) => significant(value),
  count: (value) => (value === null ? NONE : Number.isInteger(value) ? grouped(value) : significant(value, 4)),
  bytes: (value) => {
    if (value === null) return NONE;
    const size = value < 1 ? 0 : Math.min(4, Math.floor(Math.log2(value) / 10));
    return `${significant(value / 1024 ** size)}${NARROW}${["B", "KiB", "MiB", "GiB", "TiB"][size]}`;
  },
};

// How far a profile's step times were from measured ones; null where that is not known.
function profileErrorWords(error) {
  if (!error) return null;
  const bias = `too ${error.mean_signed < 0 ? "short" : "long"} by ${FORMATS.share(Math.abs(error.mean_signed))}`;
  return `step times off by ${FORMATS.share(error.mean)} on average, 9 of 10 within ${FORMATS.share(error.p90)}; ${bias}`;
}

// How far constants that were fitted to a recorded run are off on the rest of it.
function fitWords(fit) {
  if (!fit) return null;
  const errors = [["throughput", "throughput"], ["ttft", "TTFT"], ["tpot", "TPOT"], ["e2e", "E2E"]]
    .filter(([name]) => fit[name] !== null)
    .map(([name, label]) => `${label} ${signedPercent(100 * fit[name])}`);
  return `fitted to ${fit.num_fitted} requests of ${fit.run.split("/").pop()}; error on the ${fit.num_scored} others: ${errors.join(", ") || "not known"}`;
}

// A moment on the time axis, as exact as a step of so many seconds needs.
function clock(time, step) {
  const digits = step < 1 ? Math.min(6, Math.ceil(-Math.log10(step) - 1e-9)) : 0;
  if (time < 60 || step < 1) return `${grouped(time, digits)}${NARROW}s`;
  const whole = Math.round(time);
  const two = (number) => String(number).padStart(2, "0");
  const hours = Math.floor(whole / 3600);
  const minutes = Math.floor(whole / 60) % 60;
  return hours ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`;
}

const signedPercent = (value) =>
  `${value > 0 ? "+" : value < 0 ? "−" : ""}${grouped(Math.abs(value), Math.abs(value) < 1000 ? 1 : 0)}${NARROW}%`;

// A name in which each path is the file's name alone.
const shortName = (text) => text.replace(/(^|\s)\S*\/(?=[^\s/])/g, "$1");

// A table that may be wider than the page: where it is, that is said, and its first column stays.
function wideTable(table) {
  const hint = html("p", { class: "more", hidden: true }, "Scroll sideways for more columns →");
  const frame = html("div", { class: "wide", tabindex: "0" }, table);
  new ResizeObserver(() => {
    hint.hidden = frame.scrollWidth <= frame.clientWidth + 1;
  }).observe(frame);
  return html("div", { class: "framed" }, hint, frame);
}

// Scales

const linear = (from, to, left, right) => {
  const factor = (right - left) / (to - from || 1);
  const scale = (value) => left + (value - from) * factor;
  scale.invert = (position) => from + (position - left) / factor;
  return scale;
};

const logarithmic = (from, to, left, right) => {
  const inner = linear(Math.log(from), Math.log(to), left, right);
  const scale = (value) => (value <= from ? left : inner(Math.log(value)));
  scale.invert = (position) => Math.exp(inner.invert(position));
  return scale;
};

function roundStep(rough, steps = [1, 2, 5, 10]) {
  const decade = 10 ** Math.floor(Math.log10(rough));
  return decade * steps.find((step) => step * decade >= rough * (1 - 1e-9));
}

const CLOCK_STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400];

function clockStep(rough) {
  if (rough <= 1) return roundStep(rough);
  return CLOCK_STEPS.find((step) => step >= rough) ?? 86400 * roundStep(rough / 86400);
}

function ticks(from, to, step) {
  const first = Math.ceil(from / step - 1e-9);
  const count = Math.floor(to / step + 1e-9) - first + 1;
  return Array.from({ length: Math.max(0, count) }, (_, index) => (first + index) * step);
}

// 1, 2 and 5 of each decade where there is room for them, else 1 alone, of every so many decades.
function logTicks(from, to, room) {
  const decades = Math.log10(to / from);
  const heads = decades * 3 <= room ? [1, 2, 5] : [1];
  const every = Math.max(1, Math.ceil(decades / room));
  const found = [];
  for (let power = Math.floor(Math.log10(from)); power <= Math.log10(to); power++) {
    if (power % every === 0) found.push(...heads.map((head) => head * 10 ** power));
  }
  return found.filter((value) => value >= from * (1 - 1e-9) && value <= to * (1 + 1e-9));
}

// A redraw at most once a frame, however often it is asked for.
function onceAFrame(action) {
  let asked = false;
  return () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      action();
    });
  };
}

// Without zeros that say nothing: "1 s" of an axis need not be "1.00 s".
const trimmed = (text) => text.replace(/(\.\d*?)0+(?=\D*$)/, "$1").replace(/\.(?=\D*$)/, "");

const isLast = (values, index) => index === values.length - 1;
const colour = (index) => `var(--series-${index % 6})`;
// A second means beside colour to tell lines apart.
const dash = (index) => ["", "6 3", "2 2", "8 3 2 3", "12 4", "1 3"][index % 6] || null;

const NARROW_WINDOW = 640; // pixels

// The tooltip: one for the page, beside the pointer; where there is none, at the bottom of the window.

const tooltip = {
  show(content, pointer = null) {
    const element = document.getElementById("tooltip");
    element.replaceChildren(...content);
    element.hidden = false;
    const beside = pointer !== null && window.innerWidth > NARROW_WINDOW;
    element.classList.toggle("docked", !beside);
    element.classList.toggle("two", element.querySelector("thead") === null);
    if (!beside) {
      element.style.removeProperty("left");
      element.style.removeProperty("top");
      return;
    }
    const { width, height } = element.getBoundingClientRect();
    const right = pointer.clientX + 18;
    const left = right + width < window.innerWidth - 8 ? right : pointer.clientX - 18 - width;
    const top = Math.min(pointer.clientY - 12, window.innerHeight - height - 8);
    element.style.left = `${Math.max(8, left)}px`;
    element.style.top = `${Math.max(8, top)}px`;
  },
  hide() {
    document.getElementById("tooltip").hidden = true;
  },
};
