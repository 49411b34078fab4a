// Conversations and their turns, in the IndexedDB of this browser.
//
// A tab writes the turns that it makes, and what it changes of a conversation within one
// transaction, so tabs do not overwrite each other; each tells the others what it changed.
//
//   conversation  {id, title, models, created, changed, leaves: [of each column]}
//   turn          {id, conversation, column, parent, role, text, model, note, made,
//                  tokens: as tokens.js has them, or null}

const STORES = ["conversations", "turns"];
const channel = new BroadcastChannel("gpt_jax");
const listeners = [];
let database;

export function newId() { // crypto.randomUUID is there on https and localhost alone
  return Array.from(crypto.getRandomValues(new Uint32Array(4)),
    (part) => part.toString(16).padStart(8, "0")).join("");
}

function open() {
  return database ||= new Promise((resolve, reject) => {
    const request = indexedDB.open("gpt_jax", 1);
    request.onupgradeneeded = () => {
      const [conversations, turns] = STORES;
      request.result.createObjectStore(conversations, { keyPath: "id" });
      request.result.createObjectStore(turns, { keyPath: "id" })
        .createIndex("conversation", "conversation");
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function got(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

// Does `work` with both stores: all of it, or nothing.
async function transact(mode, work) {
  const transaction = (await open()).transaction(STORES, mode);
  const done = new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onabort = () => reject(transaction.error);
  });
  const worked = work(...STORES.map((name) => transaction.objectStore(name)));
  worked.catch(() => { try { transaction.abort(); } catch { /* it has ended */ } });
  return (await Promise.all([worked, done]))[0];
}

// Calls `hear` with the id of a conversation that changed, here or in another tab.
export function onChange(hear) {
  listeners.push(hear);
}

channel.onmessage = (event) => listeners.forEach((hear) => hear(event.data, true));

function tell(id) {
  channel.postMessage(id);
  listeners.forEach((hear) => hear(id, false));
}

// ---------------------------------------------------------------- what is read

export async function all() {
  const found = await transact("readonly", (conversations) => got(conversations.getAll()));
  return found.sort((a, b) => b.changed - a.changed);
}

// A conversation and its turns; undefined when it is not there (any more).
export function get(id) {
  return transact("readonly", async (conversations, turns) => {
    const conversation = await got(conversations.get(id));
    return conversation && { conversation, turns: await turnsOf(turns, id) };
  });
}

function turnsOf(turns, id) {
  return got(turns.index("conversation").getAll(id));
}

// The ids of conversations that have these words in their titles or their turns.
export async function search(words) {
  const wanted = words.toLowerCase();
  const has = (text) => text.toLowerCase().includes(wanted);
  return transact("readonly", async (conversations, turns) => {
    const named = (await got(conversations.getAll())).filter((one) => has(one.title));
    const said = (await got(turns.getAll())).filter((turn) => has(turn.text));
    return new Set([...named.map((one) => one.id), ...said.map((turn) => turn.conversation)]);
  });
}

// ---------------------------------------------------------------- what is written

// Adds whole conversations, as `get` returns them.
export async function add(list) {
  await transact("readwrite", async (conversations, turns) => {
    for (const one of list) {
      conversations.put(one.conversation);
      one.turns.forEach((turn) => turns.put(turn));
    }
  });
  list.forEach((one) => tell(one.conversation.id));
}

// Changes a conversation, and puts a turn into it; not one that was deleted meanwhile.
export async function change(id, changed, turn = null) {
  await transact("readwrite", async (conversations, turns) => {
    const found = await got(conversations.get(id));
    if (!found) return;
    conversations.put({ ...found, ...changed(found) });
    if (turn) turns.put(turn);
  });
  tell(id);
}

// Deletes conversations; returns them, for whoever wants them back.
export async function remove(ids) {
  const removed = await transact("readwrite", async (conversations, turns) => {
    const found = [];
    for (const id of ids) {
      const conversation = await got(conversations.get(id));
      if (!conversation) continue;
      found.push({ conversation, turns: await turnsOf(turns, id) });
      conversations.delete(id);
      found.at(-1).turns.forEach((turn) => turns.delete(turn.id));
    }
    return found;
  });
  ids.forEach(tell);
  return removed;
}
