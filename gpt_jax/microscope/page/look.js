"use strict";
// Letters of shapes as in the code: T place, L layer, H head.

const find = id => document.getElementById(id);
const data = JSON.parse(find("data").textContent);
const frames = JSON.parse(find("frames").textContent);
const ARRAYS = { u1: Uint8Array, i4: Int32Array, f4: Float32Array };
const BLUE = [59, 111, 182], RED = [209, 73, 91], GREEN = [45, 140, 90];

function unpack(packed) {
  const text = atob(packed.data), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const values = new ARRAYS[packed.kind](bytes.buffer), shape = packed.shape;
  values.at_ = (...index) => values[index.reduce((sum, i, axis) => sum * shape[axis] + i, 0)];
  values.shape = shape;
  return values;
}

function opened(frame) {
  for (const [key, value] of Object.entries(frame))
    if (Array.isArray(value)) frame[key] = value.map(x => x.data === undefined ? x : unpack(x));
    else if (value.data !== undefined) frame[key] = unpack(value);
  return frame;
}

const tokens = data.tokens, T = tokens.length, segments = data.segments;
const L = data.windows.length;
let frame, chosen = T - 1, head = [0, 0], seen = null;
const ready = frames.map(() => null);

const raw = id => data.texts[id];
const shown = id => raw(id).replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "·");
const percent = p => p >= 0.995 ? (p < 0.9995 ? (100 * p).toFixed(1) : "100") + " %"
  : p >= 0.01 ? (100 * p).toFixed(0) + " %" : (100 * p).toPrecision(1) + " %";
const wash = (color, share) => `rgba(${color},${Math.max(0, Math.min(1, share)).toFixed(3)})`;
const signed = x => (x > 0 ? "+" : x < 0 ? "−" : "") + Math.abs(x).toFixed(2);
const follows = t => t + 1 < T && segments[t + 1] === segments[t];
const lossOf = t => t && segments[t] === segments[t - 1] ? -Math.log(frame.chance.at_(L, t - 1)) : null;

// A colour of the style, as a canvas takes it.
function ink(name) {
  document.body.style.setProperty("outline-color", `var(${name})`);
  return getComputedStyle(document.body).outlineColor;
}

function make(tag, attributes = {}, ...inside) {
  const drawn = ["svg", "path", "line", "text", "circle", "g"].includes(tag)
    ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes))
    key.startsWith("on") ? drawn[key] = value : drawn.setAttribute(key, value);
  drawn.append(...inside);
  return drawn;
}
const code = id => make("code", {}, shown(id));

// What a mouse over something says, or a finger on it.
function tip(element, words) {
  element.onmousemove = event => {
    const box = find("tip");
    box.textContent = words();
    box.hidden = false;
    const left = Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8);
    box.style.left = `${Math.max(4, left)}px`;
    const below = event.clientY + 18 + box.offsetHeight < innerHeight;
    box.style.top = `${below ? event.clientY + 18 : event.clientY - box.offsetHeight - 10}px`;
  };
  element.onmouseleave = () => find("tip").hidden = true;
  return element;
}

function likeliest(layer, t, count = 5) {
  const told = frame.likeliest.shape[2], found = [];
  for (let n = 0; n < Math.min(told, count); n++)
    found.push([frame.likeliest.at_(layer, t, n), frame.chances.at_(layer, t, n)]);
  return found;
}

// ---- tokens

function drawTokens() {
  const worst = 8;
  find("tokens").replaceChildren(...tokens.flatMap((id, t) => {
    const loss = lossOf(t), begins = t && segments[t] !== segments[t - 1];
    const button = make("button", { class: `token${t === chosen ? " chosen" : ""}${begins ? " first" : ""}` }, shown(id));
    button.style.background = loss === null ? "" : wash(RED, loss / worst * 0.75);
    button.onclick = () => choose(t);
    tip(button, () => loss === null ? "the first: nothing before it"
      : `loss ${loss.toFixed(2)} nats, ${percent(Math.exp(-loss))}\ninstead: `
        + likeliest(L, t - 1).map(([i, p]) => `${shown(i)} ${percent(p)}`).join(", "));
    return raw(id).includes("\n") ? [button, make("br")] : [button];
  }));
  const loss = lossOf(chosen), told = find("told");
  told.replaceChildren("Token ", `${chosen} `, code(tokens[chosen]));
  if (loss !== null) {
    told.append(` cost ${loss.toFixed(2)} nats (${percent(Math.exp(-loss))}); the model thought of `);
    likeliest(L, chosen - 1).forEach(([i, p]) => told.append(code(i), ` ${percent(p)} `));
  }
  told.append(make("br"), "After it the model expects ");
  likeliest(L, chosen).forEach(([i, p]) => told.append(code(i), ` ${percent(p)} `));
}

