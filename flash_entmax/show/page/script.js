// data.js comes first in the page.

const MOST_LISTED = 500;

// What is shown. `asking` is the token whose attention is shaded; pinned, it stays while the pointer moves on.
const state = { layer: 0, head: 0, asking: length - 1, pinned: false };
let attention = null; // {offsets, keys, probabilities} of the layer and head that are shown
let shaded = [];

/** The keys of a token, from the first on: [{key, p}]. */
function keysOf(token) {
  const found = [];
  for (let i = attention.offsets[token]; i < attention.offsets[token + 1]; i++) {
    found.push({ key: attention.keys[i], p: attention.probabilities[i] });
  }
  return found;
}

/** What the keys of a token leave out of the sum 1. */
const other = (token) => facts.layers[state.layer].other?.[state.head][token] ?? 0;

// Colours and words

const dark = matchMedia("(prefers-color-scheme: dark)");
const RAMPS = {
  light: [[255, 237, 160], [254, 178, 76], [240, 59, 32], [128, 0, 38]],
  dark: [[84, 60, 8], [166, 97, 6], [247, 148, 40], [255, 232, 160]],
};

/** The colour at x from 0 to 1. */
function colour(x) {
  const ramp = dark.matches ? RAMPS.dark : RAMPS.light;
  const place = Math.min(x, 1) * (ramp.length - 1), low = Math.min(Math.floor(place), ramp.length - 2);
  return ramp[low].map((c, i) => Math.round(c + (place - low) * (ramp[low + 1][i] - c)));
}

/** Paint the background, and choose the ink with more contrast to it, as WCAG defines it by relative luminance. */
function paint(element, x) {
  const rgb = colour(x);
  const [r, g, b] = rgb.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  element.style.background = `rgb(${rgb})`;
  element.style.color = 0.2126 * r + 0.7152 * g + 0.0722 * b < 0.179 ? "#fff" : "#000";
}

const number = (p) => (p >= 0.00005 ? p.toFixed(4) : p.toExponential(1));
const size = (x) => (x < 99.95 ? x.toFixed(1) : x < 9999.5 ? x.toFixed(0) : `${Math.round(x / 1000)}k`);

const amountOf = (covered) => (covered === 1 ? "probability" : "share");
const made = (covered) => `${+(100 * covered).toFixed(2)} %`;

function make(name, text = "", options = {}) {
  const element = document.createElement(name);
  element.textContent = text;
  return Object.assign(element, options);
}

const spelled = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "·");
const quoted = (token) => make("code", spelled(facts.tokens[token]));

/** A token; if it has two letters or less, then with some letters of its neighbours on both sides. */
function amid(token, letters = 5) {
  if (facts.tokens[token].trim().length > 2) return quoted(token);
  let left = "", right = "";
  for (let i = token - 1; i >= 0 && left.length < letters; i--) left = facts.tokens[i] + left;
  for (let i = token + 1; i < length && right.length < letters; i++) right += facts.tokens[i];
  const code = quoted(token);
  code.prepend(make("span", left.slice(-letters).replaceAll("\n", "↵")));
  code.append(make("span", right.slice(0, letters).replaceAll("\n", "↵")));
  return code;
}

// The text

const tokens = facts.tokens.map((text, index) => {
  const span = make("span", "", { className: "token", tabIndex: -1 });
  span.dataset.index = index;
  span.setAttribute("role", "option");
  span.setAttribute("aria-selected", "false");
  text.split("\n").forEach((line, row) => {
    if (row > 0) span.append(make("span", "↵", { className: "mark" }), "\n");
    span.append(line);
  });
  return span;
});
$("tokens").append(...tokens);
tokens[0].tabIndex = 0;

function shade() {
  for (const token of shaded) {
    token.classList.remove("key", "asking");
    token.removeAttribute("style");
    delete token.dataset.probability;
    token.setAttribute("aria-selected", "false");
  }
  shaded = [];
  if (attention === null) return;
  for (const { key, p } of keysOf(state.asking)) {
    paint(tokens[key], Math.sqrt(p));
    tokens[key].classList.add("key");
    tokens[key].dataset.probability = p;
    shaded.push(tokens[key]);
  }
  tokens[state.asking].classList.add("asking");
  tokens[state.asking].setAttribute("aria-selected", String(state.pinned));
  shaded.push(tokens[state.asking]);
}

