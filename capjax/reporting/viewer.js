// One image, large: every measure, where the model looked at each word, what was found instead.

const viewer = byId("viewer");
let current = 0, from = { x: 0, y: 0 };

function openViewer(place) {
  current = place;
  showItem();
  if (!viewer.open) viewer.showModal();
}

function step(by) {
  const next = current + by;
  if (next < 0 || next >= listed.length) return;
  current = next;
  showItem();
  viewer.scrollTop = 0;
}

function showItem() {
  const item = listed[current], shown = picture(item.split.images[item.i], item.key);
  byId("place").textContent = `${current + 1} of ${listed.length}: ${item.key} (${item.split.name})`;
  byId("previous").disabled = current === 0;
  byId("next").disabled = current === listed.length - 1;
  const captions = data.runs.map((_, run) => caption(item, run) === null ? null : said(item, run, shown));
  const references = item.split.references[item.i];
  byId("shown").replaceChildren(shown, make("div", {}, ...captions,
    references.length ? block("references", ...references.map(textContent => make("div", { dir: "auto", textContent }))) : null,
    ...data.runs.flatMap((_, run) => [wrongImage(item, run), wrongText(item, run)]).filter(Boolean), measures(item)));
}

const block = (title, ...children) => make("div", { className: "block" }, make("h3", { textContent: title }), ...children);

function said(item, run, shown) {
  const looked = item.split.runs[run].attention[item.i], text = caption(item, run) || "(empty)";
  const title = data.runs.length > 1 ? data.runs[run].name : looked ? "caption: choose a word to see where the model looked" : "caption";
  const line = make("div", { className: "caption", dir: "auto" });
  if (!looked) line.textContent = text;
  else looked.words.forEach((textContent, word) => {
    const button = make("button", { className: "word", textContent });
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => look(button, shown, looked, word, data.runs[run].mode));
    line.append(button);
  });
  const made = block(title, line);
  if (data.runs.length > 1) made.firstChild.prepend(key(run));
  return made;
}

/** Darkens the patches that the word's attention left alone; a second time: takes that away. */
function look(button, shown, looked, word, mode) {
  const again = button.getAttribute("aria-pressed") === "true";
  for (const other of all(".word")) other.setAttribute("aria-pressed", "false");
  shown.querySelector("canvas")?.remove();
  const image = shown.querySelector("img");
  if (again || !image) return;
  button.setAttribute("aria-pressed", "true");
  const [height, width] = looked.grid, weights = Uint8Array.from(atob(looked.weights[word]), c => c.charCodeAt(0));
  const most = Math.max(1, ...weights), canvas = make("canvas", { width, height });
  const context = canvas.getContext("2d"), veil = context.createImageData(width, height);
  weights.forEach((weight, i) => veil.data.set([8, 10, 30, Math.round(225 * (1 - weight / most))], 4 * i));
  context.putImageData(veil, 0, 0);
  Object.assign(canvas.style, seen(image, mode));
  shown.append(canvas);
}

/** The part of the (square) picture frame that the model saw, by how its images are made square. */
function seen(image, mode) {
  const w = image.naturalWidth, h = image.naturalHeight, longer = Math.max(w, h), shorter = Math.min(w, h);
  const [width, height] = mode === "pad" ? [1, 1]
    : mode === "crop" ? [shorter / longer, shorter / longer] : [w / longer, h / longer];
  const percent = share => `${100 * share}%`;
  return { left: percent((1 - width) / 2), top: percent((1 - height) / 2), width: percent(width), height: percent(height) };
}

const ofRun = (title, run) => data.runs.length > 1 ? `${data.runs[run].name}: ${title}` : title;

function wrongImage(item, run) {
  const key = found(item, run, "image"), other = item.split.others[key];
  if (key === null) return null;
  const texts = other.references.length ? other.references.slice(0, 2) : [key];
  return block(ofRun("the caption finds another image", run), make("div", { className: "found" }, picture(other.image, key),
    make("div", {}, ...texts.map(textContent => make("div", { dir: "auto", textContent })))));
}

function wrongText(item, run) {
  const textContent = found(item, run, "text");
  return textContent && block(ofRun("the image finds another's text", run), make("div", { dir: "auto", textContent }));
}

function measures(item) {
  const rows = data.measures.map(({ name, title }) => {
    const values = data.runs.map((_, run) => measure(item, run, name));
    return values.every(value => value === null) ? null : make("tr", {}, make("th", { textContent: title, scope: "row" }),
      ...values.map(value => make("td", { textContent: value === null ? "" : number(value) })));
  });
  if (rows.every(row => row === null)) return null;
  const head = make("thead", {}, make("tr", {}, make("th", { textContent: "measure" }),
    ...data.runs.map(({ name }) => make("th", { textContent: data.runs.length > 1 ? name : "value" }))));
  return make("div", { className: "scroll" }, make("table", {}, head, make("tbody", {}, ...rows.filter(row => row !== null))));
}

function stepWord(by) {
  const words = all(".word"), pressed = words.findIndex(word => word.getAttribute("aria-pressed") === "true");
  const word = words[pressed < 0 ? (by > 0 ? 0 : words.length - 1) : (pressed + by + words.length) % words.length];
  if (words.length > 1 || pressed < 0) word?.click();
}

byId("previous").addEventListener("click", () => step(-1));
byId("next").addEventListener("click", () => step(1));
byId("close").addEventListener("click", () => viewer.close());
viewer.addEventListener("close", () => focusTile(current));
viewer.addEventListener("click", event => { if (event.target === viewer) viewer.close(); });
document.addEventListener("keydown", event => {  // not of the viewer: a button that goes leaves the focus to the body
  if (!viewer.open || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "ArrowLeft" || event.key === "ArrowRight") step(event.key === "ArrowLeft" ? -1 : 1);
  else if ((event.key === "ArrowUp" || event.key === "ArrowDown") && all(".word").length) stepWord(event.key === "ArrowUp" ? -1 : 1);
  else return;
  event.preventDefault();
});
viewer.addEventListener("pointerdown", event => { from = { x: event.clientX, y: event.clientY }; });
viewer.addEventListener("touchend", event => {  // a swipe, unless it moves a wide table
  if (event.target.closest(".scroll")) return;
  const { clientX, clientY } = event.changedTouches[0], dx = clientX - from.x;
  if (Math.abs(dx) > 60 && Math.abs(dx) > 2 * Math.abs(clientY - from.y)) step(dx > 0 ? -1 : 1);
});
showChosen();
