// The page: its parts, and what it knows of the run.
import { ask, by, show, tell } from "./common.js";
import { startInside } from "./inside.js";
import { startMistakes } from "./mistakes.js";
import { startRuns } from "./runs.js";
import { startTry } from "./try.js";

const tabs = [...document.querySelectorAll('[role="tab"]')];
for (const [i, tab] of tabs.entries()) {
  const name = tab.getAttribute("aria-controls");
  tab.addEventListener("click", () => show(name));
  tab.addEventListener("keydown", (event) => {
    const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const next = tabs[(to + tabs.length) % tabs.length];
    next.click();
    next.focus();
  });
}

try {
  const about = await ask("/api/about");
  by("profile").textContent = about.profile;
  document.title = `TerraAlign: ${about.profile}`;
  for (const start of [startTry, startInside, startMistakes, startRuns]) start(about);
  const wanted = location.hash.slice(1);
  show(tabs.some((tab) => tab.id === `tab-${wanted}`) ? wanted : "try");
} catch (error) {
  tell("fault", error);
}
document.documentElement.dataset.ready = "yes";
