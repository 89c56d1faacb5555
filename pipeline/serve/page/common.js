// What all parts of the page share: elements, requests, the picture in work, and the dialog of a picture.

export const by = (id) => document.getElementById(id);

/** An element with properties ("text" its text, others attributes or listeners) and children. */
export function el(name, properties = {}, ...children) {
  const made = name.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "text") made.textContent = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key.startsWith("--")) made.style.setProperty(key, value);
    else if (value !== null && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

/** A picture is {blob}, one of the user's, or {data, at}, one of the run's. */
async function request(path, query = {}, picture = null) {
  const more = picture && !picture.blob ? { data: picture.data, at: picture.at } : {};
  const url = `${path}?${new URLSearchParams({ ...query, ...more })}`;
  let response;
  try {
    response = await fetch(url, picture && picture.blob ? { method: "POST", body: picture.blob } : {});
  } catch {
    throw new Error("The server does not answer: is `terraalign serve` still running?");
  }
  if (!response.ok) {
    const said = await response.json().catch(() => ({ error: `the server's answer is ${response.status}` }));
    throw new Error(said.error);
  }
  return response;
}

export async function ask(path, query, picture) {
  return (await request(path, query, picture)).json();
}

/** The events of a streamed answer, one JSON object a line. */
export async function* events(path, query, picture) {
  const reader = (await request(path, query, picture)).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      const lines = (rest + (value ?? "")).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        const event = JSON.parse(line);
        if (event.event === "fault") throw new Error(event.error);
        yield event;
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever leaves early has the server stop
  }
}

export function tell(id, error) {
  by(id).hidden = !error;
  by(id).textContent = error ? error.message ?? error : "";
}

/** Have a box that scrolls say at its lower end how many of its rows are below that. */
export function saysMore(box, rows) {
  const count = () => {
    const end = box.getBoundingClientRect().bottom;
    const below = [...box.querySelectorAll(rows)].filter((row) => row.getBoundingClientRect().bottom > end + 2).length;
    box.classList.toggle("more", below > 0);
    box.dataset.more = `▾ ${below} more`;
  };
  box.addEventListener("scroll", count, { passive: true });
  new ResizeObserver(count).observe(box);
  new MutationObserver(count).observe(box, { childList: true, subtree: true });
}

export const percent = (share) => `${(share * 100).toFixed(1)} %`;

/** Where a picture of the run is. */
export const source = (picture, side) => `/picture?${new URLSearchParams({ data: picture.data, at: picture.at, side })}`;

/** A button of a picture of the run. */
export function thumb(picture, text, wrong = false, chosen = () => open(picture)) {
  const image = el("img", { src: source(picture, 160), alt: "", loading: "lazy" });
  const said = text ?? nameOf(picture);
  return el("button", { type: "button", class: wrong ? "wrong" : null, "aria-label": said, onclick: chosen }, image,
    ...(text === "" ? [] : [el("span", { text: said })]));
}

export const nameOf = (picture) => picture.label ?? picture.captions?.[0] ?? picture.id;

// The picture in work, and who wants to know of another one.
const listeners = [];
export const current = { picture: null };
export const onPicture = (listener) => listeners.push(listener);
export function choose(picture) {
  current.picture = picture;
  for (const listener of listeners) listener(picture);
}

// Parts of the page, which may wait with their work until they are seen.
const seen = {};
export const onTab = (name, listener) => { seen[name] = listener; };
export function show(name) {
  for (const tab of document.querySelectorAll('[role="tab"]')) {
    const on = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", on);
    tab.tabIndex = on ? 0 : -1;
    by(tab.getAttribute("aria-controls")).hidden = !on;
  }
  history.replaceState(null, "", `#${name}`);
  seen[name]?.();
}

export function similarInto(box, note, picture) {
  box.replaceChildren(el("p", { class: "note waits", text: "looking" }));
  return ask("/api/similar", {}, picture).then((found) => {
    box.replaceChildren(...found.pictures.map((one) => thumb(one, `${one.label ?? one.split} ${one.cosine.toFixed(2)}`)));
    const all = found.looked_at === found.of ? `all ${found.of}` : `${found.looked_at} of ${found.of}`;
    note.textContent = `By the cosine of mean image tokens, among ${all} pictures of the run.`;
  }, (error) => box.replaceChildren(el("p", { class: "alert", text: error.message })));
}

/** Open the dialog of a picture of the run. */
export async function open(picture) {
  const dialog = by("picture");
  by("picture-shown").src = source(picture, 640);
  by("picture-shown").alt = "The picture";
  by("picture-said").textContent = "";
  by("picture-facts").replaceChildren();
  if (!dialog.open) dialog.showModal();
  for (const part of ["try", "inside"]) {
    by(`picture-${part}`).onclick = () => { dialog.close(); choose({ data: picture.data, at: picture.at }); show(part); };
  }
  const similar = similarInto(by("picture-similar"), by("picture-note"), { data: picture.data, at: picture.at });
  try {
    const row = await ask("/api/row", { data: picture.data, at: picture.at });
    by("picture-said").textContent = nameOf(row);
    const facts = { "data set": row.data, part: row.split, file: row.id, said: picture.said,
      captions: row.label ? null : row.captions.slice(1).join(" · ") };
    by("picture-facts").replaceChildren(...Object.entries(facts).filter(([, value]) => value)
      .flatMap(([key, value]) => [el("dt", { text: key }), el("dd", { text: value })]));
  } catch (error) {
    by("picture-said").textContent = error.message;
  }
  await similar;
}
