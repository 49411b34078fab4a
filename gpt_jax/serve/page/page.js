// The page: conversations with one model or with two side by side. What it remembers
// stays in this browser: settings in localStorage, conversations in IndexedDB. Which
// conversation a tab shows is in its address.

import { Column } from "./column.js";
import { $, button, make } from "./dom.js";
import { fromHistories } from "./exchange.js";
import * as list from "./list.js";
import * as look from "./look.js";
import * as panel from "./panel.js";
import * as server from "./server.js";
import { histories, set, settings } from "./settings.js";
import * as store from "./store.js";
import * as tokens from "./tokens.js";

const EXAMPLES = {
  chat: [
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that says whether a word is a palindrome.",
    "Name three animals that live in the sea, as a list.",
  ],
  text: ["Once upon a time", "The most important thing about", "def main("],
};
const PHONE = "(max-width: 45rem)"; // as page.css has it
const PANELS = ["list", "settings"];
const TITLE = 60; // characters of the first message

let models = [];
let conversation = null; // as store.js has it; none = one that has not begun
let opening = 0; // counts what was opened: only the last one is shown
let written = Promise.resolve(); // when nothing is being written

const page = { open, chosen, say, keep, turned, writing };
const columns = [new Column(0, page), new Column(1, page)];
const asked = () => columns.filter((column) => column.model);
const busy = () => columns.some((column) => column.running);

// ---------------------------------------------------------------- what is remembered

const notKept = (error) => say(`Not kept in this browser: ${error.message}`, true);

function begin(text) {
  if (conversation) return;
  const line = text.replace(/\s+/g, " ").trim();
  const now = Date.now();
  conversation = {
    id: store.newId(), created: now, changed: now, leaves: [null, null],
    title: (line.length > TITLE ? `${line.slice(0, TITLE)}…` : line) || "Without a beginning",
    models: asked().map((column) => column.model.id),
  };
  for (const column of columns) column.conversation = conversation.id;
  store.add([{ conversation, turns: [] }]).catch(notKept);
  address();
  list.mark(conversation.id);
}

// Which leaf is seen in a column, as a change of a conversation.
const seenAt = (number, leaf) => ({ leaves }) =>
  ({ leaves: leaves.map((old, i) => (i === number ? leaf : old)) });

function keep(turn, seen = false) {
  const leaf = seenAt(turn.column, turn.id);
  const changed = (old) => (seen ? { ...leaf(old), changed: Date.now() } : {});
  store.change(turn.conversation, changed, turn).catch(notKept);
}

function turned(id, number, leaf) {
  store.change(id, seenAt(number, leaf)).catch(notKept);
}

// Another tab has changed a conversation.
async function heard(id) {
  if (id !== conversation?.id) return;
  const found = await store.get(id);
  if (id !== conversation?.id) return;
  if (!found) return open(null);
  for (const column of asked()) {
    column.merge(found.turns.filter((turn) => turn.column === column.number));
  }
  refresh();
}

// ---------------------------------------------------------------- what is opened

function address() {
  const wanted = conversation ? `?c=${conversation.id}` : location.pathname;
  if (`${location.search || location.pathname}` !== wanted) history.pushState(null, "", wanted);
}

const addressed = () => new URLSearchParams(location.search).get("c");

// Shows a conversation; without an id, a new one.
async function open(id, { move = true } = {}) {
  const mine = opening += 1;
  for (const { running } of columns) running?.abort();
  await written; // so that what was written is kept where it belongs
  const found = id ? await store.get(id).catch(notKept) : null;
  if (mine !== opening) return;
  if (id && !found) say("This conversation is not kept in this browser (any more).", true);
  else say("");
  conversation = found?.conversation ?? null;
  show(conversation?.models ?? [settings.model, settings.beside], found?.turns ?? []);
  if (move) address();
  list.mark(conversation?.id);
}

// A conversation is chosen by hand; on a phone the panels make way for it.
function chosen(id) {
  if (matchMedia(PHONE).matches) for (const name of PANELS) toggle(name, false);
  return open(id);
}

function show(names, turns = []) {
  if (!models.length) return;
  const known = (name) => models.find((one) => one.id === name);
  const chosen = [known(names[0]) ?? models[0], known(names[1]) ?? null];
  for (const column of columns) {
    const own = turns.filter((turn) => turn.column === column.number);
    column.open(conversation, chosen[column.number], own);
    column.colour();
  }
  $("model").value = chosen[0].id;
  $("beside").value = chosen[1]?.id ?? "";
  const gone = names.filter((name, i) => i < 2 && name && !known(name));
  if (gone.length && conversation) say(`${gone.join(" and ")}: not served here (any more).`, true);
  facts();
  panel.show(chosen[0]);
  look.offer(chosen[0]);
  refresh();
}

// Other models are chosen for what is seen.
async function choose() {
  set("model", $("model").value);
  set("beside", $("beside").value);
  const names = [settings.model, settings.beside].filter(Boolean);
  if (!conversation) return show(names);
  const { id } = conversation;
  await store.change(id, () => ({ models: names })).catch(notKept);
  return open(id);
}