// ---- attention

const weight = (l, h, t, s) => frame.weights.at_(l, h, t * (t + 1) / 2 + s) / 255;
const visible = (l, t, s) => s <= t && segments[s] === segments[t] && (!data.windows[l] || s > t - data.windows[l]);

function paint(canvas, l, h, size) {
  canvas.width = canvas.height = T * size;
  const pen = canvas.getContext("2d");
  const panel = ink("--panel"), unseen = ink("--unseen");
  pen.fillStyle = panel;
  pen.fillRect(0, 0, T * size, T * size);
  for (let t = 0; t < T; t++)
    for (let s = 0; s < T; s++) {
      pen.fillStyle = visible(l, t, s) ? wash(BLUE, 0.04 + 0.96 * Math.sqrt(weight(l, h, t, s))) : unseen;
      pen.fillRect(s * size, t * size, size, size);
    }
}

const thumbs = [];
function layHeads() {
  const H = frame.weights.shape[1], grid = find("heads");
  const wide = Math.max(44, Math.min(96, 480 / H));
  grid.style.setProperty("--wide", `${wide}px`);
  grid.style.gridTemplateColumns = `auto repeat(${H}, ${wide}px)`;
  for (let l = 0; l < L; l++) {
    grid.append(make("span", {}, `${l}${data.windows[l] ? ` (${data.windows[l]})` : ""}`));
    for (let h = 0; h < H; h++) {
      const canvas = make("canvas", { tabindex: 0, role: "button", "aria-label": `layer ${l}, head ${h}` });
      canvas.onclick = () => { head = [l, h]; seen = null; drawHeads(); };
      canvas.onkeydown = event => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); canvas.onclick(); } };
      tip(canvas, () => `layer ${l}, head ${h}\n${habits(l, h)}`);
      thumbs.push([canvas, l, h]);
      grid.append(canvas);
    }
  }
}

// The mean weight on the token itself, on the one before it, and on the first.
function habits(l, h) {
  const sums = [0, 0, 0];
  let count = 0;
  for (let t = 1; t < T; t++) {
    if (segments[t] !== segments[t - 1]) continue;
    count++;
    [t, t - 1, segments.indexOf(segments[t])].forEach((s, i) => sums[i] += weight(l, h, t, s));
  }
  const words = ["itself", "the one before", "the first"];
  return words.map((word, i) => `${word} ${percent(count ? sums[i] / count : 0)}`).join("\n");
}

function drawHeads() {
  for (const [canvas, l, h] of thumbs) {
    paint(canvas, l, h, 1);
    canvas.classList.toggle("chosen", l === head[0] && h === head[1]);
  }
  const [l, h] = head, size = Math.max(3, Math.min(14, Math.floor(440 / T)));
  const window_ = data.windows[l] ? `, sees the nearest ${data.windows[l]} tokens` : "";
  find("head").textContent = `Layer ${l}, head ${h}${window_}`;
  paint(find("matrix"), l, h, size);
  find("matrix").dataset.size = size;
  drawArcs();
}

function pointAt(event) {
  const box = find("matrix").getBoundingClientRect(), size = Number(find("matrix").dataset.size);
  const s = Math.floor((event.clientX - box.left) / size), t = Math.floor((event.clientY - box.top) / size);
  if (t < 0 || s < 0 || t >= T || s >= T) return;
  say(t, s);
}
function say(t, s) {
  const [l, h] = head;
  seen = [t, s];
  find("weight").replaceChildren(`${t} `, code(tokens[t]), " looks at ", `${s} `, code(tokens[s]), make("br"),
    visible(l, t, s) ? `with ${weight(l, h, t, s).toFixed(2)} of its attention` : s > t ? "never: it comes later"
      : segments[s] !== segments[t] ? "never: it is of another document" : "never: it is outside the window");
}
find("matrix").onmousemove = pointAt;
find("matrix").onclick = event => { pointAt(event); if (seen) choose(seen[0]); };
find("matrix").onkeydown = event => {
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  if (!moves[event.key]) return;
  event.preventDefault();
  const [t, s] = seen ?? [chosen, chosen], [down, right] = moves[event.key];
  say(Math.max(0, Math.min(T - 1, t + down)), Math.max(0, Math.min(T - 1, s + right)));
};

