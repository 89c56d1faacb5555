// Mistakes: accuracy by class, the confusion matrix, and the pictures behind both.
import { ask, by, el, onTab, percent, saysMore, tell, thumb } from "./common.js";

const MOST = 200; // pictures shown of a square
const LINE = 12; // pixels of a line of text in the matrix
let loaded = null, found = null;

export function startMistakes(about) {
  const options = Object.entries(about.tables);
  by("table").replaceChildren(...options.map(([key, text]) => el("option", { value: key, text })));
  by("table").addEventListener("change", load);
  for (const id of ["confusions", "classes"]) saysMore(by(id), "button");
  onTab("mistakes", load);
  if (!options.length) tell("mistakes-fault", "Nothing is evaluated on a data set of classes yet: run `terraalign try FOLDER` or `terraalign run`.");
}

async function load() {
  const wanted = by("table").value;
  if (!wanted || wanted === loaded) return;
  loaded = wanted;
  tell("mistakes-fault", null);
  try {
    const answer = await ask("/api/mistakes", { table: wanted });
    if (wanted !== loaded) return;
    found = answer;
    draw();
  } catch (error) {
    loaded = null;
    by("mistakes-found").hidden = true;
    tell("mistakes-fault", error);
  }
}

const nameOf = (number) => found.names[number];

function draw() {
  const { rows, names } = found;
  const cells = new Map();
  for (const row of rows) {
    const key = `${row[1]} ${row[2] ?? names.length}`;
    if (!cells.has(key)) cells.set(key, []);
    cells.get(key).push(row);
  }
  by("mistakes-found").hidden = false;
  by("mistakes-lead").replaceChildren(
    `${found.accuracy === null ? "No test pictures." : `${percent(found.accuracy)} of ${rows.length} test pictures of ${found.classes.length} classes are named rightly.`} By `,
    el("code", { text: found.command }), ".");
  by("cell-title").hidden = true;
  by("cell").replaceChildren();
  drawMatrix([...cells.values()]);
  const wrong = [...cells.values()].filter(([row]) => row[1] !== row[2]).sort((a, b) => b.length - a.length);
  by("confusions").replaceChildren(...wrong.map((some) => el("button", { type: "button", onclick: () => pictures(some, said(some[0])) },
    said(some[0]), el("span", { text: some.length }))));
  if (!wrong.length) by("confusions").replaceChildren(el("p", { class: "note pad", text: "None." }));
  const worst = found.classes.toSorted((a, b) => a[3] - b[3] || b[1] - a[1]);
  by("classes").replaceChildren(...worst.map(([label, images, correct, accuracy]) => el("button", {
    type: "button", "--v": `${accuracy * 100}%`, onclick: () => pictures(rows.filter((row) => row[1] === label), `${names[label]}: ${correct} of ${images} right`),
  }, names[label], el("span", { text: `${percent(accuracy)} of ${images}` }))));
}

const said = ([, label, predicted]) => `${nameOf(label)}, ${predicted === null ? "called by no name of a class" : `taken for ${nameOf(predicted)}`}`;

