// Runs: curves and figures of all profiles, and of `dvc exp`, side by side, each with its command.
import { ask, by, el, onTab, saysMore, tell } from "./common.js";

// A profile has the same colour in all charts, and what is measured the same dashes; beyond so many profiles, marks.
const COLOURS = 6; // --curve-0 and so on: the least alike there are, also to the colour-blind
const DASHES = { shuffled: "7 4", const_set: "1.5 3.5" };
const MARKS = ["", "●", "■", "▲", "✚", "◆"];
const NAMES = {
  val: "own text", shuffled: "another picture's", const_set: "best constant set", val_loss: "validation loss",
};
const STAGES = { pretrain: "pre-training", finetune: "fine-tuning", finetune_scratch: "fine-tuning from scratch" };
let found = null;

export function startRuns() {
  saysMore(by("figures").parentElement, "tbody tr");
  onTab("runs", load);
  by("filter").addEventListener("input", table);
  by("experiments").addEventListener("click", experiments);
}

async function load() {
  if (found) return;
  tell("runs-fault", null);
  try {
    found = await ask("/api/runs");
  } catch (error) {
    tell("runs-fault", error);
    return;
  }
  const of = found.profiles.map((profile) => (found.pictures[profile] ? `${profile} (${found.pictures[profile]})` : profile));
  by("runs-lead").textContent = found.profiles.length
    ? `Profiles with results here: ${of.join(", ")}. ${found.differ ? "These are of different pictures: their figures and curves do not compare. " : ""}The command beside a figure makes it anew, where the profile is the active one.`
    : "No profile has results yet: run `terraalign try FOLDER` or `terraalign run`.";
  charts();
  table();
}

function charts() {
  const groups = Map.groupBy(found.curves, (curve) => `${curve.of}: ${STAGES[curve.stage]}`);
  by("curves").replaceChildren(...[...groups].map(([title, curves]) => chart(title, curves)));
}

async function experiments() {
  if (!found) return;
  const button = by("experiments");
  button.disabled = true;
  by("experiments-note").textContent = "DVC is asked, which takes a while.";
  try {
    const { experiments: listed, curves, without_curves: lost } = await ask("/api/experiments");
    found.commands = {};
    for (const { name, figures, command: own } of listed) {
      if (!found.profiles.includes(name)) found.profiles.push(name);
      found.commands[name] = own;
      for (const [key, { command, label, value }] of Object.entries(figures)) {
        found.figures[key] ??= { command, label, values: {} };
        found.figures[key].values[name] = value;
      }
    }
    const names = listed.map(({ name }) => name);
    found.curves = [...found.curves.filter(({ profile }) => !names.includes(profile)), ...curves];
    by("experiments-note").textContent = listed.length
      ? `Experiments: ${listed.length}. Above each stands the command that makes it, at the commit that it began from.${lost.length ? ` No curves of ${lost.join(", ")}: DVC's cache has them no more.` : ""}`
      : "There are no experiments of dvc exp.";
    charts();
    table();
  } catch (error) {
    by("experiments-note").textContent = error.message;
    button.disabled = false;
  }
}

const written = (value) => (value === undefined ? "" : Number.isInteger(value) ? String(value) : value.toPrecision(4));

function table() {
  if (!found) return;
  const wanted = by("filter").value.trim().toLowerCase();
  const rows = Object.entries(found.figures).filter(([key, { label }]) => `${key} ${label ?? ""}`.toLowerCase().includes(wanted));
  const head = el("tr", {}, ...["figure", ...found.profiles, "command"].map((text) => {
    const own = found.commands?.[text];
    return el("th", { scope: "col" }, text, ...(own ? [el("small", {}, el("code", { text: own }))] : []));
  }));
  by("figures").replaceChildren(el("thead", {}, head), el("tbody", {}, ...rows.map(([key, { command, label, values }]) => el("tr", {},
    el("th", { scope: "row" }, el("span", { text: label ?? key }), ...(label ? [el("small", { text: key })] : [])), ...found.profiles.map((profile) => el("td", { text: written(values[profile]) })),
    el("td", {}, el("code", { text: command }))))));
}

