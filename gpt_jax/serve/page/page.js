// The page: asks the server as any OpenAI client does, and shows what comes.
// What it remembers stays in this browser (localStorage). Texts are only ever set as
// text, never as markup.
"use strict";

const $ = (id) => document.getElementById(id);
const STORE = "gpt_jax";
const DEFAULTS = {
  temperature: 0.8, top_p: 1, top_k: 0, min_p: 0, repetition_penalty: 1,
  frequency_penalty: 0, presence_penalty: 0,
  max_tokens: 128, seed: "", system: "", tokens: false, key: "",
};
const RANGES = [
  "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty",
  "presence_penalty", "max_tokens",
];
const ALTERNATIVES = 5;

let models = [];
let running = null; // the AbortController of the answer that is being written
let state = load();

// ---------------------------------------------------------------- what is remembered

function load() {
  let kept = {};
  try { kept = JSON.parse(localStorage.getItem(STORE)) || {}; } catch { /* unreadable */ }
  return {
    model: kept.model || "",
    settings: { ...DEFAULTS, ...kept.settings },
    histories: kept.histories || {}, // by model: turns {role, text, tokens, note}
  };
}

function save() {
  const { key, ...settings } = state.settings; // a key is not written down
  try {
    localStorage.setItem(STORE, JSON.stringify({ ...state, settings }));
  } catch { /* full, or not allowed: then nothing is remembered */ }
}

function turns() {
  return (state.histories[state.model] ||= []);
}

// ---------------------------------------------------------------- the server

function headers() {
  const key = state.settings.key;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function complaint(response) {
  let message = `the server answered ${response.status}`, code = "";
  try { ({ message, code } = (await response.json()).error); } catch { /* no JSON */ }
  if (response.status === 401) message += ": put it into the settings";
  const after = response.headers.get("Retry-After");
  const error = new Error(after ? `${message} (again in ${after} s)` : message);
  error.long = code === "context_length_exceeded";
  return error;
}

async function getModels() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw await complaint(response);
  return (await response.json()).data;
}

// Calls `hear` with the choice of every event until the stream ends.
async function stream(path, body, signal, hear) {
  const response = await fetch(path, {
    method: "POST", headers: headers(), body: JSON.stringify(body), signal,
  });
  if (!response.ok) throw await complaint(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the server ended the answer in the middle");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      if (event.choices.length) hear(event.choices[0]);
    }
  }
}

function model() {
  return models.find((one) => one.id === state.model);
}

// The request for an answer to these turns.
function request(list) {
  const s = state.settings;
  const body = { model: state.model, stream: true };
  for (const name of RANGES) body[name] = Number(s[name]);
  body.max_tokens = Math.min(body.max_tokens, model().context_length);
  if (s.seed !== "") body.seed = Number(s.seed);
  if (!model().chat) {
    const prompt = list.map((turn) => turn.text).join("");
    if (prompt) body.prompt = prompt; // without one the model begins a text
    if (s.tokens) body.logprobs = ALTERNATIVES;
    return ["v1/completions", body];
  }
  body.messages = list.map((turn) => ({ role: turn.role, content: turn.text }));
  if (s.system) body.messages.unshift({ role: "system", content: s.system });
  if (s.tokens) Object.assign(body, { logprobs: true, top_logprobs: ALTERNATIVES });
  return ["v1/chat/completions", body];
}

// Tokens of an event as [text, log-probability, [[text, log-probability], ...]].
function tokensOf(choice) {
  const told = choice.logprobs;
  if (!told) return [];
  if (told.content) {
    return told.content.map((t) =>
      [t.token, t.logprob, t.top_logprobs.map((o) => [o.token, o.logprob])]);
  }
  return told.tokens.map((text, i) =>
    [text, told.token_logprobs[i], Object.entries(told.top_logprobs[i] || {})]);
}

// ---------------------------------------------------------------- asking

