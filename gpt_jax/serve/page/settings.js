// What the reader has set, kept in this browser; what one tab sets, all have.

const STORE = "gpt_jax";
const DEFAULTS = {
  model: "", beside: "", theme: "", tokens: false, key: "", max_tokens: 128, seed: "", system: "",
};
// Of these each model has its own; they are in `settings` once the reader has set them.
const SAMPLING = [
  "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty",
  "presence_penalty",
];
export const RANGES = [...SAMPLING, "max_tokens"];
export const settings = { ...DEFAULTS, ...kept() };

// A number as the reader has set it, else as the model suggests.
export const number = (name, model) => Number(settings[name] ?? model.suggested[name]);

function stored() {
  try {
    return JSON.parse(localStorage.getItem(STORE)) || {};
  } catch { // unreadable, or not allowed
    return {};
  }
}

function kept() {
  return stored().settings || {};
}

// What version 0.1 kept here besides, by model; it is there once.
export function histories() {
  const { histories: found = {}, settings: others = {} } = stored();
  if (Object.keys(found).length) {
    localStorage.setItem(STORE, JSON.stringify({ settings: others }));
  }
  return found;
}

export function set(name, value) {
  settings[name] = value;
  if (name === "key") return; // it is not written down
  try { // what another tab has set meanwhile stays
    const text = JSON.stringify({ settings: { ...kept(), [name]: value } });
    localStorage.setItem(STORE, text);
  } catch { /* full, or not allowed: then nothing is remembered */ }
}

export function forget() {
  localStorage.removeItem(STORE);
  begin({});
}

// Takes what is kept, and nothing else but what belongs to this tab.
function begin(found) {
  const { model, beside, key } = settings;
  for (const name of SAMPLING) delete settings[name];
  Object.assign(settings, DEFAULTS, found, { model, beside, key });
}

// Calls `hear` when another tab has set something. Which models a tab asks is its own.
export function onSet(hear) {
  addEventListener("storage", (event) => {
    if (event.key !== STORE) return;
    begin(kept());
    hear();
  });
}
