// Look inside: a picture's tokens and the words they are near, as heat over the picture.
import { ask, by, current, el, onPicture, onTab, tell } from "./common.js";
import { startPlane } from "./plane.js";

let found = null; // what the server said of the picture in work
let stale = true;
let turn = 0; // answers to what is no longer asked are dropped
let pinned = null;

export function startInside(about) {
  by("state").replaceChildren(...Object.entries(about.states).map(([key, text]) => el("option", { value: key, text })));
  const texts = { caption: "captions", classify: "class names" }, tasks = new Set(Object.values(about.data));
  const known = Object.keys(texts).filter((task) => tasks.has(task)).map((task) => texts[task]).join(" and ") || "captions";
  by("of-texts").textContent = `the words of the ${known}`;
  by("words-of").textContent = `words of ${known}`;
  const looked = () => { stale = true; look(); };
  for (const id of ["state", "of"]) by(id).addEventListener("change", looked);
  const plane = startPlane(about);
  by("state").addEventListener("change", plane);
  onPicture(() => { stale = true; if (!by("inside").hidden) look(); });
  onTab("inside", () => { look(); plane(); });
  if (!Object.keys(about.states).length) tell("inside-fault", "No adapter is trained yet: run `terraalign try FOLDER` or `terraalign run`.");
}

async function look() {
  if (!stale || !current.picture || !by("state").value) return;
  stale = false;
  tell("inside-fault", null);
  by("inside-empty").hidden = true;
  const mine = ++turn;
  by("inside").setAttribute("aria-busy", "true");
  by("words-title").classList.add("waits");
  try {
    const answer = await ask("/api/inside", { state: by("state").value, of: by("of").value }, current.picture);
    if (mine !== turn) return;
    found = answer;
    pinned = null;
    draw();
    by("inside-found").hidden = false;
  } catch (error) {
    if (mine !== turn) return;
    by("inside-found").hidden = true;
    tell("inside-fault", error);
  } finally {
    if (mine === turn) {
      by("words-title").classList.remove("waits");
      by("inside").setAttribute("aria-busy", "false");
    }
  }
}

function draw() {
  const grid = by("grid"), side = found.side, placed = side !== null && !found.whole;
  grid.classList.toggle("placed", placed);
  grid.replaceChildren();
  grid.style.backgroundImage = placed ? `url(${found.picture})` : "";
  grid.style.gridTemplateColumns = placed ? `repeat(${side}, 1fr)` : "";
  if (placed) {
    const image = new Image();
    image.onload = () => grid.style.setProperty("--aspect", image.width / image.height);
    image.src = found.picture;
  } else {
    grid.append(el("img", { src: found.picture, alt: "The picture as the encoder sees it" }));
  }
  for (const [i, words] of found.tokens.entries()) {
    const nearest = words.map((word) => found.words[word]).join(", ");
    const place = placed ? `Row ${Math.floor(i / side) + 1}, column ${(i % side) + 1}` : `Token ${i + 1}`;
    const button = el("button", { type: "button", "aria-label": `${place}: ${nearest}`, title: nearest, "aria-pressed": "false" });
    if (!placed) button.textContent = `${i + 1}: ${found.words[words[0]]}`;
    whenPointedAt(button, () => token(i, place), ["token", i]);
    grid.append(button);
  }
  by("grid-note").textContent = placed
    ? "What the encoder is shown, and the part of it that each token is of; what a token says may come from elsewhere, too."
    : "These tokens look at the whole picture: none has a place in it.";
  const words = by("words");
  words.replaceChildren();
  for (const [i, word] of found.words.entries()) {
    const button = el("button", { type: "button", text: word, "aria-pressed": "false", "data-word": i });
    whenPointedAt(button, () => heat(i), ["word", i]);
    words.append(button);
  }
  rest();
}

/** Show by pointing or focus, and keep by a click until the next. */
function whenPointedAt(button, showIt, key) {
  button.addEventListener("pointerenter", showIt);
  button.addEventListener("focus", showIt);
  for (const name of ["pointerleave", "blur"]) button.addEventListener(name, rest);
  button.addEventListener("click", () => {
    const again = pinned && pinned.key.join() === key.join();
    document.querySelectorAll("#inside-found [aria-pressed]").forEach((other) => other.setAttribute("aria-pressed", "false"));
    pinned = again ? null : { key, showIt };
    button.setAttribute("aria-pressed", String(!again));
    rest();
  });
}

function rest() {
  if (pinned) return pinned.showIt();
  clear();
  by("words-note").textContent = "The nearest words of all tokens. The bluer a part of the picture, the nearer it is to the word pointed at.";
}

function clear() {
  for (const button of by("grid").querySelectorAll("button")) button.style.removeProperty("--h");
  for (const button of by("words").children) button.classList.remove("near");
}

function token(i, place) {
  clear();
  const near = new Set(found.tokens[i]);
  for (const button of by("words").children) button.classList.toggle("near", near.has(Number(button.dataset.word)));
  by("grid").querySelectorAll("button")[i].style.setProperty("--h", 0.45);
  by("words-note").textContent = `${place}: ${found.tokens[i].map((word) => `${found.words[word]} (${found.distances[word][i].toFixed(2)})`).join(", ")}`;
}

/** How near each token is to a word, from the farthest of this picture, clear, to the nearest. */
function heat(word) {
  clear();
  const distances = found.distances[word], low = Math.min(...distances), high = Math.max(...distances);
  const buttons = by("grid").querySelectorAll("button");
  distances.forEach((one, i) => buttons[i].style.setProperty("--h", (0.62 * ((high - one) / (high - low || 1)) ** 2).toFixed(3)));
  by("words-note").textContent = `“${found.words[word]}”: distances ${low.toFixed(2)} (nearest token) to ${high.toFixed(2)}.`;
}
