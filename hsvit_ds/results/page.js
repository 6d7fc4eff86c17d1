"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "x", "cross", "triangle-down", "star"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const MOST_ROWS = 2000;
const shown = DATA.map((section) => section.groups.map((group) => group.shown));
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const safe = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const short = (text) => (text.length > 48 ? text.slice(0, 47) + "…" : text);

/* Plots */

function xOf(series, key) {
  if (key === "epoch") return series.per_epoch ? series.x.step.map((step) => step / series.per_epoch) : null;
  return series.x[key] || null;
}

function visible(plot) {
  return plot.series.filter((series) => xOf(series, plot.key) && (series.group < 0 || shown[plot.section][series.group]));
}

function trace(plot, series, many, few) {
  const place = series.group, published = place < 0;
  const tint = published ? colour("--soft") : colour(`--c${place % 7}`);
  const bars = series.error
    ? { array: series.error }
    : series.low && { symmetric: false, array: series.high.map((high, i) => high - series.y[i]),
                      arrayminus: series.low.map((low, i) => series.y[i] - low) };
  const said = series.y.map((y, i) => `${(series.sign || [])[i] || ""}${Number(y === null ? NaN : y).toPrecision(4)}`
    + (series.error ? ` ± ${series.error[i].toPrecision(2)} (n = ${series.n})` : "")
    + (series.low ? ` (${series.low[i].toPrecision(4)} to ${series.high[i].toPrecision(4)})` : ""));
  return {
    type: "scatter", x: xOf(series, plot.key), y: series.y, name: safe(series.name), text: said,
    mode: plot.lines ? (few ? "lines+markers" : "lines") : "markers", opacity: many ? 0.75 : 1,
    line: { color: tint, width: many ? 1 : 1.75, dash: published ? "dot" : DASHES[place % 5] },
    marker: { color: tint, size: plot.lines ? (many ? 5 : 7) : 11, symbol: SYMBOLS[Math.max(place, 0) % 8] + (published ? "-open" : "") },
    error_y: bars ? { type: "data", thickness: 1.2, width: 4, color: tint, ...bars } : undefined,
    hovertemplate: `${safe(short(series.name))}<br>${plot.key} %{x:,.4~g}<br>%{text}<extra></extra>`,
  };
}

/* Ticks of a logarithmic axis as a person writes numbers; plotly shortens those between powers of ten. */
function ticks(series) {
  const values = series.flatMap((one) => one.y).filter((y) => y > 0);
  if (!values.length) return {};
  const low = Math.log10(values.reduce((a, b) => Math.min(a, b))), high = Math.log10(values.reduce((a, b) => Math.max(a, b)));
  const parts = high - low > 4 ? [1] : high - low > 1.5 ? [1, 3] : [1, 2, 3, 5, 7];
  const found = [];
  for (let power = Math.floor(low); power <= Math.ceil(high); power++)
    for (const part of parts) found.push(Number((part * 10 ** power).toPrecision(2)));
  return { tickvals: found, ticktext: found.map((value) => (value >= 1e5 || value < 1e-4 ? value.toExponential(0) : String(value))) };
}

function draw(plot) {
  const series = visible(plot);
  const many = series.length > 12, few = series.every((one) => one.y.length <= 15);
  const soft = colour("--soft");
  const axis = { color: soft, gridcolor: colour("--grid"), zeroline: false, linecolor: colour("--line"), automargin: true,
                 tickfont: { size: 12 }, separatethousands: true };
  const title = (text) => ({ text: safe(text), font: { size: 12.5 }, standoff: 8 });
  const whole = plot.key === "submodules" ? { dtick: 1 } : {};
  Plotly.react(plot.place, series.map((one) => trace(plot, one, many, few)), {
    margin: { l: 8, r: 12, t: 12, b: 8 }, showlegend: false, hovermode: "closest", dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", color: colour("--text") },
    hoverlabel: { bgcolor: colour("--raised"), bordercolor: colour("--line"), font: { color: colour("--text"), size: 13 }, align: "left" },
    xaxis: { ...axis, ...whole, title: title(plot.xs.find(([key]) => key === plot.key)[1]) },
    yaxis: { ...axis, title: title(plot.y), ...(plot.log ? { type: "log", ...ticks(series) } : {}) },
  }, { displayModeBar: false, responsive: true });
  plot.drawn = true;
  if (plot.details.open) fill(plot);
}

/* The points of a plot as a table */