function list() {
  $("unpin").hidden = !state.pinned;
  $("asking").replaceChildren();
  $("keys").replaceChildren();
  $("columns").hidden = attention === null;
  if (attention === null) return;
  $("asking").append(amid(state.asking), " ", make("small", `at position ${state.asking}`));
  const found = keysOf(state.asking).sort((a, b) => b.p - a.p);
  const { visible: byHead, covered } = facts.layers[state.layer];
  const amount = amountOf(covered);
  const visible = byHead[byHead.length > 1 ? state.head : 0][state.asking];
  const counted = `${found.length} of ${visible} ${visible === 1 ? "token" : "tokens"}`;
  $("summary").textContent = covered === 1 ? `attends to ${counted}` : `${made(covered)} of its output: ${counted}`;
  for (const { key, p } of found.slice(0, MOST_LISTED)) {
    const row = make("button");
    row.dataset.key = key;
    const bar = make("i");
    bar.style.width = `${(100 * p) / found[0].p}%`;
    paint(bar, Math.sqrt(p));
    row.append(make("output", number(p)), amid(key), make("small", key), bar);
    const words = `token ${key}, ${facts.tokens[key]}, ${amount} ${number(p)}: see what it attends to`;
    row.setAttribute("aria-label", words);
    $("keys").appendChild(make("li")).append(row);
  }
  if (found.length > MOST_LISTED) $("keys").append(make("li", `and ${found.length - MOST_LISTED} more`));
  if (covered < 1 && visible > found.length) {
    const left = number(other(state.asking)), count = visible - found.length;
    $("keys").append(make("li", `other: ${left} in ${count} ${count === 1 ? "token" : "tokens"}`, { id: "other" }));
  }
  const first = found.slice(0, 3).map(({ key, p }) => `${facts.tokens[key].trim()} ${number(p)}`);
  $("spoken").textContent = `${facts.tokens[state.asking]} ${$("summary").textContent}: ${first.join(", ")}`;
}

/** The whole text as a strip beside it: a line for each shaded token, a frame for the token that attends. */
function drawStrip() {
  const strip = $("strip"), box = $("tokens"), ratio = devicePixelRatio;
  const width = (strip.width = strip.clientWidth * ratio), height = (strip.height = strip.clientHeight * ratio);
  const drawing = strip.getContext("2d");
  const place = (token) => ((token.offsetTop - box.offsetTop) / box.scrollHeight) * height;
  for (const token of shaded) {
    drawing.fillStyle = token.style.background;
    if (token.classList.contains("key")) drawing.fillRect(0, place(token), width, 3 * ratio);
  }
  drawing.strokeStyle = getComputedStyle(document.body).getPropertyValue("--accent");
  drawing.lineWidth = 2 * ratio;
  drawing.strokeRect(ratio, place(tokens[state.asking]) - ratio, width - 2 * ratio, 5 * ratio);
}

function show() {
  shade();
  list();
  drawStrip();
}

/** The tip at a token: how many keys it has; while another token is pinned, the probability that this one gives it. */
function tip(token) {
  const box = $("tip");
  box.hidden = token === null || attention === null;
  if (box.hidden) return;
  const isAnother = state.pinned && token !== state.asking, { covered } = facts.layers[state.layer];
  const p = isAnother ? keysOf(state.asking).find(({ key }) => key === token)?.p : undefined;
  const none = covered === 1 ? "exactly 0" : "other";
  if (isAnother) box.replaceChildren(quoted(state.asking), " → ", quoted(token), `: ${p ? number(p) : none}`);
  else {
    const count = attention.offsets[token + 1] - attention.offsets[token];
    box.replaceChildren(quoted(token), `: ${count} ${count === 1 ? "key" : "keys"}`);
  }
  const place = tokens[token].getClientRects()[0] ?? tokens[token].getBoundingClientRect();
  box.style.left = `${Math.max(4, Math.min(place.left, innerWidth - box.offsetWidth - 8))}px`;
  const top = place.bottom + 7;
  box.style.top = `${top + box.offsetHeight > innerHeight ? place.top - box.offsetHeight - 7 : top}px`;
}

// Choices

function remember() {
  const { layer, head, asking, pinned } = state;
  const hash = `#layer=${facts.layers[layer].number}&head=${head}${pinned ? `&token=${asking}` : ""}`;
  history.replaceState(null, "", hash);
}

