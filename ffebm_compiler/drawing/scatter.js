"use strict";
// A scatter picture of points with several figures: axes to choose, choices to hide, a table to sort.
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
// Okabe and Ito's colours, which differ for every kind of colour vision; the shapes differ too.
const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8a7a00", "#777777"];
const SHAPES = ["circle", "square", "triangle", "diamond"];
const WIDE = 640, HIGH = 460, LEFT = 78, RIGHT = 18, TOP = 16, BELOW = 52;
const names = Object.keys(data.points[0].choices);
const values = Object.fromEntries(names.map((name) => [name, [...new Set(data.points.map((p) => p.choices[name]))]]));
const state = { y: data.axes[0].key, x: (data.axes[1] || data.axes[0]).key, hidden: new Set(), chosen: null, sort: data.axes[0].key, up: false };

function made(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}
function drawn(tag, attributes = {}, text = "") {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text) node.textContent = text;
  return node;
}
const axisOf = (key) => data.axes.find((axis) => axis.key === key);
const label = (axis) => (axis.unit ? `${axis.name} (${axis.unit})` : axis.name);
const short = (value) => (value !== 0 && (Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3) ? value.toExponential(1) : String(+value.toPrecision(4)));
const shown = () => data.points.filter((p) => names.every((n) => !state.hidden.has(`${n}\n${p.choices[n]}`)));

function scale(key, points, from, to) {
  const found = points.map((p) => p.values[key]).filter((v) => v !== null);
  if (data.lines[key] !== undefined) found.push(data.lines[key]);
  let low = Math.min(...found), high = Math.max(...found);
  if (!found.length) { low = 0; high = 1; }
  const logarithmic = low > 0 && high / low > 30;
  const into = logarithmic ? Math.log10 : (v) => v;
  low = into(low); high = into(high);
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  low -= room; high += room;
  const at = (v) => from + ((into(v) - low) / (high - low)) * (to - from);
  const ticks = [];
  if (logarithmic) for (let e = Math.ceil(low); e <= Math.floor(high); e++) ticks.push(10 ** e);
  if (ticks.length < 2) {
    ticks.length = 0;
    const raw = (high - low) / 5, size = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((k) => k * size).find((s) => s >= raw);
    for (let k = Math.ceil(low / step); k * step <= high; k++) ticks.push(logarithmic ? 10 ** (k * step) : k * step);
  }
  return { at, ticks };
}

function shape(kind, x, y, r) {
  if (kind === "square") return drawn("rect", { x: x - r, y: y - r, width: 2 * r, height: 2 * r });
  if (kind === "circle") return drawn("circle", { cx: x, cy: y, r });
  const path = kind === "triangle"
    ? `M${x},${y - 1.2 * r}L${x + 1.1 * r},${y + 0.8 * r}H${x - 1.1 * r}Z`
    : `M${x},${y - 1.3 * r}L${x + 1.3 * r},${y}L${x},${y + 1.3 * r}L${x - 1.3 * r},${y}Z`;
  return drawn("path", { d: path });
}
const told = (p) => `${names.map((n) => `${n}: ${p.choices[n]}`).join(", ")}\n${data.axes.map((a) => `${a.name}: ${p.texts[a.key]}`).join(", ")}${p.front ? "\non the Pareto front" : ""}`;

function choose(point) {
  state.chosen = point;
  for (const node of document.querySelectorAll("[data-number]")) {
    node.classList.toggle("chosen", point !== null && data.points[+node.dataset.number] === point);
  }
  document.getElementById("told").textContent = point ? told(point) : "Point at a dot, or choose a row.";
}

