// Mistakes: accuracy by class, the confusion matrix, and the pictures behind both.
import { ask, by, el, onTab, percent, tell, thumb } from "./common.js";

const MOST = 200; // pictures shown of a square
let loaded = null, found = null;

export function startMistakes(about) {
  const options = Object.entries(about.tables);
  by("table").replaceChildren(...options.map(([key, text]) => el("option", { value: key, text })));
  by("table").addEventListener("change", load);
  onTab("mistakes", load);
  if (!options.length) tell("mistakes-fault", "Nothing is evaluated on a data set of classes yet: run `dvc repro`.");
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

function drawMatrix(cells) {
  const size = found.names.length, most = Math.max(...cells.map((some) => some.length), 1);
  const squares = cells.map((some) => {
    const [, label, predicted] = some[0];
    const square = el("svg:rect", {
      x: predicted ?? size, y: label, width: 1, height: 1, class: label === predicted ? "right" : "off",
      "fill-opacity": 0.3 + 0.7 * (some.length / most), onclick: () => pictures(some, label === predicted ? `${nameOf(label)}, named rightly` : said(some[0])),
    });
    square.append(el("svg:title", { text: `${label === predicted ? `${nameOf(label)}, right` : said(some[0])}: ${some.length}` }));
    return square;
  });
  by("matrix").replaceChildren(el("svg:svg", {
    viewBox: `0 0 ${size + 1} ${size}`, role: "img", "aria-label": `Confusion matrix of ${size} classes; the lists have the same in words`,
  }, ...squares));
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
