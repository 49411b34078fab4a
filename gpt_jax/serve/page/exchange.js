// Conversations as a JSON file, and back. A file gets new ids, so that it changes
// nothing that is there already.

import { newId } from "./store.js";
import { ordered } from "./tree.js";

const FORMAT = "gpt_jax conversations 1";

export function written(list) {
  const conversations = list.map(({ conversation, turns }) => ({
    ...conversation,
    turns: ordered(new Map(turns.map((turn) => [turn.id, turn])))
      .map(({ conversation: _, ...turn }) => turn),
  }));
  return JSON.stringify({ format: FORMAT, conversations }, null, 1);
}

// What `written` was given; raises an Error in one sentence.
export function read(text) {
  let file;
  try { file = JSON.parse(text); } catch { /* told below */ }
  if (file?.format !== FORMAT || !Array.isArray(file.conversations)) {
    throw new Error(`this file is not one that Export wrote ("format": "${FORMAT}")`);
  }
  return file.conversations.map(conversation);
}

const isText = (value) => typeof value === "string";
const isTokens = (value) => Array.isArray(value) && value.every((token) =>
  Array.isArray(token) && isText(token[0])
  && (token[1] === null || Number.isFinite(token[1])) && Array.isArray(token[2])
  && token[2].every((other) => isText(other[0]) && Number.isFinite(other[1]))
  && (token[3] === undefined || isText(token[3])));

function need(holds, what, i) {
  if (!holds) throw new Error(`conversation ${i + 1} of the file has ${what}`);
}

function conversation(one, i) {
  need(isText(one?.title), "no title", i);
  need(Array.isArray(one.models) && [1, 2].includes(one.models.length)
    && one.models.every(isText), "not one or two models", i);
  need([one.created, one.changed].every(Number.isFinite), "no dates", i);
  need(Array.isArray(one.turns), "no turns", i);
  const id = newId(), ids = new Map([[null, null]]);
  const turns = one.turns.map((turn, j) => {
    const where = `a wrong turn ${j + 1}: its`;
    need(turn && isText(turn.id), `${where} id is no text`, i);
    need(ids.has(turn.parent), `${where} parent does not stand before it`, i);
    need([0, 1].includes(turn.column), `${where} column is not 0 or 1`, i);
    need(["user", "assistant"].includes(turn.role), `${where} role is unknown`, i);
    for (const name of ["text", "model", "note"]) {
      need(isText(turn[name]), `${where} ${name} is no text`, i);
    }
    need(Number.isFinite(turn.made), `${where} time "made" is no number`, i);
    need(turn.tokens === null || isTokens(turn.tokens), `${where} tokens are not such`, i);
    const { role, text, model, note, made, tokens, column } = turn;
    const parent = ids.get(turn.parent);
    ids.set(turn.id, newId());
    const known = { role, text, model, note, made, tokens, column, parent };
    return { id: ids.get(turn.id), conversation: id, ...known };
  });
  const leaves = [0, 1].map((column) => ids.get(one.leaves?.[column]) ?? null);
  const { title, models, created, changed } = one;
  return { conversation: { id, title, models, created, changed, leaves }, turns };
}

// The conversations of what version 0.1 kept, a list of turns for each model.
export function fromHistories(histories) {
  const now = Date.now();
  const begun = Object.entries(histories).filter(([, turns]) => turns.length);
  return begun.map(([model, turns], i) => {
    const chain = turns.map(({ role, text, tokens, note }, j) => ({
      id: `${j}`, parent: j ? `${j - 1}` : null, column: 0, role, text, model,
      note: note || "", tokens: tokens?.length ? tokens : null, made: now + j,
    }));
    const title = turns[0].text.slice(0, 60);
    return conversation({ title, models: [model], created: now, changed: now, turns: chain }, i);
  });
}

// Lets the reader keep a text as a file.
export function download(name, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