// Writes an answer; when none comes, the one that it was to replace is put back.
async function answer(old = null) {
  const list = turns();
  const made = { role: "assistant", text: "", tokens: [], note: "" };
  const before = list.slice();
  list.push(made);
  const shown = add(made);
  running = new AbortController();
  refresh();
  say("Writing …");
  const began = performance.now();
  let first = 0, dropped = 0;
  try {
    for (;;) {
      try {
        const [path, body] = request(before);
        await stream(path, body, running.signal, (choice) => {
          first ||= performance.now() - began;
          const tokens = tokensOf(choice);
          const text = choice.text ?? choice.delta.content ?? "";
          made.text += text;
          made.tokens.push(...tokens);
          grow(shown, text, tokens);
          if (choice.finish_reason) made.reason = choice.finish_reason;
        });
        break;
      } catch (error) { // a conversation that is too long loses its oldest turns
        if (!error.long || !model().chat || before.length < 3) throw error;
        before.splice(0, 2);
        dropped += 1;
      }
    }
    made.note = made.reason === "length" ? "cut: enough tokens, or the context is full" : "";
    if (dropped) made.note = `the model no longer sees the oldest ${dropped} turns. ${made.note}`;
    const seconds = (performance.now() - began) / 1000;
    say(`Done in ${seconds.toFixed(1)} s, the first token after ${Math.round(first)} ms.`);
  } catch (error) {
    const stopped = error.name === "AbortError";
    made.note = stopped ? "stopped" : "";
    say(stopped ? "Stopped." : `Error: ${error.message}`, !stopped);
    if (!made.text) {
      list.splice(list.indexOf(made), 1, ...(old ? [old] : []));
      show();
    }
  }
  running = null;
  if (made.text) note(shown, made);
  save();
  refresh();
  $("input").focus();
}

function submit(event) {
  event.preventDefault();
  if (running || !model()) return;
  const text = $("input").value;
  if (model().chat && !text.trim()) return;
  if (text) {
    const turn = { role: "user", text };
    turns().push(turn);
    add(turn);
  }
  $("input").value = "";
  save();
  answer();
}

function again() {
  const list = turns();
  if (running || !list.length) return;
  const old = list.at(-1).role === "assistant" ? list.pop() : null;
  show();
  answer(old);
}

// ---------------------------------------------------------------- what is seen

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

function add(turn) {
  const box = document.createElement("article");
  box.className = `turn ${turn.role}`;
  const head = document.createElement("h2");
  const base = model() && !model().chat;
  head.textContent = turn.role === "user" ? (base ? "Prompt" : "You") : state.model;
  const body = document.createElement("div");
  box.append(head, body, document.createElement("small"));
  $("history").append(box);
  grow(box, turn.text, turn.tokens || []);
  note(box, turn);
  return box;
}

function note(box, turn) {
  box.querySelector("small").textContent = turn.note || "";
}

function grow(box, text, tokens) {
  const body = box.querySelector("div");
  const view = $("history");
  const atEnd = view.scrollHeight - view.scrollTop - view.clientHeight < 80;
  if (tokens.length && state.settings.tokens) {
    for (const token of tokens) if (token[0]) body.append(coloured(token));
  } else {
    body.append(text);
  }
  if (atEnd) view.scrollTop = view.scrollHeight;
}

// A token on a scale from red (unlikely) to green (sure).
function coloured(token) {
  const span = document.createElement("span");
  const chance = token[1] === null ? 1 : Math.exp(token[1]);
  span.className = "token";
  span.textContent = token[0];
  const hue = Math.round(120 * Math.sqrt(chance));
  span.style.backgroundColor = `hsl(${hue} 80% 50% / 30%)`;
  span.tabIndex = -1;
  span.setAttribute("aria-label", `${token[0]}, ${percent(chance)}`);
  span.told = token;
  return span;
}

function percent(chance) {
  return `${(100 * chance).toFixed(chance < 0.1 ? 2 : 1)} %`;
}

function tip(span) {
  const box = $("tip");
  box.hidden = !span;
  if (!span) return;
  const [text, logprob, others] = span.told;
  const table = document.createElement("table");
  const rows = others.some(([other]) => other === text) ? others : [...others, [text, logprob]];
  for (const [other, value] of rows) {
    const row = table.insertRow();
    row.className = other === text ? "own" : "";
    row.insertCell().textContent = JSON.stringify(other);
    row.insertCell().textContent = percent(Math.exp(value));
  }
  box.replaceChildren(table);
  const place = span.getBoundingClientRect();
  const below = place.bottom + 6 + box.offsetHeight < innerHeight;
  box.style.top = `${below ? place.bottom + 6 : place.top - 6 - box.offsetHeight}px`;
  box.style.left = `${Math.max(6, Math.min(place.left, innerWidth - box.offsetWidth - 6))}px`;
}