/** Squares of so many pixels, with names beside and above them where these are wide enough for a line of text. */
function drawMatrix(cells) {
  const size = found.names.length, most = Math.max(...cells.map((some) => some.length), 1), box = by("matrix");
  const width = box.clientWidth || 320, long = Math.min(130, width * 0.28), wide = (width - long) / (size + 1);
  const named = wide >= LINE, left = named ? long : LINE * 1.5, side = Math.min((width - left) / (size + 1), 60);
  const columns = [...found.names, "no name"];
  const squares = cells.map((some) => {
    const [, label, predicted] = some[0];
    return el("svg:rect", {
      x: left + (predicted ?? size) * side, y: left + label * side, width: side, height: side, class: label === predicted ? "right" : "off",
      "fill-opacity": 0.3 + 0.7 * (some.length / most), onclick: () => pictures(some, label === predicted ? `${nameOf(label)}, named rightly` : said(some[0])),
    });
  });
  const count = new Map(cells.map((some) => [`${some[0][1]} ${some[0][2] ?? size}`, some.length]));
  const bands = ["row", "column"].map(() => el("svg:rect", { class: "band", visibility: "hidden" }));
  const right = left + (size + 1) * side, bottom = left + size * side, titles = named ? LINE - 3 : LINE;
  const svg = el("svg:svg", {
    viewBox: `0 0 ${right} ${bottom}`, width: right, role: "img",
    "aria-label": `Confusion matrix of ${size} classes${named ? `, in this order: ${found.names.join(", ")}` : ""}; the lists have the same in words`,
  }, el("svg:rect", { class: "behind", x: left, y: left, width: right - left, height: bottom - left }), ...squares,
  el("svg:text", { class: "axis", x: (left + right) / 2, y: titles, "text-anchor": "middle", text: "what was said" }),
  el("svg:text", { class: "axis", transform: `translate(${titles} ${(left + bottom) / 2}) rotate(-90)`, "text-anchor": "middle", text: "what it is" }),
  ...(named ? [
    ...found.names.map((name, i) => label(name, long - LINE * 1.8, `translate(${left - 4} ${left + (i + 0.5) * side})`, "end")),
    ...columns.map((name, i) => label(name, long - LINE * 1.8, `translate(${left + (i + 0.5) * side} ${left - 4}) rotate(-90)`, "start")),
  ] : []), ...bands);
  const at = by("matrix-at"), resting = at.textContent = "Point at a square for its names and number.";
  svg.addEventListener("pointermove", (event) => {
    const scale = right / svg.clientWidth, place = svg.getBoundingClientRect();
    const column = Math.floor(((event.clientX - place.left) * scale - left) / side), row = Math.floor(((event.clientY - place.top) * scale - left) / side);
    const inside = column >= 0 && column <= size && row >= 0 && row < size;
    for (const band of bands) band.setAttribute("visibility", inside ? "visible" : "hidden");
    if (!inside) { at.textContent = resting; return; }
    const outline = [[left, left + row * side, right - left, side], [left + column * side, left, side, bottom - left]];
    for (const [i, band] of bands.entries()) for (const [j, key] of ["x", "y", "width", "height"].entries()) band.setAttribute(key, outline[i][j]);
    const number = count.get(`${row} ${column}`) ?? 0;
    at.textContent = `It is ${nameOf(row)}, and ${column < size ? nameOf(column) : "no name"} was said: ${number} ${number === 1 ? "picture" : "pictures"}.`;
  });
  svg.addEventListener("pointerleave", () => { at.textContent = resting; bands.forEach((band) => band.setAttribute("visibility", "hidden")); });
  box.replaceChildren(svg);
}

/** A name on an axis, cut to so many pixels; whole when it is pointed at. */
function label(name, room, transform, anchor) {
  const letters = Math.floor(room / (LINE * 0.5)), tail = Math.floor(letters / 3);
  const short = name.length > letters ? `${name.slice(0, letters - tail - 1)}…${name.slice(-tail)}` : name; // names often begin alike
  return el("svg:text", { transform, "text-anchor": anchor, "dominant-baseline": "central" }, short, el("svg:title", { text: name }));
}

function pictures(rows, title) {
  by("cell-title").hidden = false;
  by("cell-title").textContent = rows.length > MOST ? `${title} (the first ${MOST} of ${rows.length})` : title;
  by("cell").replaceChildren(...rows.slice(0, MOST).map(([at, label, predicted, output]) => thumb(
    { data: found.data, at, label: found.names[label], said: predicted === null ? output : found.names[predicted] },
    predicted === null ? `said: “${output}”` : found.names[predicted], label !== predicted)));
  by("cell-title").focus();
  by("cell-title").scrollIntoView({ block: "start", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
}
