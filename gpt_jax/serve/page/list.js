// The list of conversations: opened, renamed, deleted and brought back, searched, kept
// as files.

import { $, button, make } from "./dom.js";
import * as exchange from "./exchange.js";
import * as store from "./store.js";

let page; // open(id), chosen(id): by hand, say(text, bad)
let opened = null; // the id of the conversation that is seen
let removed = []; // what can be brought back
let drawn = ""; // what of the list is seen
let drawing = 0; // counts how often it was to be: the last time counts

export function start(of) {
  page = of;
  $("search").addEventListener("input", redraw);
  $("export").addEventListener("click", async () => save(await store.all(), "conversations"));
  $("import").addEventListener("change", load);
  $("undo").addEventListener("click", bringBack);
  store.onChange(redraw);
}

export function mark(id) {
  opened = id;
  redraw();
}

function redraw() {
  draw().catch((error) => {
    $("found").textContent = `This browser keeps no conversations: ${error.message}`;
  });
}

async function draw() {
  const mine = drawing += 1, words = $("search").value.trim();
  const among = words ? await store.search(words) : null;
  const shown = (await store.all()).filter((one) => !among || among.has(one.id));
  if (mine !== drawing) return;
  const none = shown.length ? "" : "Nothing is kept yet.";
  $("found").textContent = words ? `${shown.length} found` : none;
  $("export").disabled = !shown.length;
  const now = JSON.stringify([opened, shown.map((one) => [one.id, one.title])]);
  if (now === drawn || $("conversations").querySelector("input")) return; // one is renamed
  drawn = now;
  const focused = $("conversations").contains(document.activeElement)
    && [document.activeElement.closest("li").id, document.activeElement.className];
  $("conversations").replaceChildren(...shown.map(item));
  if (focused) (document.getElementById(focused[0]) || $("conversations"))
    .querySelector(`.${focused[1]}`)?.focus();
}

function item(one) {
  const act = (sign, name, done) => button(sign, done, {
    className: name.toLowerCase(), "aria-label": `${name} ${one.title}`, title: name,
  });
  const here = one.id === opened;
  const open = button(one.title, () => page.chosen(one.id), { className: "open" });
  if (here) open.setAttribute("aria-current", "true");
  return make("li", { id: `c-${one.id}`, className: here ? "here" : "" }, open,
    make("span", { className: "tools" },
      act("✎", "Rename", () => rename(one)),
      act("⤓", "Export", () => save([one], one.title)),
      act("✕", "Delete", () => remove([one.id]))));
}

function rename(one) {
  const place = document.getElementById(`c-${one.id}`);
  const input = make("input", { value: one.title, "aria-label": "New name", maxLength: 200 });
  const end = async (keep) => {
    input.onblur = null;
    const title = input.value.trim();
    drawn = "";
    place.replaceChildren();
    if (keep && title && title !== one.title) await store.change(one.id, () => ({ title }));
    await draw();
    document.getElementById(place.id)?.querySelector(".rename")?.focus();
  };
  input.onblur = () => end(true);
  input.onkeydown = (event) => {
    if (event.key === "Enter") end(true);
    if (event.key === "Escape") { end(false); event.stopPropagation(); }
  };
  place.replaceChildren(input);
  input.select();
}

// Deletes conversations; until the next ones are, they can be brought back.
export async function remove(ids) {
  if (ids.includes(opened)) await page.open(null);
  removed = await store.remove(ids);
  const [first] = removed;
  if (!first) return;
  const what = removed.length > 1 ? `${removed.length} conversations`
    : `“${first.conversation.title}”`;
  $("removed").textContent = `Deleted ${what}.`;
  $("undo").hidden = false;
  $("undo").focus();
}

async function bringBack() {
  const [first] = removed;
  $("undo").hidden = true;
  $("removed").textContent = "";
  await store.add(removed);
  removed = [];
  page.open(first.conversation.id);
}

async function save(list, name) {
  const whole = await Promise.all(list.map((one) => store.get(one.id)));
  const file = `${name.replace(/[^\p{L}\p{N} _-]/gu, "").trim() || "conversation"}.json`;
  exchange.download(file, exchange.written(whole.filter(Boolean)));
}

async function load() {
  const [file] = $("import").files;
  $("import").value = ""; // so that the same one can be chosen again
  if (!file) return;
  try {
    const found = exchange.read(await file.text());
    await store.add(found);
    if (found.length) await page.open(found[0].conversation.id);
    page.say(`Imported ${found.length} conversation${found.length === 1 ? "" : "s"}.`);
  } catch (error) {
    page.say(`Not imported: ${error.message}`, true);
  }
}