function picture() {
  const svg = drawn("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img", "aria-label": data.title });
  const points = shown().filter((p) => p.values[state.x] !== null && p.values[state.y] !== null);
  const x = scale(state.x, points, LEFT, WIDE - RIGHT), y = scale(state.y, points, HIGH - BELOW, TOP);
  for (const tick of x.ticks) {
    svg.append(drawn("line", { x1: x.at(tick), x2: x.at(tick), y1: TOP, y2: HIGH - BELOW, class: "grid" }));
    svg.append(drawn("text", { x: x.at(tick), y: HIGH - BELOW + 18, "text-anchor": "middle", class: "quiet" }, short(tick)));
  }
  for (const tick of y.ticks) {
    svg.append(drawn("line", { x1: LEFT, x2: WIDE - RIGHT, y1: y.at(tick), y2: y.at(tick), class: "grid" }));
    svg.append(drawn("text", { x: LEFT - 8, y: y.at(tick) + 4, "text-anchor": "end", class: "quiet" }, short(tick)));
  }
  svg.append(drawn("text", { x: (LEFT + WIDE - RIGHT) / 2, y: HIGH - 10, "text-anchor": "middle" }, label(axisOf(state.x))));
  const middle = (TOP + HIGH - BELOW) / 2;
  svg.append(drawn("text", { x: 16, y: middle, "text-anchor": "middle", transform: `rotate(-90 16 ${middle})` }, label(axisOf(state.y))));
  for (const [key, value] of Object.entries(data.lines)) {
    if (key !== state.y) continue;
    svg.append(drawn("line", { x1: LEFT, x2: WIDE - RIGHT, y1: y.at(value), y2: y.at(value), class: "source" }));
    svg.append(drawn("text", { x: WIDE - RIGHT, y: y.at(value) - 4, "text-anchor": "end", class: "quiet" }, "source"));
  }
  const front = points.filter((p) => p.front).sort((a, b) => a.values[state.x] - b.values[state.x]);
  svg.append(drawn("path", { class: "front", d: front.map((p, k) => `${k ? "L" : "M"}${x.at(p.values[state.x])},${y.at(p.values[state.y])}`).join("") }));
  for (const point of points) {
    const place = values[names[0]].indexOf(point.choices[names[0]]);
    const kind = SHAPES[values[names[2]].indexOf(point.choices[names[2]]) % SHAPES.length];
    const colour = COLOURS[place % COLOURS.length];
    const group = drawn("g", { class: "point", tabindex: "0", "data-number": data.points.indexOf(point) });
    const [u, v] = [x.at(point.values[state.x]), y.at(point.values[state.y])];
    if (state.y === data.axes[0].key && point.error) {
      const ends = [point.values[state.y] - point.error, point.values[state.y] + point.error].map(y.at);
      group.append(drawn("line", { x1: u, x2: u, y1: ends[0], y2: ends[1], stroke: colour }));
    }
    const dot = shape(kind, u, v, 6);
    dot.setAttribute("class", "ring");
    dot.setAttribute("stroke", colour);
    dot.setAttribute("stroke-width", "1.8");
    dot.setAttribute("fill", point.front ? colour : "var(--paper)");
    group.append(dot, drawn("title", {}, told(point)));
    for (const event of ["mouseenter", "focus", "click"]) group.addEventListener(event, () => choose(point));
    svg.append(group);
  }
  document.getElementById("picture").replaceChildren(svg);
}

function table() {
  const head = made("tr", {}, ...[...names, ...data.axes.map((a) => a.key)].map((key) => {
    const axis = axisOf(key), sorted = state.sort === key;
    const cell = made("th", { "aria-sort": sorted ? (state.up ? "ascending" : "descending") : "none" });
    cell.append(made("button", { onclick: () => { state.up = sorted ? !state.up : false; state.sort = key; table(); } },
      `${axis ? axis.name : key}${sorted ? (state.up ? " ▲" : " ▼") : ""}`));
    return cell;
  }));
  const of = (p) => (axisOf(state.sort) ? p.values[state.sort] : p.choices[state.sort]);
  const order = (a, b) => (a === b ? 0 : a === null ? 1 : b === null ? -1 : (a < b ? -1 : 1) * (state.up ? 1 : -1));
  const rows = shown().sort((a, b) => order(of(a), of(b))).map((p) => made("tr",
    { "data-number": data.points.indexOf(p), onclick: () => choose(p) },
    ...names.map((n, k) => made("td", {}, `${k === 0 && p.front ? "★ " : ""}${p.choices[n]}`)),
    ...data.axes.map((a) => made("td", {}, p.texts[a.key]))));
  document.getElementById("table").replaceChildren(made("table", {}, made("thead", {}, head), made("tbody", {}, ...rows)));
  choose(state.chosen);
}

function redraw() { picture(); table(); }
function select(which) {
  const node = made("select", { id: which, onchange: (event) => { state[which] = event.target.value; redraw(); } },
    ...data.axes.map((a) => made("option", { value: a.key, ...(a.key === state[which] ? { selected: "" } : {}) }, a.name)));
  return made("label", {}, which === "y" ? "up: " : "across: ", node);
}
function filter(name) {
  const boxes = values[name].map((value, k) => {
    const box = made("input", { type: "checkbox", checked: "", onchange: (event) => {
      state.hidden[event.target.checked ? "delete" : "add"](`${name}\n${value}`); redraw();
    } });
    const mark = drawn("svg", { width: 14, height: 14, viewBox: "0 0 14 14", style: "display:inline;width:14px;vertical-align:-2px" });
    const colour = name === names[0] ? COLOURS[k % COLOURS.length] : "var(--ink)";
    const dot = shape(name === names[2] ? SHAPES[k % SHAPES.length] : "circle", 7, 7, 4.5);
    dot.setAttribute("fill", name === names[0] ? colour : "none");
    dot.setAttribute("stroke", colour);
    if (name !== names[1]) mark.append(dot);
    return made("label", {}, box, " ", ...(name === names[1] ? [] : [mark, " "]), value);
  });
  return made("fieldset", {}, made("legend", {}, name), ...boxes);
}

document.body.append(
  made("h1", {}, data.title),
  made("div", { class: "controls" }, select("y"), select("x"), ...names.map(filter)),
  made("div", { class: "layout" },
    made("div", { class: "picture" }, made("div", { id: "picture" }), made("div", { id: "told", class: "told", "aria-live": "polite" })),
    made("div", { id: "table", class: "table" })),
  made("div", { class: "notes" }, ...data.notes.map((note) => made("p", {}, note))),
);
redraw();
