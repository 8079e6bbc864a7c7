// Tiles of images and captions: searched, filtered, sorted; made as they come into view.

const data = JSON.parse(byId("data").textContent);
const CHUNK = 60, COLOURS = 8, NAMED = 3;
const items = data.splits.flatMap((split, s) => split.keys.map((key, i) => ({ split, s, i, key, text: null })));
let listed = [], made = 0, waiting = 0;

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter(child => child !== null));
  return element;
}
const measure = (item, run, name) => item.split.runs[run].measures[name]?.[item.i] ?? null;
const caption = (item, run) => item.split.runs[run].captions[item.i];
const number = value => Number.isInteger(value) ? value.toLocaleString("en") : value.toFixed(Math.abs(value) < 10 ? 3 : 2);
const isMissed = (item, run) => data.measures.some(({ name }) => name.endsWith("_rank") && measure(item, run, name) > 1);
/** What was found wrongly, or null: what="image", the key of an image; what="text", a text. */
const found = (item, run, what) => item.split.runs[run].found[what]?.[item.i] ?? null;

function textOf(item) {
  item.text ??= [item.key, ...item.split.references[item.i], ...data.runs.map((_, run) => caption(item, run) ?? "")]
    .join("\n").toLowerCase();
  return item.text;
}

function picture(image, name) {
  if (!(image >= 0)) return make("div", { className: "picture" }, make("span", { className: "none", textContent: "no image" }));
  const source = "data:image/webp;base64," + data.images[image];
  return make("div", { className: "picture" }, make("img", { src: source, alt: name, decoding: "async" }));
}

const filters = [
  ["all", "all", () => true],
  ["exact", "exact", (item, run) => measure(item, run, "exact_match") === 1],
  ["wrong", "not exact", (item, run) => measure(item, run, "exact_match") === 0],
  ["missed", "retrieval failures", isMissed],
  ["differ", "captions differ", item => sayings(item).length > 1],
  ["attention", "with attention", (item, run) => item.split.runs[run].attention[item.i] != null],
];

/** The run whose measures count, and the one it is compared with (null: none). */
function whose() {
  const [run, other] = (byId("whose").value || "0").split("-");
  return [Number(run), other === undefined ? null : Number(other)];
}

function sortValue(item, name) {
  const [run, other] = whose(), value = measure(item, run, name);
  if (other === null || value === null) return value;
  const base = measure(item, other, name);
  return base === null ? null : value - base;
}

function list() {
  clearTimeout(waiting);
  const words = byId("find").value.toLowerCase().split(/\s+/).filter(Boolean), [run] = whose();
  const split = chosenSplit(), keep = filters.find(([name]) => name === byId("filter").value)[2];
  listed = items.filter(item => (split === "" || item.split.name === split) && keep(item, run)
    && words.every(word => textOf(item).includes(word)));
  const name = byId("sort").value, sign = byId("order").textContent === "↓" ? -1 : 1;
  if (name !== "") {
    const values = new Map(listed.map(item => [item, sortValue(item, name)]));
    listed.sort((a, b) => {
      const x = values.get(a), y = values.get(b);
      return x === null || y === null ? (x === null) - (y === null) : sign * (x - y);
    });
  }
  const total = items.filter(item => split === "" || item.split.name === split).length;
  byId("count").textContent = `${listed.length.toLocaleString("en")} of ${total.toLocaleString("en")}`;
  byId("order").hidden = name === "";
  byId("tiles").replaceChildren();
  made = 0;
  more();
  if (!listed.length) byId("tiles").append(make("p", { className: "empty", textContent: total ? "Nothing here is like that." : "No captions of this split were written." }));
}

function more() {
  const tiles = listed.slice(made, made + CHUNK).map((item, i) => tile(item, made + i));
  made += tiles.length;
  byId("tiles").append(...tiles);
  ahead.disconnect();  // observed anew it says again whether the end is near, also where it was before
  if (made < listed.length) ahead.observe(byId("more"));
}
const ahead = new IntersectionObserver(entries => { if (entries.some(entry => entry.isIntersecting)) more(); },
  { rootMargin: "1200px" });