function drawArcs() {
  const [l, h] = head, drawing = find("arcs"), places = [];
  let width = 10;
  for (let t = 0; t < T; t++) {
    const wide = Math.max(16, 8.2 * [...shown(tokens[t])].length + 6);
    places.push([width, width + wide / 2]);
    width += wide;
  }
  let tall = 30;
  for (let s = 0; s <= chosen; s++) if (visible(l, chosen, s) && weight(l, h, chosen, s) >= 0.004)
    tall = Math.max(tall, Math.min(150, (places[chosen][1] - places[s][1]) / 3));
  const ground = tall + 16;
  drawing.setAttribute("width", width + 10);
  drawing.setAttribute("height", ground + 26);
  drawing.replaceChildren();
  for (let t = 0; t < T; t++) {
    const text = make("text", { x: places[t][0] + 2, y: ground + 16,
      style: `cursor:pointer;font:13px ui-monospace,Menlo,Consolas,monospace;${t === chosen ? "font-weight:700;fill:var(--ink)" : ""}` }, shown(tokens[t]));
    text.onclick = () => choose(t);
    drawing.append(text);
    if (t > chosen || !visible(l, chosen, t)) continue;
    const w = weight(l, h, chosen, t), a = places[chosen][1], b = places[t][1];
    if (w < 0.004) continue;
    const up = Math.max(10, Math.min(150, (a - b) / 3));
    const arc = t === chosen ? make("circle", { cx: a, cy: ground - 5, r: 4, fill: wash(BLUE, w) })
      : make("path", { d: `M${a} ${ground} Q${(a + b) / 2} ${ground - 2 * up} ${b} ${ground}`,
        fill: "none", stroke: wash(BLUE, 0.06 + w), "stroke-width": 1 + 5 * w });
    drawing.append(tip(arc, () => `${shown(tokens[t])} ${w.toFixed(2)}`));
  }
  drawing.parentElement.scrollLeft = places[chosen][1] - drawing.parentElement.clientWidth + 40;
  find("arcsays").replaceChildren("Where ", code(tokens[chosen]), " looks in this head: the thicker, the more.");
}

// ---- logit lens

function drawLens() {
  const rows = [];
  for (let l = L; l >= 0; l--) {
    const cells = tokens.map((_, t) => {
      const [[id, p]] = likeliest(l, t, 1), known = follows(t), right = frame.chance.at_(l, t);
      const cell = make("td", { class: t === chosen ? "chosen" : "" }, shown(id));
      cell.style.background = known ? wash(GREEN, 0.75 * Math.sqrt(right)) : wash([120, 130, 140], 0.25 * p);
      cell.onclick = () => choose(t);
      const truth = known ? `${shown(tokens[t + 1])} follows: ${percent(right)}, rank ${frame.rank.at_(l, t) + 1}\n` : "";
      return tip(cell, () => truth + likeliest(l, t).map(([i, q]) => `${shown(i)} ${percent(q)}`).join("\n"));
    });
    rows.push(make("tr", {}, make("th", {}, l === L ? `after ${L - 1} (says this)` : l ? `after ${l - 1}` : "embedding"), ...cells));
  }
  const top = make("tr", {}, make("th", {}, ""), ...tokens.map((id, t) => make("th", { class: t === chosen ? "chosen" : "" }, shown(id))));
  find("lens").replaceChildren(make("thead", {}, top), make("tbody", {}, ...rows));
}

// ---- curves

