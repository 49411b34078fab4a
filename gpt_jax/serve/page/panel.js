// The panel of settings, and how the page looks by them.

import { $ } from "./dom.js";
import { forget, number, onSet, RANGES, set, settings } from "./settings.js";
import { legend } from "./tokens.js";

let model = null; // whose own settings are shown where the reader has set none

// Calls `changed` with the name of what was set; "" = anything may have been.
export function start(changed) {
  $("legend-scale").append(...legend());
  $("settings").addEventListener("input", (event) => {
    const { id, type, checked, value } = event.target;
    if (!(id in settings || RANGES.includes(id))) return;
    set(id, type === "checkbox" ? checked : value);
    show();
    changed(id);
  });
  $("defaults").addEventListener("click", () => { forget(); show(); changed(""); });
  onSet(() => { show(); changed(""); });
  show();
}

export function show(of = model) {
  model = of;
  for (const name of model ? RANGES : []) {
    const input = $(name);
    input.value = number(name, model);
    // A model's own may lie between two steps, or beyond the ends.
    input.closest("label").querySelector("output").textContent = number(name, model);
  }
  for (const name of ["seed", "system", "key", "theme"]) {
    const input = $(name);
    if (input !== document.activeElement) input.value = settings[name];
  }
  $("tokens").checked = settings.tokens;
  $("legend").hidden = !settings.tokens;
  document.documentElement.dataset.theme = settings.theme; // "" = as the system is
}
