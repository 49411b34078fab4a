// What a model writes, as Markdown: paragraphs, headings, lists, quotes, rules, tables,
// code, emphasis, links. It becomes elements whose texts are set as text, so nothing in it is
// ever markup; links lead to http, https and mailto alone, pictures are links.

import { highlighted } from "./code.js";
import { copier, make } from "./dom.js";

const DEEPEST = 8; // lists and quotes inside each other; deeper ones are paragraphs
const FENCE = /^ {0,3}(`{3,}(?=[^`]*$)|~{3,})\s*([\w+#.-]*)/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(\S.*)$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:( {1,4})(?=\S)|\s*$)/;
const QUOTE = /^ {0,3}> ?/;

// Shows a text in a box. Of a text that grows only the blocks that changed are made anew.
export function render(box, text) {
  const found = blocks(text.replaceAll("\r\n", "\n").split("\n"), 0);
  const old = box.blocks || [];
  found.forEach((block, i) => {
    if (old[i] === block.source) return;
    const node = element(block, 0);
    if (box.children[i]) box.children[i].replaceWith(node);
    else box.append(node);
  });
  while (box.children.length > found.length) box.lastChild.remove();
  box.blocks = found.map((block) => block.source);
}

// ---------------------------------------------------------------- blocks

function blocks(lines, depth) {
  const found = [];
  let level = 2; // of the turn's own heading; none is left out below it
  for (let i = 0; i < lines.length;) {
    if (!lines[i].trim()) { i += 1; continue; }
    const block = fence(lines, i) || heading(lines, i) || rule(lines, i)
      || (depth < DEEPEST && (list(lines, i) || quote(lines, i)))
      || table(lines, i) || paragraph(lines, i, depth);
    if (block.kind === "heading") block.level = level = Math.min(level + 1, block.level + 2);
    block.source = lines.slice(i, block.end).join("\n");
    found.push(block);
    i = block.end;
  }
  return found;
}

function fence(lines, i) {
  const opens = FENCE.exec(lines[i]);
  if (!opens) return null;
  const closes = new RegExp(`^ {0,3}${opens[1][0]}{${opens[1].length},}\\s*$`);
  let end = i + 1;
  while (end < lines.length && !closes.test(lines[end])) end += 1;
  const indent = /^ */.exec(lines[i])[0].length;
  const margin = new RegExp(`^ {0,${indent}}`);
  const text = lines.slice(i + 1, end).map((line) => line.replace(margin, "")).join("\n");
  return { kind: "code", language: opens[2], text, end: Math.min(end + 1, lines.length) };
}

function heading(lines, i) {
  const found = HEADING.exec(lines[i]);
  if (!found) return null;
  const text = found[2].trimEnd().replace(/\s#+$/, "");
  return { kind: "heading", level: found[1].length, text, end: i + 1 };
}

function rule(lines, i) {
  return RULE.test(lines[i]) ? { kind: "rule", end: i + 1 } : null;
}

// Items with what is indented below them; a blank line does not end a list by itself.
function list(lines, i) {
  const first = ITEM.exec(lines[i]);
  if (!first) return null;
  const ordered = /\d/.test(first[2]), items = [];
  let end = i;
  for (;;) {
    const found = RULE.test(lines[end]) ? null : ITEM.exec(lines[end]);
    if (!found || /\d/.test(found[2]) !== ordered) break;
    const width = found[0].length + (found[3] ? 0 : 1);
    const item = [lines[end].slice(found[0].length)];
    for (end += 1; end < lines.length; end += 1) {
      const line = lines[end], indent = /^ */.exec(line)[0].length;
      const lazy = line.trim() && item.at(-1).trim() && !starts(line); // goes on unindented
      if (line.trim() && indent < Math.min(width, found[1].length + 2) && !lazy) break;
      item.push(line.slice(Math.min(indent, width)));
    }
    items.push(item);
    if (end >= lines.length) break;
  }
  const start = ordered ? Number.parseInt(first[2], 10) : 0;
  while (!lines[end - 1].trim()) end -= 1;
  return { kind: "list", ordered, start, items, end };
}

function quote(lines, i) {
  let end = i;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  if (end === i) return null;
  const inside = lines.slice(i, end).map((line) => line.replace(QUOTE, ""));
  return { kind: "quote", lines: inside, end };
}

// GitHub's tables: a head, a line that says how its columns are aligned, and rows up to a
// blank line or another block. A row's cells beyond the head's are left out, as there.
function table(lines, i) {
  const aligned = alignment(lines, i);
  if (!aligned) return null;
  let end = i + 2;
  while (end < lines.length && lines[end].trim() && !starts(lines[end])) end += 1;
  const rows = [lines[i], ...lines.slice(i + 2, end)];
  return { kind: "table", aligned, rows: rows.map(cells), end };
}

// How the columns of the table that begins here are aligned; none begins: null.
function alignment(lines, i) {
  const [head, below] = [lines[i], lines[i + 1] ?? ""];
  if (!head.includes("|") || !/^ {0,3}\S/.test(head) || !/^ {0,3}(?!- )[-:|]/.test(below)) return null;
  const marks = cells(below);
  const fit = marks.length && marks.every((mark) => /^:?-+:?$/.test(mark));
  if (!fit || marks.length !== cells(head).length) return null;
  return marks.map((mark) => {
    const left = mark.startsWith(":"), right = mark.endsWith(":");
    return left && right ? "center" : (left && "left") || (right && "right") || "";
  });
}

function cells(line) {
  const found = line.trim().split(/(?<!\\)\|/);
  if (found[0] === "") found.shift();
  if (found.at(-1) === "") found.pop();
  return found.map((cell) => cell.replaceAll("\\|", "|").trim());
}

function paragraph(lines, i, depth) {
  const goesOn = (at) => lines[at].trim()
    && (depth >= DEEPEST || !(starts(lines[at]) || alignment(lines, at)));
  let end = i + 1;
  while (end < lines.length && goesOn(end)) end += 1;
  const text = lines.slice(i, end).map((line) => line.trim()).join("\n");
  return { kind: "paragraph", text, end };
}

const starts = (line) => [FENCE, HEADING, RULE, ITEM, QUOTE].some((form) => form.test(line));

// ---------------------------------------------------------------- elements

function element(block, depth) {
  const inside = (lines) => blocks(lines, depth + 1).map((one) => element(one, depth + 1));
  switch (block.kind) {
    case "code": return codeBlock(block);
    case "heading": return make(`h${Math.min(6, block.level)}`, {}, ...inline(block.text));
    case "rule": return make("hr");
    case "quote": return make("blockquote", {}, ...inside(block.lines));
    case "list": {
      const items = block.items.map((lines) => make("li", {}, ...tight(inside(lines))));
      if (!block.ordered) return make("ul", {}, ...items);
      return make("ol", { start: block.start }, ...items);
    }
    case "table": return tableOf(block);
    default: return make("p", {}, ...inline(block.text));
  }
}

// An item of one paragraph is that text.
function tight(nodes) {
  return nodes[0]?.tagName === "P"
    ? [...nodes[0].childNodes, ...nodes.slice(1)] : nodes;
}

// A short row stays short, so that a table has no more cells than its text has.
function tableOf({ aligned, rows }) {
  const row = (tag) => (texts) => make("tr", {}, ...texts.slice(0, aligned.length).map((text, i) =>
    make(tag, aligned[i] ? { className: aligned[i] } : {}, ...inline(text))));
  const head = make("thead", {}, row("th")(rows[0]));
  const body = rows.length > 1 ? [make("tbody", {}, ...rows.slice(1).map(row("td")))] : [];
  return make("div", { className: "table", tabIndex: 0 }, make("table", {}, head, ...body));
}

function codeBlock({ text, language }) {
  const code = make("code", {}, ...highlighted(text, language));
  return make("figure", { className: "code" },
    make("figcaption", {}, make("span", {}, language || "text"), copier(() => text)),
    make("pre", { tabIndex: 0 }, code));
}

// ---------------------------------------------------------------- within a line

const URL_ = "(?:https?:\\/\\/|mailto:)[^\\s<>\"'`()]*(?:\\([^\\s<>()]*\\)[^\\s<>\"'`()]*)*";
const strong = (found, depth) => make("strong", {}, ...inline(found[1], depth + 1));
const em = (found, depth) => make("em", {}, ...inline(found[1], depth + 1));
const FORMS = [ // the first that fits where a special character stands
  [/\\([!-/:-@[-`{-~])/y, (found) => found[1]],
  [/(?<!`)(`+)(?!`)([^]*?[^`])\1(?!`)/y, (found) => make("code", {}, spaced(found[2]))],
  [/\*\*(?!\s)([^]+?)(?<!\s)\*\*(?!\*)/y, strong],
  [/(?<!\w)__(?!\s)([^]+?)(?<!\s)__(?!\w)/y, strong],
  [/\*(?![\s*])([^]+?)(?<![\s*])\*(?!\*)/y, em],
  [/(?<!\w)_(?![\s_])([^]+?)(?<![\s_])_(?!\w)/y, em],
  [new RegExp(`!?\\[([^\\][]+)\\]\\(<?(${URL_})>?(?:\\s+"[^"]*")?\\)`, "y"),
    (found) => link(found[2], found[1])],
  [new RegExp(`<(${URL_})>`, "y"), (found) => link(found[1], found[1])],
  [new RegExp(`(?<!\\w)${URL_}(?<![.,;:!?*_])`, "y"), (found) => link(found[0], found[0])],
];
const SPECIAL = /[\\`*_![<]|https?:|mailto:/g;
const LONGEST = 5000; // characters of a paragraph that is read: what never closes takes time

function inline(text, depth = 0) {
  if (text.length > LONGEST || depth > DEEPEST) return [text];
  const found = [];
  let plain = 0;
  SPECIAL.lastIndex = 0;
  for (let next = SPECIAL.exec(text); next; next = SPECIAL.exec(text)) {
    const at = next.index;
    let end = at + 1;
    for (const [form, made] of FORMS) {
      form.lastIndex = at;
      const match = form.exec(text);
      if (!match) continue;
      end = at + match[0].length;
      found.push(text.slice(plain, at), made(match, depth));
      plain = end;
      break;
    }
    SPECIAL.lastIndex = end; // what is inside was read with this too
  }
  return [...found, text.slice(plain)];
}

const spaced = (code) => (/^ .* $/s.test(code) && code.trim() ? code.slice(1, -1) : code);

function link(address, text) {
  return make("a", {
    href: address, target: "_blank", rel: "noopener noreferrer", title: address,
  }, text);
}
