// The plane of principal components: tokens, words and vocabulary; a point opens its picture.
import { ask, by, el, open, tell } from "./common.js";

const NEAR = 12; // pixels from a point that still mean it
let found = null, drawn = null, view = null, at = null;

/** What draws the plane of the adapter that is chosen. */
export function startPlane(about) {
  by("plane-data").replaceChildren(...Object.keys(about.data).map((name) => el("option", { value: name, text: name })));
  by("plane-data").addEventListener("change", load);
  for (const kind of ["images", "words", "vocabulary"]) by(`show-${kind}`).addEventListener("change", () => { at = null; paint(); });
  by("plane-reset").addEventListener("click", () => { fit(); paint(); });
  new ResizeObserver(() => { if (found) paint(); }).observe(by("plane"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => paint());
  listen(by("plane"));
  return load;
}

async function load() {
  const wanted = `${by("state").value} ${by("plane-data").value}`;
  if (wanted === drawn || !by("state").value) return;
  drawn = wanted;
  tell("plane-fault", null);
  try {
    const answer = await ask("/api/plane", { state: by("state").value, data: by("plane-data").value });
    if (wanted !== drawn) return;
    found = answer;
    at = null;
    fit();
    paint();
    const [first, second] = found.explained.map((share) => Math.round(share * 100));
    by("plane-at").textContent = `${first} and ${second} % of the variance are in this plane; centroids of image tokens and words are ${found.gap.toFixed(2)} apart in all dimensions.`;
  } catch (error) {
    drawn = null;
    tell("plane-fault", error);
  }
}

/** The middle 99.5 % of all points in view: a few rare words lie far out. */
function fit() {
  if (!found) return;
  const points = [...found.images, ...found.words];
  const range = (axis) => {
    const values = points.map((point) => point[axis]).sort((a, b) => a - b);
    return [values[Math.floor(values.length * 0.0025)], values[Math.ceil(values.length * 0.9975) - 1]];
  };
  const [[left, right], [low, high]] = [range(0), range(1)];
  view = { x: (left + right) / 2, y: (low + high) / 2, width: (right - left || 1) * 1.12, height: (high - low || 1) * 1.12 };
}

function toPixels([x, y], canvas) {
  return [((x - view.x) / view.width + 0.5) * canvas.clientWidth, (0.5 - (y - view.y) / view.height) * canvas.clientHeight];
}

function shownPoints() {
  const kinds = ["vocabulary", "words", "images"].filter((kind) => by(`show-${kind}`).checked);
  return kinds.flatMap((kind) => found[kind].map((point) => ({ kind, point })));
}

function paint() {
  if (!found || by("inside").hidden) return;
  const canvas = by("plane"), ratio = devicePixelRatio || 1, style = getComputedStyle(document.documentElement);
  const colours = Object.fromEntries([["images", "--blue"], ["words", "--red"], ["vocabulary", "--grey"]]
    .map(([kind, name]) => [kind, style.getPropertyValue(name).trim()]));
  canvas.width = canvas.clientWidth * ratio;
  canvas.height = canvas.clientHeight * ratio;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  for (const { kind, point } of shownPoints()) {
    const [x, y] = toPixels(point, canvas);
    context.globalAlpha = kind === "vocabulary" ? 0.35 : 0.6;
    context.fillStyle = colours[kind];
    context.beginPath();
    if (kind === "words") context.rect(x - 3, y - 3, 6, 6);
    else context.arc(x, y, kind === "images" ? 3.2 : 2, 0, 7);
    context.fill();
  }
  context.globalAlpha = 1;
  if (at) {
    const [x, y] = toPixels(at.point, canvas);
    context.strokeStyle = context.fillStyle = style.getPropertyValue("--ink").trim();
    context.lineWidth = 2;
    context.beginPath();
    context.arc(x, y, 7, 0, 7);
    context.stroke();
    context.font = "14px system-ui, sans-serif";
    context.textAlign = x > canvas.clientWidth / 2 ? "right" : "left";
    context.fillText(label(at), x + (x > canvas.clientWidth / 2 ? -12 : 12), y + 5);
  }
}

const label = ({ kind, point }) => (kind === "images" ? `picture ${point[2]}, token ${point[3] + 1}` : point[2]);

function point(one) {
  at = one;
  paint();
  if (!one) return;
  by("plane-at").textContent = {
    images: `Image token ${one.point[3] + 1} of picture ${one.point[2]}: click or press Enter to open it.`,
    words: `“${one.point[2]}”, ${one.point[3]} times in the texts of these pictures.`,
    vocabulary: `“${one.point[2]}”, of the whole vocabulary.`,
  }[one.kind];
}

function nearest(event) {
  const canvas = by("plane"), box = canvas.getBoundingClientRect();
  let best = null, least = NEAR ** 2;
  for (const one of shownPoints()) {
    const [x, y] = toPixels(one.point, canvas);
    const distance = (x - event.clientX + box.left) ** 2 + (y - event.clientY + box.top) ** 2;
    if (distance <= least) [best, least] = [one, distance];
  }
  return best;
}

const openPoint = () => { if (at?.kind === "images") open({ data: found.data, at: at.point[2] }); };

function zoom(canvas, clientX, clientY, by_) {
  const box = canvas.getBoundingClientRect();
  const [u, v] = [(clientX - box.left) / box.width - 0.5, 0.5 - (clientY - box.top) / box.height];
  view.x += u * view.width * (1 - by_);
  view.y += v * view.height * (1 - by_);
  view.width *= by_;
  view.height *= by_;
  paint();
}

function listen(canvas) {
  const down = new Map(); // pointers that are down
  let moved = false, apart = 0;
  const spread = () => { const [a, b] = [...down.values()]; return Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY); };
  canvas.addEventListener("wheel", (event) => {
    if (!found) return;
    event.preventDefault();
    zoom(canvas, event.clientX, event.clientY, event.deltaY > 0 ? 1.2 : 1 / 1.2);
  }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => {
    down.set(event.pointerId, event);
    moved = down.size > 1;
    if (down.size === 2) apart = spread();
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!found) return;
    const last = down.get(event.pointerId);
    if (!last) return point(nearest(event));
    const [dx, dy] = [event.clientX - last.clientX, event.clientY - last.clientY];
    if (!moved && Math.hypot(dx, dy) < 4) return;
    moved = true;
    down.set(event.pointerId, event);
    if (down.size === 2) {
      const now = spread(), [a, b] = [...down.values()];
      zoom(canvas, (a.clientX + b.clientX) / 2, (a.clientY + b.clientY) / 2, apart / (now || 1));
      apart = now;
    } else {
      view.x -= (dx / canvas.clientWidth) * view.width;
      view.y += (dy / canvas.clientHeight) * view.height;
      paint();
    }
  });
  for (const name of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(name, (event) => {
      if (name === "pointerup" && !moved && found) { point(nearest(event)); openPoint(); }
      down.delete(event.pointerId);
    });
  }
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!found || (step === undefined && event.key !== "Enter")) return;
    event.preventDefault();
    if (event.key === "Enter") return openPoint();
    const order = found.images.toSorted((a, b) => a[0] - b[0] || a[1] - b[1]);
    const place = at?.kind === "images" ? order.indexOf(at.point) : step > 0 ? -1 : 0;
    point({ kind: "images", point: order[(place + step + order.length) % order.length] });
  });
}
