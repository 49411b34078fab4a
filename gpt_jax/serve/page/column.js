// A conversation with one model: its turns, the answer that is being written, and what
// is seen of both. Two of them stand side by side when models are compared.

import { grow, make } from "./dom.js";
import { request, scored } from "./request.js";
import { stream } from "./server.js";
import { settings } from "./settings.js";
import { newId } from "./store.js";
import { reachable, tokensOf } from "./tokens.js";
import { after, newest, path } from "./tree.js";
import { TurnView } from "./turn.js";

const EVERY = 1000; // milliseconds after which what was written so far is kept

export class Column {
  // `page`: keep(turn, seen) remembers it, and that it is the leaf that is seen;
  // turned(conversation, number, leaf) only that; say(text, bad);
  // writing(start) is busy until the ends that start() promises are there.
  constructor(number, page) {
    Object.assign(this, { number, page, model: null, leaf: null, turns: new Map() });
    this.conversation = null; // the id of what the turns belong to
    this.running = null; // the AbortController of the answer that is being written
    this.log = make("div", { className: "history", role: "log", tabIndex: 0 });
    this.box = make("section", { className: "column" }, this.log);
  }

  get path() {
    return path(this.turns, this.leaf);
  }

  get edited() {
    return Boolean(this.log.querySelector("form"));
  }

  // Shows the turns of a conversation (or of none yet), as far as they were last seen.
  open(conversation, model, turns) {
    this.model = model;
    this.conversation = conversation?.id ?? null;
    this.turns = new Map(turns.map((turn) => [turn.id, turn]));
    const leaf = conversation?.leaves[this.number];
    this.leaf = this.turns.has(leaf) ? leaf : newest(this.turns, null);
    this.show();
    this.log.scrollTop = this.log.scrollHeight;
  }

  // Takes what another tab has written.
  merge(turns) {
    for (const turn of turns) {
      if (!this.running || turn.id !== this.leaf) this.turns.set(turn.id, turn);
    }
    if (this.running || this.edited) return;
    this.leaf = newest(this.turns, this.leaf);
    grow(this.log, () => this.show());
  }

  add(role, text, more = {}) {
    const last = [...this.turns.values()].reduce((most, turn) => Math.max(most, turn.made), 0);
    const turn = {
      id: newId(), conversation: this.conversation, column: this.number, parent: this.leaf,
      role, text, model: this.model.id, note: "", tokens: null,
      made: Math.max(Date.now(), last + 1), ...more,
    };
    this.turns.set(turn.id, turn);
    this.leaf = turn.id;
    return turn;
  }

  // ---------------------------------------------------------------- what is done

  // Takes a message (or none, of which a text goes on) and writes the answer.
  ask(text) {
    const last = this.path.at(-1);
    if (this.model.chat && last?.role === "user") return this.edit(last, text); // had no answer
    if (text) this.page.keep(this.add("user", text), true);
    this.show();
    return this.answer();
  }

  // Goes on from another text in a turn's place: a new branch, unless nothing followed.
  edit(turn, text) {
    if (turn.role === "user" && !after(this.turns, turn.id).length) {
      this.turns.set(turn.id, Object.assign(turn, { text, tokens: null }));
    } else {
      this.leaf = turn.parent;
      turn = this.add(turn.role, text, { note: turn.role === "user" ? "" : "edited" });
    }
    this.page.keep(turn, true);
    this.show();
    return turn.role === "user" ? this.answer() : null;
  }

  // Writes another answer in a turn's place.
  again(turn) {
    const { leaf } = this;
    this.leaf = turn.parent;
    this.show();
    return this.answer(leaf);
  }

