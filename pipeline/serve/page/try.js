// Try: a photo, what is said of it, and questions about it.
import { by, choose, current, el, events, onPicture, percent, show, similarInto, source, tell, thumb } from "./common.js";

const STAGES = {
  emd: "Pre-training alone: nearest name by Earth Mover's Distance, no language model",
  names: "With discriminant analysis of the encoder's tokens, no language model",
  before: "The frozen language model, before fine-tuning",
  caption: "Fine-tuned to caption",
  classes: "Fine-tuned to name",
};
let turn = 0; // answers to a photo that is no longer the one in work are dropped
let shownUrl = null;

export function startTry(about) {
  const file = by("file");
  file.addEventListener("change", () => { if (file.files[0]) choose({ blob: file.files[0] }); file.value = ""; });
  const drop = by("drop");
  for (const name of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", name === "dragover");
      const dropped = name === "drop" && event.dataTransfer.files[0];
      if (dropped) { show("try"); choose({ blob: dropped }); }
    });
  }
  document.addEventListener("paste", (event) => {
    const pasted = [...event.clipboardData.files][0];
    if (pasted) { show("try"); choose({ blob: pasted }); }
  });
  startCamera();
  by("samples").replaceChildren(...about.samples.map((one) => thumb(one, "", false, () => choose(one))));
  for (const [i, button] of [...by("samples").children].entries()) button.setAttribute("aria-label", `Test picture ${i + 1} of ${about.samples.length}`);
  for (const way of ["caption", "names"]) by(`${way}-part`).hidden = !about.ways.includes(way);
  by("offered").textContent = about.offered;
  by("samples-part").hidden = !about.samples.length;
  if (about.missing.length) tell("fault", about.missing.join("; "));
  by("ask").addEventListener("submit", (event) => { event.preventDefault(); question(by("question").value.trim()); });
  by("to-inside").addEventListener("click", () => show("inside"));
  by("to-similar").addEventListener("click", () => similarInto(by("try-similar"), { set textContent(_) {} }, current.picture));
  onPicture((picture) => look(picture, about.limits));
}

function startCamera() {
  const dialog = by("shot"), video = by("video");
  let stream = null;
  const stop = () => { stream?.getTracks().forEach((track) => track.stop()); stream = null; };
  by("camera").addEventListener("click", async () => {
    if (!navigator.mediaDevices) { // a phone, not by https: its own camera app
      const input = el("input", { type: "file", accept: "image/*", capture: "environment" });
      input.addEventListener("change", () => choose({ blob: input.files[0] }));
      input.click();
      return;
    }
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
      video.srcObject = stream;
      by("shoot").disabled = true; // until there is a frame to take
      dialog.showModal();
      await video.play();
      by("shoot").disabled = false;
    } catch (error) {
      stop();
      tell("fault", `No camera: ${error.message}`);
    }
  });
  by("shoot").addEventListener("click", () => {
    const canvas = el("canvas", { width: video.videoWidth, height: video.videoHeight });
    canvas.getContext("2d").drawImage(video, 0, 0);
    canvas.toBlob((blob) => { dialog.close(); if (blob) choose({ blob }); }, "image/jpeg", 0.95);
  });
  by("shot-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", stop);
}