// The arrow keys go from token to token; one of them can be reached with Tab.
function walk(event) {
  const here = event.target.closest?.(".token");
  const steps = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!here || !steps) return;
  const all = [...document.querySelectorAll(".token")];
  const next = all[all.indexOf(here) + steps];
  if (next) { next.focus(); event.preventDefault(); }
}

function show() {
  $("history").replaceChildren();
  for (const turn of turns()) add(turn);
  $("history").scrollTop = $("history").scrollHeight;
  refresh();
}

function refresh() {
  const one = model(), chat = Boolean(one?.chat), empty = !turns().length;
  $("send").disabled = Boolean(running) || !one;
  $("stop").disabled = !running;
  $("again").disabled = Boolean(running) || empty;
  $("fresh").disabled = Boolean(running);
  $("model").disabled = Boolean(running);
  $("tokens").disabled = Boolean(running); // it draws all turns anew
  $("send").textContent = chat ? "Send" : "Continue";
  $("input-label").textContent = chat ? "Message" : "Text to continue";
  $("input").placeholder = chat ? "Write a message; Shift+Enter for a new line"
    : "A text to continue; Ctrl+Enter sends it";
  $("system-field").hidden = !chat;
  $("hint").textContent = !one || !empty ? "" : chat ? ""
    : "This model has only learnt to continue texts: give it a beginning, or none.";
  const last = document.querySelector(".turn:last-child .token") ?? document.querySelector(".token");
  if (last) last.tabIndex = 0;
}

function facts() {
  const one = model();
  if (!one) return;
  const size = one.parameters >= 1e6 ? `${(one.parameters / 1e6).toFixed(1)} million`
    : `${one.parameters}`;
  $("facts").textContent = `${one.id}: ${size} weights, context of ${one.context_length} `
    + `tokens, vocabulary of ${one.vocab_size}, step ${one.step}. `
    + (one.chat ? "Answers in conversations." : "Continues texts.");
  $("max_tokens").max = one.context_length;
}

function showSettings() {
  for (const name of [...RANGES, "seed", "system", "key"]) {
    $(name).value = state.settings[name];
    const shown = $(name).closest("label").querySelector("output");
    if (shown) shown.textContent = $(name).value;
  }
  $("tokens").checked = state.settings.tokens;
}

function pick(name) {
  state.model = name;
  $("model").value = name;
  facts();
  showSettings();
  show();
}

async function connect() {
  try {
    models = await getModels();
  } catch (error) {
    say(`Error: ${error.message}`, true);
    return;
  }
  $("model").replaceChildren(...models.map((one) => new Option(one.id, one.id)));
  pick(models.some((one) => one.id === state.model) ? state.model : models[0].id);
  say("");
}

// ---------------------------------------------------------------- what is done

function toggle(open) {
  $("settings").hidden = !open;
  $("settings-toggle").setAttribute("aria-expanded", String(open));
}

$("ask").addEventListener("submit", submit);
$("stop").addEventListener("click", () => running?.abort());
$("again").addEventListener("click", again);
$("fresh").addEventListener("click", () => {
  state.histories[state.model] = [];
  save();
  show();
  say("");
  $("input").focus();
});
$("model").addEventListener("change", () => { pick($("model").value); save(); });
$("settings-toggle").addEventListener("click", () => toggle($("settings").hidden));
$("forget").addEventListener("click", () => {
  localStorage.removeItem(STORE);
  state = { ...load(), model: state.model };
  pick(state.model);
});
$("input").addEventListener("keydown", (event) => {
  const chat = Boolean(model()?.chat);
  const send = event.key === "Enter" && (chat ? !event.shiftKey : event.ctrlKey || event.metaKey);
  if (send && !event.isComposing) submit(event);
});
$("settings").addEventListener("input", (event) => {
  const { id, type, checked, value } = event.target;
  state.settings[id] = type === "checkbox" ? checked : value;
  save();
  showSettings();
  if (id === "tokens") show();
});
$("key").addEventListener("change", connect);
document.addEventListener("keydown", (event) => {
  walk(event);
  if (event.key !== "Escape") return;
  if (!$("tip").hidden) tip(null);
  else if (running) running.abort();
});
for (const [over, out] of [["mouseover", "mouseout"], ["focusin", "focusout"]]) {
  document.addEventListener(over, (event) => {
    const span = event.target.closest?.(".token");
    if (span) tip(span);
  });
  document.addEventListener(out, () => tip(null));
}

toggle(matchMedia("(min-width: 60rem)").matches);
showSettings();
connect();
