"use strict";
// What both pages share: elements, tables, and charts over uPlot. Text goes in by textContent alone.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const number = n => n.toLocaleString("en");
const COLOURS = 8, HEIGHT = 230, ROWS = 200;

function make(tag, text, name) {
  const node = document.createElement(tag);
  if (text !== undefined && text !== null) node.textContent = text;
  if (name) node.className = name;
  return node;
}

/** A number in at most five digits, with the sizes of thousands written out. */
function short(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e15) return number(value);
  const size = Math.abs(value);
  if (size >= 1e4) return number(Math.round(value));
  return size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

function duration(seconds) {
  if (seconds < 120) return `${short(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 120 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function bytes(count) {
  return count >= 2 ** 30 ? `${(count / 2 ** 30).toFixed(2)} GiB` : `${(count / 2 ** 20).toFixed(0)} MiB`;
}

/** A table; numbers stand at the right. `rows` are lists of texts and numbers. */
function table(caption, head, rows) {
  const box = make("div", null, "scroll"), node = make("table"), top = make("tr");
  box.tabIndex = 0;
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", caption);
  node.append(make("caption", caption));
  head.forEach((text, i) => {
    const cell = make("th", text, rows.some(row => typeof row[i] === "number") ? "number" : "");
    cell.scope = "col";
    top.append(cell);
  });
  const body = make("tbody"), first = make("thead");
  first.append(top);
  for (const row of rows) {
    const line = make("tr");
    row.forEach((value, i) => {
      const cell = make(i ? "td" : "th", short(value), typeof value === "number" ? "number" : "");
      if (!i) cell.scope = "row";
      line.append(cell);
    });
    body.append(line);
  }
  node.append(first, body);
  box.append(node);
  return box;
}

/** `build` makes what is behind a summary when it is first opened. */
function folded(summary, build) {
  const node = make("details");
  node.append(make("summary", summary));
  node.addEventListener("toggle", () => node.children.length === 1 && node.append(build()));
  return node;
}

/** A list of bars with their shares: [{label, share, text}]. */
function shares(target, entries) {
  for (const entry of entries) {
    const node = make("div", null, "share"), line = make("p"), back = make("div"), bar = make("div");
    line.append(make("span", entry.label), make("span", entry.text));
    bar.style.width = `${100 * Math.min(entry.share, 1)}%`;
    bar.style.background = entry.colour || "";
    back.append(bar);
    node.append(line, back);
    target.append(node);
  }
}

const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const drawn = new Set();  // all charts of the page
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(one => one.redraw()));

/** Exponential smoothing over steps: a value counts `keep` as much one step later. */
function smooth(steps, values, keep) {
  let sum = 0, weight = 0, last = steps[0];
  return values.map((value, i) => {
    const kept = keep ** Math.max(steps[i] - last, 1);
    last = steps[i];
    sum = sum * kept + value * (1 - kept);
    weight = weight * kept + (1 - kept);
    return keep ? sum / weight : value;
  });
}

/** One sentence on a series: its first, last, lowest and highest value. */
function sentence(name, unit, xs, ys) {
  if (!ys.length) return `${name}: no values`;
  let low = 0, high = 0;
  ys.forEach((y, i) => { if (y < ys[low]) low = i; if (y > ys[high]) high = i; });
  return `${name}: first ${short(ys[0])}, last ${short(ys.at(-1))}, lowest ${short(ys[low])} at ${unit} ${
    short(xs[low])}, highest ${short(ys[high])} at ${unit} ${short(xs[high])}`;
}

/**
 * A chart of lines, in a card. `options`: title, unit (of x, "step"), say (a value as text), wide, group (charts
 * of one group zoom and hover together), onPick(x) (a click or Enter on a point).
 * `series`: [{label, steps, values, means, colour (0 ..), dash, dots, warn, smoothed}]; a `smoothed` series is drawn
 * faint, with its smoothed line over it, by `chart.smooth(keep)`.
 */
function chart(target, options, series) {
  const unit = options.unit || "step", say = options.say || short;
  const card = make("figure", null, `card chart${options.wide ? " wide" : ""}`);
  const legend = make("div", null, "legend"), plot = make("div", null, "plot"), readout = make("p", null, "readout");
  readout.setAttribute("aria-live", "polite");
  card.append(make("h3", options.title), legend, plot, readout);
  target.append(card);
  const shown = series.filter(one => one.steps.length);
  const lines = shown.flatMap((one, of) => {
    const own = { ...one, of, xs: one.steps, ys: one.values };
    return one.smoothed ? [{ ...own, faint: true }, { ...own, over: true }] : [own];
  });
  const visible = shown.map(() => true);
  const stroke = line => () => colour(line.warn ? "--warn" : `--s${(line.colour || 0) % COLOURS}`);
  let keep = 0, joined = [[]], u = null;

  function build() {
    for (const line of lines.filter(line => line.over)) {
      const from = line.means || { steps: line.steps, values: line.values };
      line.xs = from.steps;
      line.ys = smooth(from.steps, from.values, keep);
    }
    joined = lines.length ? uPlot.join(lines.map(line => [line.xs, line.ys])) : [[]];
  }
  function style(line) {
    const dots = line.dots || line.steps.length === 1;
    return {
      label: line.label, scale: "y", spanGaps: true, stroke: stroke(line), width: line.faint ? 1 : 2,
      alpha: line.faint ? (keep || line.means ? .3 : 0) : 1, dash: line.dash ? [6, 5] : undefined,
      points: { show: Boolean(dots), size: line.warn ? 9 : 6, fill: stroke(line) },
      paths: line.warn ? () => null : undefined,
    };
  }
  const axis = size => ({ stroke: () => colour("--muted"), grid: { stroke: () => colour("--grid"), width: 1 },
    ticks: { stroke: () => colour("--line"), width: 1, size: 5 }, font: "12px system-ui, sans-serif", size });
  const width = () => Math.max(plot.clientWidth, 200);
  function draw() {
    if (u) { drawn.delete(u); u.destroy(); }
    build();
    const sync = options.group ? { key: options.group, setSeries: false, scales: ["x", null] } : undefined;
    u = new uPlot({
      width: width(), height: HEIGHT, legend: { show: false }, padding: [10, 12, 0, 0],
      scales: { x: { time: false } },
      axes: [{ ...axis(30), values: (_, ticks) => ticks.map(tick => Number.isInteger(tick) ? number(tick) : "") },
        { ...axis(64), values: (_, ticks) => ticks.map(say), grid: { stroke: () => colour("--grid"), width: 1 } }],
      series: [{}, ...lines.map(style)],
      cursor: { drag: { x: true, y: false, setScale: true }, sync, y: false, focus: { prox: -1 }, bind: { dblclick: () => () => (reset(), null) } },
      hooks: { setCursor: [hover] },
    }, joined, plot);
    u.over.addEventListener("click", () => pick());
    drawn.add(u);
    visible.forEach((on, of) => on || toggle(of, false));
  }
  /** The value of a line at index `i`, or the nearest one before it. */
  function at(row, i) {
    while (i >= 0 && (row[i] === null || row[i] === undefined)) i--;
    return i < 0 ? null : row[i];
  }
  function hover(plotted) {
    const i = plotted.cursor.idx;
    for (const button of legend.children) {
      const of = Number(button.dataset.of), place = lines.findLastIndex(line => line.of === of);
      const exact = shown[of].dots || shown[of].warn;
      const value = i === null || i === undefined ? null : exact ? joined[place + 1][i] : at(joined[place + 1], i);
      button.lastChild.textContent = value === null || value === undefined ? "" : ` ${say(value)}`;
    }
    if (i === null || i === undefined) return;
    const raw = lines.map((line, k) => line.faint && visible[line.of] ? joined[k + 1][i] : null).filter(y => y !== null && y !== undefined);
    const warned = lines.some((line, k) => line.warn && typeof joined[k + 1][i] === "number");
    readout.textContent = `${unit} ${short(joined[0][i])}${raw.length && keep ? ` · unsmoothed ${raw.map(say).join(", ")}` : ""}${
      warned ? ` · ${options.warning || "stands out"}` : ""}`;
  }
  function toggle(of, on) {
    visible[of] = on;
    lines.forEach((line, k) => line.of === of && u.setSeries(k + 1, { show: on }));
  }
  function pick() {
    const i = u.cursor.idx;
    if (options.onPick && typeof i === "number") options.onPick(joined[0][i]);
  }
  function group() { return options.group ? [...drawn].filter(one => one.group === options.group) : [u]; }
  function zoom(min, max) {
    const reached = group();
    for (const one of reached) one.setScale("x", { min, max });
  }
  function reset() {
    for (const one of group()) one.setScale("x", { min: one.data[0][0], max: one.data[0].at(-1) });
  }
  function move(to) {
    const i = Math.min(Math.max(to, 0), joined[0].length - 1);
    u.setCursor({ left: u.valToPos(joined[0][i], "x"), top: u.over.clientHeight / 2 });
  }
  function key(event) {
    if (!joined[0].length) return;
    const i = u.cursor.idx ?? -1, last = joined[0].length - 1, { min, max } = u.scales.x;
    const middle = joined[0][Math.max(i, 0)], quarter = (max - min) / 4;
    const far = Math.max(1, Math.round(last / 20));
    const todo = { ArrowRight: () => move(i + 1), ArrowLeft: () => move(i - 1), PageDown: () => move(i + far), PageUp: () => move(i - far),
      Home: () => move(0), End: () => move(last), Escape: reset, Enter: pick,
      "+": () => zoom(Math.max(min, middle - quarter), Math.min(max, middle + quarter)), "-": reset }[event.key];
    if (!todo || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    todo();
  }
  plot.tabIndex = 0;
  plot.setAttribute("role", "application");
  plot.setAttribute("aria-roledescription", "chart");
  plot.setAttribute("aria-label", `${options.title}. ${
    shown.map(one => sentence(one.label, unit, one.steps, one.values)).join(". ") || "No values"
  }. Arrow keys move along it, plus zooms in, Escape shows all of it.`);
  plot.addEventListener("keydown", key);
  shown.forEach((one, of) => {
    const button = make("button"), swatch = make("i", null, one.dots || one.warn ? "dots" : one.dash ? "dashed" : "");
    const name = `var(${one.warn ? "--warn" : `--s${(one.colour || 0) % COLOURS}`})`;
    swatch.style[one.dots || one.warn ? "background" : "borderColor"] = name;
    button.type = "button";
    button.dataset.of = of;
    button.setAttribute("aria-pressed", "true");
    button.append(swatch, make("span", one.label), make("b", ""));
    button.onclick = () => {
      button.setAttribute("aria-pressed", String(!visible[of]));
      toggle(of, !visible[of]);
    };
    legend.append(button);
  });
  if (!shown.length) { readout.textContent = "no values"; return null; }
  const many = shown.filter(one => one.of);
  if (many.length) card.append(make("p", `A line of ${number(many[0].of)} steps is drawn from the lowest and the highest value of each of ${
    number(many[0].means.steps.length)} spans; its smoothed line from their means.`, "facts"));
  card.append(folded("Table of values", () => values(options.title, unit, shown)));
  draw();
  u.group = options.group;
  new ResizeObserver(() => u.width === width() || u.setSize({ width: width(), height: HEIGHT })).observe(plot);
  return { card, zoom, reset, move, get plot() { return u; },
    smooth(value) {
      if (!lines.some(line => line.over)) return;
      const { min, max } = u.scales.x;
      keep = value;
      draw();
      u.group = options.group;
      u.setScale("x", { min, max });
    } };
}

/** The values behind a chart: at most ROWS of them, evenly spaced. */
function values(title, unit, series) {
  const joined = uPlot.join(series.map(one => [one.steps, one.values]));
  const all = joined[0].length, count = Math.min(all, ROWS), rows = [];
  for (let k = 0; k < count; k++) {
    const i = count === 1 ? 0 : Math.round(k * (all - 1) / (count - 1));
    rows.push(joined.map(row => row[i] ?? null));
  }
  return table(`${title}${all > ROWS ? `: ${number(ROWS)} of ${number(all)} values, evenly spaced` : ""}`,
    [unit, ...series.map(one => one.label)], rows);
}

/** A histogram, in a card: `counts[i]` lie from `edges[i]` to `edges[i + 1]`. */
function bars(target, title, unit, what, edges, counts) {
  const card = make("figure", null, "card chart"), plot = make("div", null, "plot"), readout = make("p", null, "readout");
  readout.setAttribute("aria-live", "polite");
  card.append(make("h3", title), plot, readout);
  target.append(card);
  const most = Math.max(...counts, 0), top = counts.indexOf(most);
  const words = i => `${number(edges[i])} to ${number(edges[i + 1])} ${unit}: ${number(counts[i])} ${what}`;
  if (!counts.length) { readout.textContent = "no values"; return; }
  const axis = size => ({ stroke: () => colour("--muted"), grid: { stroke: () => colour("--grid"), width: 1 },
    ticks: { stroke: () => colour("--line"), width: 1, size: 5 }, font: "12px system-ui, sans-serif", size });
  const width = () => Math.max(plot.clientWidth, 200);
  const last = edges.at(-1);
  const u = new uPlot({ width: width(), height: 190, legend: { show: false }, padding: [10, 12, 0, 0],
    scales: { x: { time: false, range: [edges[0], last] }, y: { range: (_, low, high) => [0, Math.max(high, 1) * 1.05] } },
    axes: [axis(30), { ...axis(56), incrs: [1, 2, 5].flatMap(k => Array.from({ length: 12 }, (_, e) => k * 10 ** e)).sort((a, b) => a - b),
      values: (_, ticks) => ticks.map(short) }],
    series: [{}, { label: what, stroke: () => colour("--bar"), fill: () => colour("--bar"), width: 0, points: { show: false },
      paths: (plotted, k) => steps(plotted, k, edges) }],
    cursor: { drag: { x: false, y: false }, y: false, points: { show: false } },
    hooks: { setCursor: [plotted => show(plotted.cursor.left < 0 ? null : plotted.posToVal(plotted.cursor.left, "x"))] },
  }, [edges, [...counts, null]], plot);
  drawn.add(u);
  let here = -1;
  function show(value) {
    if (value === null) return;
    const i = edges.findIndex((edge, k) => k < counts.length && value >= edge && value < edges[k + 1]);
    here = i < 0 ? here : i;
    if (i >= 0) readout.textContent = words(i);
  }
  plot.tabIndex = 0;
  plot.setAttribute("role", "application");
  plot.setAttribute("aria-roledescription", "histogram");
  plot.setAttribute("aria-label", `${title}. From ${number(edges[0])} to ${number(last)} ${unit}; the highest bar: ${words(top)}. Arrow keys move along it.`);
  plot.addEventListener("keydown", event => {
    const to = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: counts.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    here = Math.min(Math.max(to, 0), counts.length - 1);
    u.setCursor({ left: u.valToPos((edges[here] + edges[here + 1]) / 2, "x"), top: 40 });
  });
  new ResizeObserver(() => u.width === width() || u.setSize({ width: width(), height: 190 })).observe(plot);
  card.append(folded("Table of values", () => table(title, [`from, ${unit}`, "to", what], counts.map((count, i) => [edges[i], edges[i + 1], count]))));
}

/** Bars from edge to edge, as uPlot draws paths. */
function steps(u, k, edges) {
  const fill = new Path2D(), base = u.valToPos(0, "y", true);
  for (let i = 0; i + 1 < edges.length; i++) {
    const left = u.valToPos(edges[i], "x", true), right = u.valToPos(edges[i + 1], "x", true), top = u.valToPos(u.data[k][i] || 0, "y", true);
    fill.rect(left + .5, top, Math.max(right - left - 1, 1), base - top);
  }
  return { fill, stroke: null };
}