function fill(plot) {
  const error = plot.series.some((one) => one.error || one.low);
  const head = ["", plot.key, plot.y, ...(error ? ["±, or lowest to highest"] : [])];
  const rows = [];
  let count = 0;
  for (const series of visible(plot)) {
    const x = xOf(series, plot.key);
    count += x.length;
    for (let i = 0; i < x.length && rows.length < MOST_ROWS; i++)
      rows.push([series.name, Number(x[i].toPrecision(5)), series.y[i] === null ? "not finite" : series.y[i],
        ...(error ? [series.error ? series.error[i] : series.low ? `${series.low[i]} to ${series.high[i]}` : "–"] : [])]);
  }
  const table = document.createElement("table");
  const line = (parent, cells, first) => {
    const row = parent.appendChild(document.createElement("tr"));
    cells.forEach((cell, i) => {
      const element = row.appendChild(document.createElement(first || !i ? "th" : "td"));
      element.scope = first ? "col" : "row";
      element.textContent = cell;
    });
  };
  line(table.appendChild(document.createElement("thead")), head, true);
  const body = table.appendChild(document.createElement("tbody"));
  rows.forEach((row) => line(body, row, false));
  const scroll = document.createElement("div");
  scroll.className = "scroll tall";
  scroll.tabIndex = 0;
  scroll.append(table);
  const rest = document.createElement("p");
  rest.className = "note";
  rest.textContent = count > rows.length ? `The first ${rows.length} of ${count} points; hide groups to see others, or write JSON.` : "";
  plot.details.replaceChildren(plot.details.querySelector("summary"), scroll, rest);
}

const plots = [];
DATA.forEach((section, number) => section.plots.forEach((plot) => {
  plot.section = number;
  plot.key = plot.xs[0][0];
  plot.place = document.getElementById(plot.id);
  plot.details = document.getElementById(`${plot.id}-data`);
  plot.details.addEventListener("toggle", () => plot.details.open && fill(plot));
  plots.push(plot);
}));

/* One after another, so that the page answers meanwhile. */
let waiting = [];
function redraw(some) {
  const idle = waiting.length === 0;
  waiting = [...new Set([...waiting, ...some])];
  document.documentElement.dataset.drawn = waiting.length ? "no" : "yes";
  if (idle && waiting.length) setTimeout(next);
}
function next() {
  draw(waiting.shift());
  if (waiting.length) setTimeout(next);
  else document.documentElement.dataset.drawn = "yes";
}
redraw(plots);

/* Controls */

document.querySelectorAll("select[data-x]").forEach((select) => select.addEventListener("change", () => {
  const some = plots.filter((plot) => select.dataset.x.split(" ").includes(plot.id));
  some.forEach((plot) => { plot.key = select.value; });
  redraw(some);
}));

document.querySelectorAll(".legend").forEach((legend) => {
  const number = Number(legend.dataset.section);
  const buttons = [...legend.querySelectorAll("[data-group]")];
  const show = () => {
    buttons.forEach((button) => button.setAttribute("aria-pressed", shown[number][button.dataset.group]));
    redraw(plots.filter((plot) => plot.section === number));
  };
  buttons.forEach((button) => button.addEventListener("click", () => {
    shown[number][button.dataset.group] = !shown[number][button.dataset.group];
    show();
  }));
  legend.querySelectorAll("[data-all]").forEach((button) => button.addEventListener("click", () => {
    shown[number].fill(button.dataset.all === "yes");
    show();
  }));
});

document.querySelectorAll("th[aria-sort] button").forEach((button) => button.addEventListener("click", () => {
  const head = button.parentElement, row = head.parentElement, column = [...row.children].indexOf(head);
  const body = row.closest("table").tBodies[0], rows = [...body.rows];
  const value = (line) => line.children[column].dataset.value ?? line.children[column].textContent;
  const numbers = rows.every((line) => !isNaN(value(line)));
  const [first, second] = numbers ? ["descending", "ascending"] : ["ascending", "descending"];
  const order = head.getAttribute("aria-sort") === first ? second : first;
  [...row.children].forEach((other) => other.hasAttribute("aria-sort") && other.setAttribute("aria-sort", "none"));
  head.setAttribute("aria-sort", order);
  const compare = (a, b) => (numbers ? value(a) - value(b) : value(a).localeCompare(value(b), undefined, { numeric: true }));
  const missing = (line) => value(line) === "";
  body.append(...rows.sort((a, b) => missing(a) - missing(b) || (order === "ascending" ? compare(a, b) : compare(b, a))));
}));

document.addEventListener("theme", () => redraw(plots));
