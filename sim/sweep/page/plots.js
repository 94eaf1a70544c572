"use strict";
// Plots of points: lines over an axis of numbers or names, and a heat map.

const HEIGHT = 320;

// An axis of values between two positions: `at` is where one lies, `marks` are [value, label].
// isExact: the marks are the values themselves, as many as have room.
function axisOf(values, left, right, format, room, isExact = false) {
  const known = values.filter((value) => value !== null);
  if (!known.every((value) => typeof value === "number") || known.length < values.length) {
    const names = [...new Set(values)];
    const at = (value) => left + ((names.indexOf(value) + 0.5) * (right - left)) / names.length;
    return { at, marks: names.map((value) => [value, settingText(value)]), isNumeric: false };
  }
  const [low, high] = [Math.min(...known), Math.max(...known)];
  const label = (value) => [value, trimmed(format(value))];
  const exact = (at) => {
    const marks = [];
    for (const [value, text] of [...new Set(known)].sort((a, b) => a - b).map(label)) {
      const needed = 7 * text.length + 10;
      if (!marks.length || Math.abs(at(value) - at(marks.at(-1)[0])) >= needed) {
        marks.push([value, text]);
      }
    }
    return marks;
  };
  if (low > 0 && high / low >= 8) {
    const ends = [low / 1.1, high * 1.1];
    const at = logarithmic(...ends, left, right);
    return { at, marks: isExact ? exact(at) : logTicks(...ends, room).map(label), isNumeric: true };
  }
  const margin = (high - low) * 0.05 || Math.abs(high) * 0.5 || 1;
  const ends = [low >= 0 ? Math.max(0, low - margin) : low - margin, high + margin];
  const step = roundStep((ends[1] - ends[0]) / room);
  const at = linear(...ends, left, right);
  return { at, marks: isExact ? exact(at) : ticks(...ends, step).map(label), isNumeric: true };
}

const settingText = (value) =>
  value === null ? "none" : typeof value === "number" ? trimmed(FORMATS.count(value)) : String(value);

// series: [{name, points: [{x, y, hollow, title}], mark}]; a y of null is no point, a mark a vertical line at an x.
// limit: where a horizontal line is drawn, or null.
function linePlot(image, { series, xs, xFormat, yFormat, limit = null, description }) {
  const width = image.parentNode.clientWidth;
  if (!width) return;
  build(image, { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, role: "img", "aria-label": description });
  const [left, right, top, bottom] = [64, width - 16, 12, HEIGHT - 28];
  const ys = series.flatMap(({ points }) => points.map(({ y }) => y)).filter((y) => y !== null);
  if (!ys.length) {
    image.replaceChildren(svg("text", { class: "empty", x: width / 2, y: HEIGHT / 2, "text-anchor": "middle" },
      "Nothing was measured"));
    return;
  }
  const x = axisOf(xs, left, right, xFormat, Math.max(2, Math.floor((right - left) / 80)), true);
  const y = axisOf(limit === null ? ys : [...ys, limit], bottom, top, yFormat, 6);
  image.replaceChildren(
    ...y.marks.flatMap(([value, label]) => [
      svg("line", { class: "grid", x1: left, x2: right, y1: y.at(value), y2: y.at(value) }),
      svg("text", { class: "label", x: left - 8, y: y.at(value) + 4, "text-anchor": "end" }, label)]),
    svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
    ...x.marks.map(([value, label]) =>
      svg("text", { class: "label", x: x.at(value), y: HEIGHT - 8, "text-anchor": "middle" }, label)),
    limit === null ? "" : svg("line", { class: "limit", x1: left, x2: right, y1: y.at(limit), y2: y.at(limit) }),
    limit === null ? "" : svg("text", { class: "label", x: right, y: y.at(limit) - 5, "text-anchor": "end" }, "SLO"),
    ...series.map(({ points, mark }, index) => {
      const shown = points.filter((point) => point.y !== null);
      const path = shown.map((p, i) => `${i ? "L" : "M"}${x.at(p.x).toFixed(1)} ${y.at(p.y).toFixed(1)}`).join("");
      return svg("g", { style: `--colour:${colour(index)}` },
        x.isNumeric && shown.length > 1 ? svg("path", { class: "line", "stroke-dasharray": dash(index), d: path }) : null,
        mark === undefined || mark === null ? null
          : svg("line", { class: "capacity", x1: x.at(mark), x2: x.at(mark), y1: top, y2: bottom }),
        shown.map((p) => svg("circle", { class: p.hollow ? "point hollow" : "point", cx: x.at(p.x), cy: y.at(p.y), r: 4 },
          svg("title", {}, p.title))));
    }));
}

// rows and columns are values of settings; cell(row, column) is {value, title}, a value of null is drawn as an empty cell.
function heatMap(image, { rows, columns, cell, format, description }) {
  const width = image.parentNode.clientWidth;
  if (!width) return;
  const [left, top, right] = [120, 8, width - 8];
  const [wide, high] = [(right - left) / columns.length, 44];
  const height = top + rows.length * high + 28;
  build(image, { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": description });
  const values = rows.flatMap((row) => columns.map((column) => cell(row, column).value)).filter((v) => v !== null);
  const [low, most] = [Math.min(...values), Math.max(...values)];
  const shade = (value) => (value === null ? 0 : most > low ? 0.08 + (0.6 * (value - low)) / (most - low) : 0.3);
  image.replaceChildren(
    ...rows.map((row, i) => svg("text", {
      class: "label", x: left - 10, y: top + (i + 0.5) * high + 4, "text-anchor": "end" }, settingText(row))),
    ...columns.map((column, j) => svg("text", {
      class: "label", x: left + (j + 0.5) * wide, y: height - 8, "text-anchor": "middle" }, settingText(column))),
    ...rows.flatMap((row, i) => columns.map((column, j) => {
      const { value, title } = cell(row, column);
      const [x, y] = [left + j * wide, top + i * high];
      return svg("g", { class: "cell" }, svg("title", {}, title),
        svg("rect", { x: x + 1, y: y + 1, width: Math.max(1, wide - 2), height: high - 2, "fill-opacity": shade(value) }),
        svg("text", { x: x + wide / 2, y: y + high / 2 + 4, "text-anchor": "middle" },
          value === null ? NONE : format(value)));
    })));
}
