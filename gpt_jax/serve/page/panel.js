// The panel of settings, and how the page looks by them.

import { $ } from "./dom.js";
import { forget, onSet, RANGES, set, settings } from "./settings.js";
import { legend } from "./tokens.js";

// Calls `changed` with the name of what was set; "" = anything may have been.
export function start(changed) {
  $("legend-scale").append(...legend());
  $("settings").addEventListener("input", (event) => {
    const { id, type, checked, value } = event.target;
    if (!(id in settings)) return;
    set(id, type === "checkbox" ? checked : value);
    show();
    changed(id);
  });
  $("defaults").addEventListener("click", () => { forget(); show(); changed(""); });
  onSet(() => { show(); changed(""); });
  show();
}

export function show() {
  for (const name of [...RANGES, "seed", "system", "key", "theme"]) {
    const input = $(name);
    if (input !== document.activeElement || input.type === "range") input.value = settings[name];
    const told = input.closest("label").querySelector("output");
    if (told) told.textContent = input.value;
  }
  $("tokens").checked = settings.tokens;
  $("legend").hidden = !settings.tokens;
  document.documentElement.dataset.theme = settings.theme; // "" = as the system is
}
