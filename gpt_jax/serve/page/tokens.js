// Tokens by their probability. A token is [text, log-probability or null, others, shown]:
// the others are the likeliest there, as [text, log-probability]; `shown` is what is
// seen of its text, where that is not all.
//
// How likely it was is told twice: by colour, and by a line that is thick under unlikely
// tokens, for those who do not tell red from green.

import { $, make } from "./dom.js";

const LEGEND = [0.99, 0.5, 0.1, 0.01, 0.001];

// The tokens of an event or an answer.
export function tokensOf(choice) {
  const told = choice.logprobs;
  if (!told) return [];
  if (told.content) {
    return told.content.map((t) =>
      [t.token, t.logprob, t.top_logprobs.map((o) => [o.token, o.logprob])]);
  }
  return told.tokens.map((text, i) =>
    [text, told.token_logprobs[i], Object.entries(told.top_logprobs[i] || {})]);
}

const spelled = (tokens) => tokens.map(([text]) => text).join("");

// Which tokens belong to each of the texts, which follow one another up to the end.
export function consecutive(tokens, texts) {
  let at = spelled(tokens).length - texts.join("").length;
  return texts.map((text) => between(tokens, at, at += text.length));
}

// The same of texts between which a template stands; it may have cut spaces round them.
export function placed(tokens, texts) {
  const whole = spelled(tokens);
  let from = 0;
  return texts.map((text) => {
    const wanted = whole.indexOf(text, from) < 0 ? text.trim() : text;
    const start = whole.indexOf(wanted, from);
    if (start < 0 || !wanted) return [];
    from = start + wanted.length;
    return between(tokens, start, from);
  });
}

function between(tokens, start, end) {
  const found = [];
  let at = 0;
  for (const [text, ...rest] of tokens) {
    const shown = text.slice(Math.max(0, start - at), Math.max(0, end - at));
    if (shown) found.push(shown === text ? [text, ...rest] : [text, ...rest, shown]);
    at += text.length;
  }
  return found;
}

// ---------------------------------------------------------------- what is seen

export function coloured(token) {
  const [text, logprob] = token;
  const chance = logprob === null ? "the first token" : percent(Math.exp(logprob));
  const span = make("span", {
    className: "token", role: "button", tabIndex: -1, "aria-describedby": "tip",
    "aria-label": `${JSON.stringify(text)}, ${chance}`,
  }, token[3] ?? text);
  if (logprob !== null) tint(span, Math.exp(logprob));
  span.told = token;
  return span;
}

function tint(span, chance) {
  const sure = Math.sqrt(chance);
  span.style.backgroundColor = `hsl(${Math.round(120 * sure)} 80% 50% / 30%)`;
  span.style.borderBottomWidth = `${Math.round(4 * (1 - sure))}px`;
}

export function legend() {
  return LEGEND.map((chance) => {
    const span = make("span", { className: "token" }, percent(chance));
    tint(span, chance);
    return span;
  });
}

function percent(chance) {
  return `${Number((100 * chance).toFixed(chance < 0.1 ? 2 : 1))} %`;
}

// Of the tokens of a page one can be reached with Tab; the arrow keys go on from it.
export function reachable() {
  const all = document.querySelectorAll(".history .token");
  if (all.length && ![...all].some((span) => span.tabIndex === 0)) {
    [...all].at(-1).tabIndex = 0;
  }
}

function walk(event) {
  const steps = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const here = tokenAt(event);
  if (!here || !steps) return;
  const all = [...document.querySelectorAll(".history .token")];
  const next = all[all.indexOf(here) + steps];
  if (!next) return;
  here.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
  event.preventDefault();
}

function tokenAt(event) {
  return event.target?.closest?.(".history .token");
}

// Shows what else was likely at a token; without one, nothing.
export function tip(span) {
  const box = $("tip");
  box.hidden = !span;
  if (!span) return;
  const [text, logprob, others] = span.told;
  const known = logprob === null || others.some(([other]) => other === text);
  const rows = known ? others : [...others, [text, logprob]];
  box.replaceChildren(make("table", {}, ...rows.map(([other, value]) =>
    make("tr", { className: other === text ? "own" : "" },
      make("td", {}, JSON.stringify(other)), make("td", {}, percent(Math.exp(value)))))));
  if (!rows.length) box.append("the first token: nothing stands before it");
  const place = span.getBoundingClientRect();
  const below = place.bottom + 6 + box.offsetHeight < innerHeight;
  box.style.top = `${below ? place.bottom + 6 : place.top - 6 - box.offsetHeight}px`;
  box.style.left = `${Math.max(6, Math.min(place.left, innerWidth - box.offsetWidth - 6))}px`;
}

// The tip is that of the token under the mouse, or else of the one that has the focus:
// a tap gives it.
export function listen() {
  for (const [over, out] of [["mouseover", "mouseout"], ["focusin", "focusout"]]) {
    document.addEventListener(over, (event) => { if (tokenAt(event)) tip(tokenAt(event)); });
    document.addEventListener(out, (event) => {
      if (tokenAt(event)) tip(tokenAt({ target: document.activeElement }));
    });
  }
  document.addEventListener("click", (event) => tip(tokenAt(event)));
  document.addEventListener("keydown", walk);
}
