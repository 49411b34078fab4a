// What the reader has set, kept in this browser; what one tab sets, all have.

const STORE = "gpt_jax";
const DEFAULTS = {
  model: "", beside: "", theme: "", tokens: false, key: "",
  temperature: 0.8, top_p: 1, top_k: 0, min_p: 0, repetition_penalty: 1,
  frequency_penalty: 0, presence_penalty: 0, max_tokens: 128, seed: "", system: "",
};
export const RANGES = [
  "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty",
  "presence_penalty", "max_tokens",
];
export const settings = { ...DEFAULTS, ...kept() };

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
  const { model, beside, key } = settings;
  Object.assign(settings, DEFAULTS, { model, beside, key });
}

// Calls `hear` when another tab has set something. Which models a tab asks is its own.
export function onSet(hear) {
  addEventListener("storage", (event) => {
    if (event.key !== STORE) return;
    const { model, beside, key } = settings;
    Object.assign(settings, DEFAULTS, kept(), { model, beside, key });
    hear();
  });
}