async function look(picture, limits) {
  const mine = ++turn;
  tell("fault", null);
  by("before").hidden = true;
  for (const id of ["known", "caption-strange", "names-strange", "answers"]) by(id).hidden = true;
  for (const id of ["caption", "caption-note", "bars-note", "reply", "reply-note"]) by(id).textContent = "";
  for (const id of ["bars", "stages", "try-similar"]) by(id).replaceChildren();
  if (shownUrl) URL.revokeObjectURL(shownUrl);
  shownUrl = picture.blob ? URL.createObjectURL(picture.blob) : null;
  by("shown").hidden = true;
  if (picture.blob && picture.blob.size > limits.bytes) {
    tell("fault", `The photo has ${(picture.blob.size / 2 ** 20).toFixed(0)} MB; at most ${limits.bytes / 2 ** 20} are taken.`);
    return;
  }
  by("shown").src = shownUrl ?? source(picture, 640);
  by("shown").onload = () => { by("shown").hidden = false; };
  for (const id of ["caption", "bars-note"]) by(id).classList.add("waits");
  by("try").setAttribute("aria-busy", "true");
  try {
    for await (const event of events("/api/answer", {}, picture)) {
      if (mine !== turn) return;
      part(event);
    }
  } catch (error) {
    if (mine !== turn) return;
    tell("fault", picture.blob ? `This is no photo that can be read: ${error.message}` : error);
    by("answers").hidden = true;
    by("shown").hidden = true;
  } finally {
    if (mine === turn) {
      for (const id of ["caption", "bars-note"]) by(id).classList.remove("waits");
      by("try").setAttribute("aria-busy", "false");
    }
  }
}

/** One event of an answer. */
function part(event) {
  by("answers").hidden = false;
  if (event.event === "picture") {
    by("shown").src = event.uri;
    by("known").hidden = !event.trained_on;
  }
  if (event.event === "waiting" && event.for === "caption") by("caption-note").textContent = "Another question is being answered; this one is next.";
  if (event.event === "names") {
    by("bars-note").classList.remove("waits");
    by("bars").replaceChildren(...(event.names ?? []).map(([name, share]) => el("li", {},
      el("b", { text: name }), el("span", { text: percent(share) }), el("i", { "--v": `${share * 100}%`, "aria-hidden": "true" }))));
    by("bars-note").textContent = event.missing ?? `By ${event.adapter}, without the language model.`;
  }
  if (event.event === "caption") {
    by("caption").classList.remove("waits");
    by("caption").textContent = event.text ?? "";
    by("caption-note").textContent = event.missing ?? `By ${event.adapter}, fine-tuned on ${event.recipe}, in ${event.seconds} s.`;
  }
  const warning = by(`${event.event}-strange`);
  if (warning) {
    warning.hidden = !event.warning;
    warning.textContent = `The picture is ${event.warning}.`;
  }
  if (STAGES[event.event]) stage(event);
}

function stage(event) {
  const share = event.names?.find(([name]) => name === event.text)?.[1];
  const said = event.missing ? `Not there yet: ${event.missing}` : event.text || "(nothing)";
  const item = el("li", { "data-stage": event.event }, el("b", { text: STAGES[event.event] }),
    el("span", { text: share === undefined ? said : `${said} (${percent(share)})` }));
  const order = Object.keys(STAGES);
  const after = [...by("stages").children].find((other) => order.indexOf(other.dataset.stage) > order.indexOf(event.event));
  by("stages").insertBefore(item, after ?? null);
}

async function question(text) {
  if (!text || !current.picture) return;
  by("ask-button").disabled = true;
  by("reply").textContent = "";
  by("reply").classList.add("waits");
  by("reply-note").textContent = "";
  const mine = turn;
  try {
    for await (const event of events("/api/ask", { question: text }, current.picture)) {
      if (mine !== turn) return;
      if (event.event === "waiting") by("reply-note").textContent = "Another question is being answered; this one is next.";
      if (event.text !== undefined) by("reply").textContent = event.text;
      if (event.event === "answer") {
        if (!event.missing && !event.text) by("reply").textContent = "(nothing)";
        by("reply-note").textContent = event.missing ?? `By ${event.adapter}, fine-tuned on ${event.recipe}: the further a question is from that, the less its answer is worth.${event.caution ? ` ${event.caution}` : ""}`;
      }
    }
  } catch (error) {
    if (mine === turn) by("reply-note").textContent = error.message;
  } finally {
    by("ask-button").disabled = false;
    by("reply").classList.remove("waits");
  }
}