function tile(item, place) {
  const shown = picture(item.split.images[item.i], item.key), [of] = whose(), name = byId("sort").value;
  const wrong = item.split.others[found(item, of, "image")];
  if (byId("filter").value === "missed" && wrong?.image >= 0) {
    const inset = picture(wrong.image, "what its caption finds").firstChild;
    inset.className = "inset";
    inset.title = "what its caption finds";
    shown.append(inset);
  }
  const isNamed = data.runs.length > COLOURS;
  const said = sayings(item).flatMap(({ text, runs }) => {
    const values = runs.map(run => name === "" ? null : measure(item, run, name)).filter(value => value !== null);
    const line = make("div", { className: "said", dir: "auto" }, ...(data.runs.length > 1 && !isNamed ? runs.map(key) : []), text || "(empty)",
      values.length ? make("span", { className: "value", textContent: " " + values.map(number).join(", ") }) : null);
    return isNamed ? [line, voices(runs)] : [line];
  });
  const references = item.split.references[item.i];
  const rest = references.length > 2 ? `and ${references.length - 2} more` : null;
  const element = make("div", { className: data.runs.length > 1 ? "tile many" : "tile", tabIndex: place ? -1 : 0 }, shown, ...said,
    ...references.slice(0, 2).map(textContent => make("div", { className: "ref", dir: "auto", textContent })),
    rest && make("div", { className: "ref", textContent: rest }), mark(item, of));
  element.setAttribute("role", "button");
  element.dataset.place = place;
  return element;
}

const key = run => make("i", { className: `key c${run % COLOURS}`, title: data.runs[run].name });
/** Who says something, by name, where there are more voices than colours: the first of them. */
function voices(runs) {
  const names = runs.slice(0, NAMED).map(run => make("span", {}, key(run), data.runs[run].name));
  const rest = runs.length > NAMED ? `and ${runs.length - NAMED} more` : null;
  return make("div", { className: "voices", title: runs.map(run => data.runs[run].name).join("\n") }, ...names, rest);
}

/** What is said of an image, each caption once, with the runs that say it. */
function sayings(item) {
  const said = new Map();
  data.runs.forEach((_, run) => {
    const text = caption(item, run);
    if (text !== null) said.set(text, [...(said.get(text) ?? []), run]);
  });
  return [...said].map(([text, runs]) => ({ text, runs }));
}

function mark(item, run) {
  const exact = measure(item, run, "exact_match"), f1 = measure(item, run, "unigram_f1");
  if (data.runs.length > 1 || exact === null || !item.split.references[item.i].length) return null;
  return make("div", { className: `mark ${exact === 1 ? "good" : "bad"}`, textContent: exact === 1 ? "exact" : `F1 ${(f1 ?? 0).toFixed(2)}` });
}

/** Moves the focus to a tile, making those before it first. */
function focusTile(place) {
  place = Math.max(0, Math.min(place, listed.length - 1));
  while (made <= place && made < listed.length) more();
  const element = byId("tiles").children[place];
  if (!element) return;
  for (const other of all('.tile[tabindex="0"]')) other.tabIndex = -1;
  element.tabIndex = 0;
  element.focus();
  element.scrollIntoView({ block: "nearest" });
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("viewer").open) return;
  const on = document.activeElement, isTile = on?.classList.contains("tile");
  if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(on?.tagName)) {
    byId("find").focus();
    byId("find").select();
  } else if (on === byId("find") && (event.key === "Enter" || event.key === "ArrowDown")) {
    list();  // of what was typed a moment ago
    focusTile(0);
  } else if (on === byId("find") && event.key === "Escape") {
    byId("find").value = "";
    list();
    focusTile(0);
  } else if (isTile) {
    const columns = getComputedStyle(byId("tiles")).gridTemplateColumns.split(" ").length;
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
    if (event.key in steps) focusTile(Number(on.dataset.place) + steps[event.key]);
    else if (event.key === "Enter" || event.key === " ") openViewer(Number(on.dataset.place));
    else return;
  } else return;
  event.preventDefault();
}

function fill(select, options) {
  select.replaceChildren(...options.map(([value, textContent]) => make("option", { value, textContent })));
  select.closest("label").hidden = options.length < 2;
}

function startGallery() {
  fill(byId("filter"), filters.filter(([name, , keep]) => name === "all"
    || items.some(item => data.runs.some((_, run) => keep(item, run)))));
  fill(byId("sort"), [["", "random order"], ...data.measures.map(({ name, title }) => [name, title])]);
  fill(byId("whose"), [...data.runs.map(({ name }, run) => [String(run), name]),
    ...data.runs.slice(1).map(({ name }, i) => [`${i + 1}-0`, `${name} − ${data.runs[0].name}`])]);
  byId("find").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(list, 80); });
  for (const id of ["filter", "sort", "whose"]) byId(id).addEventListener("change", () => {
    if (id === "sort") {  // the worst first
      const better = data.measures.find(({ name }) => name === byId("sort").value)?.better ?? 0;
      byId("order").textContent = better < 0 ? "↓" : "↑";
    }
    list();
  });
  byId("order").addEventListener("click", () => {
    byId("order").textContent = byId("order").textContent === "↑" ? "↓" : "↑";
    list();
  });
  byId("tiles").addEventListener("click", event => {
    const element = event.target.closest(".tile");
    if (element) openViewer(Number(element.dataset.place));
  });
  document.addEventListener("split", list);
  document.addEventListener("keydown", onKey);
}
if (data.splits.length) startGallery();