async function connect() {
  try {
    models = await server.models();
  } catch (error) {
    say(`Error: ${error.message}`, true);
    return;
  }
  const options = () => models.map((one) => new Option(one.id, one.id));
  $("model").replaceChildren(...options());
  $("beside").replaceChildren(new Option("nothing", ""), ...options());
  $("beside-field").hidden = models.length < 2;
  $("max_tokens").max = Math.max(...models.map((one) => one.context_length));
  await open(addressed(), { move: false });
}

// ---------------------------------------------------------------- what is asked

// Is busy until the answers that `start` begins have ended.
async function writing(start) {
  if (busy()) return;
  const began = performance.now(), here = opening;
  const started = start();
  if (busy()) say("Writing …");
  refresh();
  written = Promise.all(started);
  const ends = (await written).filter(Boolean);
  refresh();
  if (here !== opening) return;
  const end = ends.find((one) => one.bad) ?? ends[0];
  if (!end) return;
  const seconds = ((performance.now() - began) / 1000).toFixed(1);
  say(end.text === "Done" ? `Done in ${seconds} s.` : end.text, end.bad);
  const idle = [document.body, $("stop"), $("send")].includes(document.activeElement);
  if (idle && matchMedia("(pointer: fine)").matches) $("input").focus();
}

function send(text) {
  const to = asked();
  if (busy() || !to.length) return;
  if (!text.trim() && to.some((column) => column.model.chat)) return;
  begin(text);
  $("input").value = "";
  writing(() => to.map((column) => column.ask(text)));
}

// ---------------------------------------------------------------- what is seen

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

function refresh() {
  const [first] = columns, one = first.model, chat = Boolean(one?.chat);
  const writes = busy();
  for (const name of ["model", "beside", "tokens"]) $(name).disabled = writes;
  $("columns").classList.toggle("busy", writes);
  $("columns").classList.toggle("two", asked().length > 1);
  $("send").disabled = writes || !one;
  $("stop").disabled = !writes;
  $("send").textContent = chat ? "Send" : "Continue";
  $("input-label").textContent = chat ? "Message" : "Text to continue";
  $("input").placeholder = chat ? "Write a message; Shift+Enter for a new line"
    : "A text to continue; Ctrl+Enter sends it";
  $("system-field").hidden = !asked().some((column) => column.model.chat);
  welcome(one && asked().every((column) => !column.leaf), chat);
  tokens.reachable();
}

function welcome(empty, chat) {
  $("welcome").hidden = !empty;
  if (!empty) return;
  $("hint").textContent = chat ? "Ask something, for example:"
    : "This model has only learnt to continue texts. Give it a beginning, or none:";
  $("examples").replaceChildren(...EXAMPLES[chat ? "chat" : "text"].map((text) =>
    button(text, () => send(text))));
}

function facts() {
  $("facts").replaceChildren(...asked().map(({ model: one }) => {
    const size = one.parameters >= 1e6 ? `${(one.parameters / 1e6).toFixed(1)} million`
      : `${one.parameters}`;
    return make("p", {}, `${one.id}: ${size} weights, context of ${one.context_length} `
      + `tokens, vocabulary of ${one.vocab_size}, step ${one.step}. `
      + (one.chat ? "Answers in conversations." : "Continues texts."));
  }));
}

function toggle(name, shown) {
  $(name).hidden = !shown;
  $(`${name}-toggle`).setAttribute("aria-expanded", String(shown));
}

// Opens a panel, or closes it; of those of a phone, which cover the page, one is open.
function reveal(name, shown) {
  if (matchMedia(PHONE).matches) for (const other of PANELS) toggle(other, false);
  toggle(name, shown);
}

// ---------------------------------------------------------------- what is done

$("columns").append(...columns.map((column) => column.box));
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send($("input").value);
});
$("stop").addEventListener("click", () => columns.forEach(({ running }) => running?.abort()));
$("fresh").addEventListener("click", () => { chosen(null); $("input").focus(); });
$("model").addEventListener("change", choose);
$("beside").addEventListener("change", choose);
$("forget").addEventListener("click", async () => {
  reveal("list", true);
  list.remove((await store.all()).map((one) => one.id));
});
for (const name of PANELS) {
  $(`${name}-toggle`).addEventListener("click", () => reveal(name, $(name).hidden));
}
$("input").addEventListener("keydown", (event) => {
  const chat = Boolean(columns[0].model?.chat);
  const sent = event.key === "Enter" && (chat ? !event.shiftKey : event.ctrlKey || event.metaKey);
  if (!sent || event.isComposing) return;
  event.preventDefault();
  send($("input").value);
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (!$("tip").hidden) tokens.tip(null);
  else columns.forEach(({ running }) => running?.abort());
});
addEventListener("popstate", () => open(addressed(), { move: false }));
store.onChange((id, elsewhere) => elsewhere && heard(id).catch(notKept));

panel.start((name) => {
  if (name === "key") connect();
  if (name !== "tokens" && name !== "") return;
  if (!busy()) for (const column of columns) { column.show(); column.colour(); }
  refresh();
});
tokens.listen();
look.start();
list.start(page);
store.add(fromHistories(histories())).catch(notKept);
toggle("list", matchMedia("(min-width: 60rem)").matches);
toggle("settings", matchMedia("(min-width: 80rem)").matches);
connect();