  // Writes an answer to what is seen; when none comes, `back` is seen again.
  // Returns how it ended: {text, bad}.
  async answer(back = this.leaf) {
    const list = this.path;
    const made = this.add("assistant", "", { tokens: settings.tokens ? [] : null });
    const view = this.append(made);
    this.log.scrollTop = this.log.scrollHeight;
    this.running = new AbortController();
    this.log.setAttribute("aria-busy", "true");
    const { signal } = this.running, began = performance.now();
    let first = 0, kept = began, end = { text: "Done" };
    try {
      const { path: where, body, forgotten } = await request(this.model, list, signal);
      let reason = "";
      const usage = await stream(where, body, signal, (choice) => {
        const text = choice.text ?? choice.delta.content ?? "";
        made.text += text;
        made.tokens?.push(...tokensOf(choice));
        reason = choice.finish_reason || reason;
        view.grown();
        const now = performance.now();
        if (text) first ||= now;
        if (text && now - kept > EVERY) { kept = now; this.page.keep(made, true); }
      });
      made.note = [
        reason === "length" && "cut: enough tokens, or the context is full",
        forgotten && `the model no longer sees ${forgotten}`,
        pace(usage, began, first || performance.now()),
      ].filter(Boolean).join(" · ");
    } catch (error) {
      const stopped = error.name === "AbortError";
      end = stopped ? { text: "Stopped." } : { text: `Error: ${error.message}`, bad: true };
      made.note = stopped ? "stopped" : `broken off: ${error.message}`;
    }
    this.running = null;
    this.log.removeAttribute("aria-busy");
    if (made.text || end.text === "Done") {
      view.finish();
      this.page.keep(made, true);
    } else {
      this.turns.delete(made.id);
      this.leaf = back;
      this.show();
      // A message without an answer is to be mended, and sent again.
      if (list.at(-1)?.id === back && list.at(-1).role === "user") this.views.at(-1).edit();
    }
    this.colour();
    return end;
  }

  // Colours the tokens of turns that were written, or typed, without.
  async colour() {
    const list = this.path, texts = list.map((turn) => turn.text);
    if (!settings.tokens || !this.model || this.running) return;
    if (list.every((turn) => turn.tokens)) return;
    try {
      const found = await scored(this.model, list);
      list.forEach((turn, i) => {
        if (turn.tokens || turn.text !== texts[i]) return;
        turn.tokens = found[i];
        this.page.keep(turn);
      });
      if (!this.running && !this.edited) grow(this.log, () => this.show());
    } catch (error) {
      this.page.say(`Not coloured: ${error.message}`, true);
    }
  }

  // ---------------------------------------------------------------- what is seen

  show() {
    const { scrollTop } = this.log;
    this.log.replaceChildren();
    this.views = [];
    this.box.hidden = !this.model;
    if (!this.model) return;
    this.box.classList.toggle("base", !this.model.chat);
    const name = `${this.model.id}${this.number ? ", beside" : ""}`;
    this.box.setAttribute("aria-label", name);
    this.log.setAttribute("aria-label", `History of ${name}`);
    for (const turn of this.path) this.append(turn);
    this.log.scrollTop = scrollTop;
    reachable();
  }

  append(turn) {
    const mine = turn.role === "user", base = !this.model.chat;
    const title = mine ? (base ? "Prompt" : "You") : turn.model;
    const versions = after(this.turns, turn.parent);
    const view = new TurnView(turn, { title, plain: mine || base, versions }, {
      again: (which) => this.page.writing(() => [this.again(which)]),
      edited: (which, text) => this.page.writing(() => [this.edit(which, text)]),
      turnTo: (which) => this.turnTo(which),
    });
    this.views.push(view);
    grow(this.log, () => this.log.append(view.box));
    return view;
  }

  turnTo(turn) {
    this.leaf = newest(this.turns, turn.id);
    this.show();
    this.page.turned(this.conversation, this.number, this.leaf);
    const { tools } = this.views.find((view) => view.turn.id === turn.id);
    tools.querySelector(".on:enabled, .back:enabled").focus();
  }
}

// How fast it came; the first token waits for the prompt and does not count.
function pace(usage, began, first) {
  const written = usage?.completion_tokens ?? 0;
  const seconds = (performance.now() - first) / 1000;
  const told = [`${written} token${written === 1 ? "" : "s"}`];
  if (written > 1 && seconds > 0) told.push(`${((written - 1) / seconds).toFixed(1)} tokens/s`);
  return [...told, `the first after ${Math.round(first - began)} ms`].join(", ");
}