/** Lines of all profiles in one picture, with the command behind them. */
function chart(title, curves) {
  const lines = curves.flatMap((curve) => Object.entries(curve.lines).filter(([, points]) => points.length).map(([key, points]) => {
    const place = found.profiles.indexOf(curve.profile);
    const name = [found.profiles.length > 1 && curve.profile, NAMES[key] ?? key].filter(Boolean).join(": ");
    return { key, profile: curve.profile, points, name, colour: `var(--curve-${place % COLOURS})`, dash: DASHES[key] ?? null, mark: MARKS[Math.floor(place / COLOURS) % MARKS.length] };
  }));
  const [width, height, left, bottom] = [340, 200, 38, 22];
  const all = lines.flatMap(({ points }) => points);
  const [xs, ys] = [0, 1].map((axis) => all.map((point) => point[axis]));
  const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys, 0), Math.max(...ys)];
  const place = ([x, y]) => [left + ((x - x0) / (x1 - x0 || 1)) * (width - left - 8), 8 + ((y1 - y) / (y1 - y0 || 1)) * (height - bottom - 8)];
  const marks = [y0, (y0 + y1) / 2, y1].map((y) => el("svg:text", { x: left - 5, y: place([x0, y])[1] + 4, "text-anchor": "end", text: y.toPrecision(2) }));
  marks.push(...[x0, x1].map((x, i) => el("svg:text", { x: place([x, y0])[0], y: height - 5, "text-anchor": i ? "end" : "start", text: `${i ? curves[0].x : ""} ${x}` })));
  const last = lines.map(({ name, points }) => `${name} from ${written(points[0][1])} to ${written(points.at(-1)[1])}`);
  const drawn = lines.map((line) => stroke(line, line.points.map(place)));
  const picture = el("svg:svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}: ${last.join("; ")}` }, ...marks, ...drawn);
  const legend = lines.map((line, i) => el("li", {}, legendOf(line, picture, drawn[i], hiding(line, lines.slice(i + 1)))));
  return el("figure", { class: "card" }, el("figcaption", { text: title }), all.length ? picture : "",
    el("ul", { class: "legend" }, ...legend), el("code", { text: curves[0].command }));
}

/** A curve as it looks in the chart and in the legend, through places [x, y] of the picture. */
function stroke({ name, colour, dash, mark }, places) {
  const points = places.map((one) => one.map((value) => value.toFixed(1)).join(",")).join(" ");
  return el("svg:g", { "--c": colour }, el("svg:title", { text: name }),
    el("svg:polyline", { points, fill: "none", "stroke-width": 2, "stroke-dasharray": dash }),
    ...(mark ? places.map(([x, y]) => el("svg:text", { x, y, text: mark })) : []));
}

/** Whose curve is the same, and drawn over this one. */
const hiding = (line, later) => later.find(({ key, points }) => key === line.key && String(points) === String(line.points))?.profile;

/** An entry of the legend; while it is pointed at, the other curves fade. */
function legendOf(line, picture, curve, over) {
  const swatch = el("svg:svg", { viewBox: "0 0 30 10", "aria-hidden": "true" }, stroke(line, line.mark ? [[1, 5], [15, 5], [29, 5]] : [[1, 5], [29, 5]]));
  const button = el("button", { type: "button" }, swatch, over ? `${line.name}, the same as ${over}` : line.name);
  const alone = (on) => {
    for (const other of picture.querySelectorAll(".chosen")) other.classList.remove("chosen");
    picture.classList.toggle("one", on);
    curve.classList.toggle("chosen", on);
  };
  for (const name of ["pointerenter", "focus", "click"]) button.addEventListener(name, () => alone(true));
  for (const name of ["pointerleave", "blur"]) button.addEventListener(name, () => alone(false));
  return button;
}