function point(token) {
  tip(token);
  if (state.pinned || token === state.asking) return;
  state.asking = token;
  show();
}

function pin(token) {
  state.pinned = token !== null;
  if (token !== null) state.asking = token;
  tip(null);
  show();
  remember();
}

async function choose(layer, head) {
  state.layer = layer;
  state.head = Math.min(head, facts.layers[layer].sizes.length - 1);
  fillHeads();
  $("layer").value = state.layer;
  $("head").value = state.head;
  const { name, covered } = facts.layers[state.layer];
  for (const place of ["amount", "scaled"]) $(place).textContent = amountOf(covered);
  $("untouched").textContent = covered === 1 ? "exactly zero" : `other, at most ${made(1 - covered)}`;
  $("name").textContent = name.startsWith("call ") ? "" : name; // a call that no module made has no name
  for (const cell of $("grid").querySelectorAll("button")) {
    const pressed = +cell.dataset.layer === state.layer && +cell.dataset.head === state.head;
    cell.setAttribute("aria-pressed", String(pressed));
    if (pressed) reveal($("grid"), cell);
  }
  const chosen = [state.layer, state.head];
  const found = await decoded(...chosen);
  if (chosen[0] !== state.layer || chosen[1] !== state.head) return; // another choice came meanwhile
  attention = found;
  document.body.dataset.shown = `${facts.layers[layer].number} ${state.head}`;
  tip(null);
  show();
}

/** Take the state from the address. What it does not name, or names wrongly, comes from the start: the last token. */
function restore() {
  const address = new URLSearchParams(location.hash.slice(1));
  const within = (text, end) => (/^\d+$/.test(text ?? "") && +text < end ? +text : null);
  const found = facts.layers.findIndex(({ number }) => String(number) === address.get("layer"));
  const [layer, first] = found >= 0 ? [found, 0] : facts.start;
  const token = within(address.get("token"), length);
  state.pinned = token !== null;
  state.asking = token ?? length - 1;
  if (state.pinned) roam(token);
  const box = $("tokens"), asking = tokens[state.asking];
  box.scrollTop = asking.offsetTop - box.offsetTop - box.clientHeight / 2;
  return choose(layer, within(address.get("head"), facts.layers[layer].sizes.length) ?? first);
}

/** Scroll the box alone, as little as is needed to show the element beside the headings of the box. */
function reveal(box, element) {
  for (const [place, size, scroll, room] of [
    ["offsetTop", "offsetHeight", "scrollTop", "clientHeight"],
    ["offsetLeft", "offsetWidth", "scrollLeft", "clientWidth"],
  ]) {
    const start = element[place] - box[place], margin = 1.5 * element[size];
    box[scroll] = Math.max(Math.min(box[scroll], start - margin), start + margin + element[size] - box[room]);
  }
}

function fillHeads() {
  const sizes = facts.layers[state.layer].sizes;
  $("head").replaceChildren(...sizes.map((_, head) => make("option", head, { value: head })));
}

function fillGrid() {
  const heads = Math.max(...facts.layers.map((layer) => layer.sizes.length));
  const sizes = facts.layers.flatMap((layer) => layer.sizes).filter((x) => x > 0);
  const low = Math.log(Math.min(...sizes)), high = Math.log(Math.max(...sizes));
  const grid = $("grid");
  grid.style.gridTemplateColumns = `auto repeat(${heads}, minmax(25px, 1fr))`;
  const heading = (text, className) => make("span", text, { className });
  const cells = [heading("", "top left"), ...Array.from({ length: heads }, (_, head) => heading(head, "top"))];
  facts.layers.forEach((layer, row) => {
    cells.push(heading(layer.number, "left"));
    for (let head = 0; head < heads; head++) {
      const mean = layer.sizes[head];
      if (mean === undefined) {
        cells.push(make("span"));
        continue;
      }
      const cell = make("button", size(mean), { tabIndex: -1 });
      Object.assign(cell.dataset, { layer: row, head });
      cell.setAttribute("aria-label", `layer ${layer.number}, head ${head}: ${size(mean)} keys per query`);
      cell.setAttribute("aria-pressed", String(row === state.layer && head === state.head));
      paint(cell, mean > 0 && high > low ? (Math.log(mean) - low) / (high - low) : 0);
      cells.push(cell);
    }
  });
  grid.replaceChildren(...cells);
}

