"use strict";
// The split that is looked at, what the charts say under the pointer, exports, light and dark.

const byId = id => document.getElementById(id);
const all = selector => [...document.querySelectorAll(selector)];
const chosenSplit = () => document.querySelector("#split input:checked")?.value ?? "";

function showChosen() {
  const split = chosenSplit(), axis = byId("axis")?.value ?? "step";
  const along = byId("along")?.value, upwards = byId("upwards")?.value;
  for (const part of all("[data-split]")) {
    const { split: of, axis: over, x, y } = part.dataset;
    part.hidden = (split !== "" && of !== "" && of !== split) || (over !== undefined && over !== axis)
      || (x !== undefined && (x !== along || y !== upwards));
  }
  document.dispatchEvent(new Event("split"));
}
for (const control of all("#split input, #axis, #along, #upwards")) control.addEventListener("change", showChosen);

const tip = byId("tip");
for (const svg of all("svg[data-chart]")) {
  let lines = null;
  const show = event => {
    lines ??= JSON.parse(svg.dataset.chart);
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    let said = "", least = Infinity;
    for (const [name, points] of lines) for (const [x, y, says] of points) {
      const distance = Math.hypot(x - at.x, (y - at.y) / 3);
      if (distance < least) { least = distance; said = `${name}: ${says}`; }
    }
    tip.textContent = said;
    tip.style.display = "block";
    tip.style.left = Math.max(4, Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8)) + "px";
    tip.style.top = Math.min(event.clientY + 16, innerHeight - tip.offsetHeight - 4) + "px";
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", () => { tip.style.display = "none"; });
}

for (const button of all(".copy")) {
  button.addEventListener("click", async () => {
    const head = button.closest(".tablehead"), link = head.querySelector('a[download$=".tex"]').href;
    const text = decodeURIComponent(link.slice(link.indexOf(",") + 1)), shown = head.querySelector("textarea");
    if (shown) return shown.remove();
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy LaTeX"; }, 1500);
    } catch {  // no clipboard (a page over plain http) or none allowed: to be copied by hand
      const area = Object.assign(document.createElement("textarea"), { value: text, readOnly: true, rows: 8 });
      area.setAttribute("aria-label", "LaTeX, selected: copy it");
      head.append(area);
      area.select();
    }
  });
}

const remembered = {
  get theme() { try { return localStorage.getItem("capjax-theme"); } catch { return null; } },
  set theme(value) { try { localStorage.setItem("capjax-theme", value); } catch { /* not remembered */ } },
};
if (remembered.theme) document.documentElement.dataset.theme = remembered.theme;
byId("theme").addEventListener("click", () => {
  const now = document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  document.documentElement.dataset.theme = remembered.theme = now === "dark" ? "light" : "dark";
});
