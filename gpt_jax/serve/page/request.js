// From turns to what the server is asked.

import { post } from "./server.js";
import { number, RANGES, settings } from "./settings.js";
import { consecutive, placed, tokensOf } from "./tokens.js";

const ALTERNATIVES = 5; // told with every token

// The messages of a chat; the system prompt, where there is one, stands first.
function messages(list) {
  const said = list.map((turn) => ({ role: turn.role, content: turn.text }));
  return settings.system ? [{ role: "system", content: settings.system }, ...said] : said;
}

const joined = (list) => list.map((turn) => turn.text).join("");

async function tokenized(model, asked, signal) {
  return (await post("tokenize", { model: model.id, ...asked }, signal)).tokens;
}

// What the model can see of these turns when `room` tokens are kept for its answer:
// {list} of a chat, {prompt} of a text, and in words what it does not see.
//
// A conversation that is too long loses its oldest turns, and a text its beginning,
// a quarter of the room at a time: what remains then begins alike for some turns, and
// the server has kept it. What is new is never cut: the server says that it is too long.
async function fitted(model, list, room, signal) {
  const text = joined(list);
  const whole = { list, prompt: text, forgotten: "" };
  if (list.length < 2) return whole;
  const length = async (some) =>
    (await tokenized(model, { messages: messages(some) }, signal)).length;
  const ids = model.chat ? null : await tokenized(model, { prompt: text }, signal);
  const total = ids ? ids.length : await length(list);
  const most = Math.max(1, model.context_length - room);
  if (total <= most) return whole;
  const step = Math.max(1, Math.floor(most / 4));
  const drop = Math.ceil((total - most) / step) * step;
  if (ids) {
    const opening = await tokenized(model, { prompt: "" }, signal); // stands before any text
    const prompt = [...opening, ...ids.slice(drop + opening.length)];
    return { list, prompt, forgotten: `the first ${drop} tokens` };
  }
  const starts = list.flatMap((turn, i) => (i && turn.role === "user" ? [i] : []));
  let low = 0, high = starts.length - 1; // the first that leaves few enough, or the last
  while (low < high) {
    const middle = (low + high) >> 1;
    if (await length(list.slice(starts[middle])) <= total - drop) high = middle;
    else low = middle + 1;
  }
  const first = starts[low] ?? 0;
  return { list: list.slice(first), forgotten: first && `the oldest ${first} turns` };
}

// The request for an answer to these turns: {path, body}, and what it leaves out.
export async function request(model, list, signal) {
  const body = { model: model.id };
  for (const name of RANGES) body[name] = number(name, model);
  body.max_tokens = Math.min(body.max_tokens, model.context_length);
  if (settings.seed !== "") body.seed = Number(settings.seed);
  const room = Math.min(body.max_tokens, model.context_length >> 1);
  const seen = await fitted(model, list, room, signal);
  const { tokens } = settings;
  if (model.chat) {
    body.messages = messages(seen.list);
    if (tokens) Object.assign(body, { logprobs: true, top_logprobs: ALTERNATIVES });
  } else {
    if (seen.prompt.length) body.prompt = seen.prompt; // without one a text begins
    if (tokens) body.logprobs = ALTERNATIVES;
  }
  const path = model.chat ? "v1/chat/completions" : "v1/completions";
  return { path, body, forgotten: seen.forgotten };
}

// The tokens of each of these turns, as the model finds them; [] where it sees none.
export async function scored(model, list) {
  const seen = await fitted(model, list, 1);
  let { prompt } = seen;
  if (model.chat) prompt = await tokenized(model, { messages: messages(seen.list) });
  const asked = { model: model.id, prompt, max_tokens: 0, echo: true, logprobs: ALTERNATIVES };
  const { choices } = await post("v1/completions", asked);
  const tokens = tokensOf(choices[0]);
  const found = model.chat ? placed(tokens, messages(seen.list).map((one) => one.content))
    : consecutive(tokens, list.map((turn) => turn.text));
  return list.map((_, i) => found[found.length - list.length + i] || []);
}