function fillRamp() {
  const stops = Array.from({ length: 11 }, (_, i) => `rgb(${colour(i / 10)}) ${10 * i}%`);
  $("ramp").style.background = `linear-gradient(to right, ${stops})`;
}

// Hands: pointer, touch and keyboard

const tokenAt = (event) => {
  const token = event.target.closest?.(".token");
  return token ? +token.dataset.index : null;
};

/** Tab enters the text at this token. */
function roam(token) {
  for (const other of $("tokens").querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
  tokens[token].tabIndex = 0;
}

/** The nearest token in the line above (-1) or under (1) this one. */
function across(token, direction) {
  const from = tokens[token].getClientRects()[0], middle = (rect) => rect.left + rect.width / 2;
  let best = token, line = null, nearest = Infinity;
  for (let next = token + direction; next >= 0 && next < length; next += direction) {
    const rect = tokens[next].getClientRects()[0];
    if (!rect || Math.abs(rect.top - from.top) < 4) continue;
    line ??= rect.top;
    if (Math.abs(rect.top - line) > 4) break;
    const distance = Math.abs(middle(rect) - middle(from));
    if (distance < nearest) [best, nearest] = [next, distance];
  }
  return best;
}

const STEPS = {
  ArrowLeft: (token) => token - 1,
  ArrowRight: (token) => token + 1,
  ArrowUp: (token) => across(token, -1),
  ArrowDown: (token) => across(token, 1),
  Home: () => 0,
  End: () => length - 1,
};

$("tokens").addEventListener("pointerover", (event) => {
  const token = tokenAt(event);
  if (event.pointerType === "mouse" && token !== null) point(token);
});
$("tokens").addEventListener("pointerleave", () => tip(null));
$("tokens").addEventListener("scroll", () => tip(null));
$("tokens").addEventListener("focusin", (event) => {
  const token = tokenAt(event);
  if (token !== null && event.target.matches(":focus-visible")) point(token);
});
$("tokens").addEventListener("click", (event) => {
  const token = tokenAt(event);
  if (token === null) return;
  roam(token);
  pin(state.pinned && token === state.asking ? null : token);
});
$("tokens").addEventListener("keydown", (event) => {
  const token = tokenAt(event);
  if (token === null || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in STEPS) {
    const next = Math.max(0, Math.min(length - 1, STEPS[event.key](token)));
    roam(next);
    tokens[next].focus();
  } else if (event.key === "Enter" || event.key === " ") {
    pin(state.pinned && token === state.asking ? null : token);
  } else return;
  event.preventDefault();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && state.pinned) pin(null);
});
$("unpin").addEventListener("click", () => pin(null));

$("strip").addEventListener("click", (event) => {
  const box = $("tokens");
  box.scrollTop = (event.offsetY / $("strip").clientHeight) * box.scrollHeight - box.clientHeight / 2;
});
addEventListener("resize", drawStrip);

const keyAt = (event) => event.target.closest("button")?.dataset.key;
$("keys").addEventListener("click", (event) => {
  const key = keyAt(event);
  if (key === undefined) return;
  pin(+key);
  roam(+key);
  tokens[+key].scrollIntoView({ block: "nearest" });
});
const unpoint = () => $("tokens").querySelector(".pointed")?.classList.remove("pointed");
for (const name of ["pointerover", "focusin"]) {
  $("keys").addEventListener(name, (event) => {
    const key = keyAt(event);
    unpoint();
    if (key !== undefined) tokens[+key].classList.add("pointed");
  });
}
for (const name of ["pointerleave", "focusout"]) $("keys").addEventListener(name, unpoint);

const chosen = (layer, head) => choose(+layer, +head).then(remember);
$("layer").addEventListener("change", () => chosen($("layer").value, state.head));
$("head").addEventListener("change", () => chosen(state.layer, $("head").value));
$("grid").addEventListener("click", (event) => {
  const { layer, head } = event.target.dataset;
  if (layer !== undefined) chosen(layer, head);
});
addEventListener("hashchange", restore);
dark.addEventListener("change", () => [fillGrid, fillRamp, show].forEach((draw) => draw()));

$("layer").append(...facts.layers.map((layer, index) => make("option", layer.number, { value: index })));
fillGrid();
fillRamp();
if ("DecompressionStream" in window) restore();
else $("help").textContent = "This browser is too old to read the page's data: it needs DecompressionStream (2023).";