const COLORS = ["--ink", "--blue", "--red", "--green"].map(name => `var(${name})`);
function curves(drawing, lines, xs, words, marks = []) {
  const W = drawing.clientWidth || 600, H = 260, left = 46, right = 10, top = 26, low = H - 34;
  const ys = lines.flatMap(line => line.y), most = Math.max(...ys, 1e-9) * 1.05;
  const x = i => left + (xs.length < 2 ? 0.5 : (xs[i] - xs[0]) / (xs.at(-1) - xs[0])) * (W - left - right);
  const y = v => low - v / most * (low - top);
  drawing.setAttribute("viewBox", `0 0 ${W} ${H}`);
  drawing.replaceChildren();
  for (let k = 0; k <= 3; k++) {
    const v = most * k / 3;
    drawing.append(make("line", { x1: left, x2: W - right, y1: y(v), y2: y(v), stroke: "var(--line)" }),
      make("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, most < 1.2 ? v.toFixed(2) : most < 12 ? v.toFixed(1) : v.toFixed(0)));
  }
  const every = Math.ceil(xs.length / Math.max(2, Math.floor(W / 70)));
  xs.forEach((v, i) => i % every || drawing.append(make("text", { x: x(i), y: low + 16, "text-anchor": "middle" }, v)));
  drawing.append(make("text", { x: W - right, y: H - 4, "text-anchor": "end" }, words));
  marks.forEach(i => drawing.append(make("line", { x1: x(i), x2: x(i), y1: top, y2: low, stroke: "var(--ink)", "stroke-dasharray": "3 3" })));
  let place = left;
  lines.forEach((line, n) => {
    const color = COLORS[n];
    drawing.append(make("path", { d: line.y.map((v, i) => `${i ? "L" : "M"}${x(i)} ${y(v)}`).join(""), fill: "none", stroke: color, "stroke-width": 2 }));
    line.y.forEach((v, i) => drawing.append(tip(make("circle", { cx: x(i), cy: y(v), r: 4, fill: color }), () => `${line.name}\n${words} ${xs[i]}: ${v.toPrecision(3)}`)));
    const label = make("text", { x: place, y: 14, style: `fill:${color}` }, line.name);
    drawing.append(label);
    place += (label.getComputedTextLength?.() || 80) + 18;
  });
}

function drawNorms() {
  const xs = [...Array(L + 1).keys()];
  const [stream, attn, mlp] = frame.norms;
  const of = (array, pad) => [...(pad ? [0] : []), ...Array.from({ length: array.shape[0] }, (_, l) => array.at_(l, chosen))];
  find("normsays").replaceChildren("How long the stream at ", code(tokens[chosen]), " is after each layer (0 is the embedding), and what attention and MLP added to it there.");
  curves(find("norms"), [{ name: "stream", y: of(stream) }, { name: "attention", y: of(attn, true) }, { name: "MLP", y: of(mlp, true) }], xs, "after layer");
}

// ---- attribution

function drawParts() {
  const box = find("which"), options = new Set(), kept = Number(box.value) || 0;
  const count = frame.taken.shape[1];
  box.replaceChildren();
  for (let c = 0; c < count; c++) {
    const id = frame.taken.at_(chosen, c);
    if (options.has(id)) continue;
    options.add(id);
    box.append(make("option", { value: c }, `${shown(id)}${c === 0 && follows(chosen) ? " (follows)" : ""}`));
  }
  box.value = kept < options.size ? kept : 0;
  const c = Number(box.value), H = frame.heads.shape[3];
  find("whose").replaceChildren("at ", code(tokens[chosen]));
  const values = [];
  for (let l = 0; l < L; l++)
    values.push([...Array.from({ length: H }, (_, h) => frame.heads.at_(c, chosen, l, h)), frame.shifts.at_(c, chosen, l), frame.mlps.at_(c, chosen, l)]);
  const most = Math.max(...values.flat().map(Math.abs), 1e-6);
  const biased = values.some(row => row[H] !== 0);
  const names = [...Array.from({ length: H }, (_, h) => `head ${h}`), "bias", "MLP"].filter((_, i) => biased || i !== H);
  const lines = values.map((row, l) => make("tr", {}, make("th", {}, `layer ${l}`),
    ...row.flatMap((v, i) => biased || i !== H ? [tinted(v, most, () => `layer ${l}, ${i < H ? `head ${i}` : i === H ? "biases of attention" : "MLP"}: ${v.toFixed(4)}`, i < H ? () => { head = [l, i]; drawHeads(); } : null)] : [])));
  find("parts").replaceChildren(make("thead", {}, make("tr", {}, make("th", {}, ""), ...names.map(name => make("th", {}, name)))), make("tbody", {}, ...lines));
  const [embedding, constant, softcap, logit] = [0, 1, 2, 3].map(i => frame.whole.at_(c, chosen, i));
  const sum = values.flat().reduce((a, b) => a + b, 0) + embedding + constant + softcap;
  find("sum").textContent = `embedding ${signed(embedding)}, layers ${signed(values.flat().reduce((a, b) => a + b, 0))}`
    + (constant ? `, last biases ${signed(constant)}` : "") + (softcap ? `, soft-cap ${signed(softcap)}` : "")
    + ` = ${sum.toFixed(3)}; the logit is ${logit.toFixed(3)}`;
}
function tinted(v, most, words, click) {
  const cell = make("td", {}, signed(v));
  cell.style.background = wash(v > 0 ? BLUE : RED, 0.7 * Math.abs(v) / most);
  if (click) { cell.onclick = click; cell.style.cursor = "pointer"; }
  return tip(cell, words);
}
find("which").onchange = drawParts;

// ---- patching

function drawSwap() {
  const swap = data.swap, effect = unpack(swap.effect);
  find("swapped").hidden = false;
  find("swapsays").replaceChildren("The prompt leads to ", code(swap.here), ", the other to ", code(swap.there),
    `: logit(second) − logit(first) is ${signed(swap.before)} and ${signed(swap.whole)}. Each cell is how far that moves when the stream there (before that layer, at that token) is the other's. Blue: towards the other.`);
  const most = Math.max(Math.abs(swap.whole - swap.before), ...effect.map(Math.abs), 1e-6);
  const heads = ["", ...tokens.map((id, t) => id === swap.other[t] ? shown(id) : `${shown(id)}→${shown(swap.other[t])}`)];
  const rows = [];
  for (let l = L; l >= 0; l--)
    rows.push(make("tr", {}, make("th", {}, l === L ? "at the end" : `before ${l}`),
      ...tokens.map((id, t) => tinted(effect.at_(l, t), most, () => `${shown(id)}: ${signed(effect.at_(l, t))} of ${signed(swap.whole - swap.before)}`))));
  find("swap").replaceChildren(make("thead", {}, make("tr", {}, ...heads.map(text => make("th", {}, text)))), make("tbody", {}, ...rows));
}

// ---- over steps

function drawInduction() {
  const all = data.history.map(one => ({ ...one, induction: one.unpacked ??= unpack(one.induction) }));
  const best = all.map(one => {
    const top = Math.max(...one.induction), at = one.induction.indexOf(top), H = one.induction.shape[1];
    return { top, l: Math.floor(at / H), h: at % H };
  });
  const first = best[0], last = best.at(-1), where = one => `layer ${one.l}, head ${one.h}`;
  const judged = last.top > 0.3 ? "does" : last.top > 0.1 ? "half does" : "does not";
  const gain = all.at(-1).repeat[0] - all.at(-1).repeat[1];
  find("inductionsays").textContent = "Random tokens that come twice: a head that looks at what followed the same token before (an induction head) can foretell the second time. "
    + `At step ${all.at(-1).step} the best such head (${where(last)}) ${judged}, with ${percent(last.top)} of its attention (an even look at all gives 3 %)`
    + (all.length > 1 ? `; at step ${all[0].step} the best had ${percent(first.top)}` : "")
    + `. The second time costs ${Math.abs(gain).toFixed(2)} nats a token ${gain >= 0 ? "less" : "more"} than the first.`;
  const xs = all.map(one => one.step), mark = xs.indexOf(frame.step);
  curves(find("induction"), [{ name: "attention of the best head", y: best.map(one => one.top) }], xs, "step", mark < 0 ? [] : [mark]);
}

// ---- all of it

function choose(t) { chosen = t; draw(); }
function draw() {
  drawTokens(); drawArcs(); drawLens(); drawNorms(); drawParts();
}
function show(number) {
  frame = ready[number] ??= opened(frames[number]);
  const history = data.history.find(one => one.step === frame.step);
  find("shown").textContent = `step ${frame.step}`;
  find("left").textContent = history.loss === null ? "" : `loss of this text ${history.loss.toFixed(3)} nats`;
  if (!thumbs.length) layHeads();
  drawHeads(); draw(); drawInduction();
}

find("name").textContent = data.name;
find("facts").append(...data.facts.map(([name, value]) => make("div", { class: "card" }, make("b", {}, value), make("span", {}, name))));
const slider = find("step");
slider.max = frames.length - 1;
slider.value = data.steps.indexOf(data.opened);
slider.oninput = () => show(Number(slider.value));
slider.hidden = frames.length < 2;
if (data.steps.length < data.history.length)
  find("bar").append(make("span", { class: "soft" }, `the page holds ${data.steps.length} of ${data.history.length} checkpoints: more would make it too large`));
show(Number(slider.value));
if (data.swap) drawSwap();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawHeads());
addEventListener("resize", () => { drawNorms(); drawInduction(); });
