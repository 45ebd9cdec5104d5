"""The page of explanations, without its data."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>@HEADING@</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { --heat: 208, 32, 32; color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0; color: #1c1c1c; background: #f6f6f4 }
header { padding: 14px 24px; background: #fff; border-bottom: 1px solid #ddd }
h1 { font-size: 19px; margin: 0 0 4px } h2 { font-size: 15px; margin: 0 0 8px }
dl { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 0; font-size: 13px; color: #555 }
dt { font-weight: 600 } dt::after { content: ":" } dd { margin: 0 -8px 0 -12px }
main { display: grid; grid-template-columns: 340px 1fr; gap: 20px; padding: 18px 24px }
@media (max-width: 800px) { main { grid-template-columns: 1fr } }
select { font: inherit; max-width: 100% ; margin-top: 8px }
#codes { list-style: none; margin: 0; padding: 0 }
#codes button { font: inherit; text-align: left; width: 100%; background: #fff; cursor: pointer;
  border: 1px solid #ccc; border-left: 6px solid #888; border-radius: 4px; margin-bottom: 6px;
  padding: 6px 9px }
#codes button[aria-pressed=true] { outline: 2px solid #1a56c4; background: #eef4ff }
#codes .true { border-left-color: #15803d } #codes .false { border-left-color: #b91c1c }
#codes .missed { border-left-color: #b45309 }
.verdict { float: right; font-size: 12px; padding: 0 6px; border-radius: 8px; color: #fff;
  background: #666 }
.true .verdict { background: #15803d } .false .verdict { background: #b91c1c }
.missed .verdict { background: #b45309 }
.bar { height: 4px; background: #e4e4e4; margin-top: 4px; border-radius: 2px }
.bar i { display: block; height: 100%; background: #1a56c4; border-radius: 2px }
#text { white-space: pre-wrap; overflow-wrap: anywhere; background: #fff; border: 1px solid #ddd;
  border-radius: 4px; padding: 14px 18px; font: 15px/1.8 Georgia, serif }
#text span[data-token] { border-radius: 3px; padding: 1px 0 }
#top { font-size: 13px; color: #444; min-height: 1.5em; margin: 8px 2px }
.legend { font-size: 12px; color: #555; margin: 8px 2px }
.legend i { display: inline-block; width: 90px; height: 10px; vertical-align: -1px;
  background: linear-gradient(90deg, rgba(var(--heat), 0), rgba(var(--heat), .85)) }
</style></head>
<body>
<header><h1>@HEADING@</h1><dl>@FACTS@</dl>
<label>Note <select id="note"></select></label></header>
<main>
<section aria-label="codes"><h2>Codes</h2><ul id="codes"></ul>
<p class="legend">Choose a code, or go through them with the arrow keys.</p></section>
<section aria-label="note"><h2 id="shown"></h2><div id="text"></div><div id="top"></div>
<p class="legend">weight of a word for this code: none <i></i> the largest. Words that the model
does not read (numbers, common words) are never shaded.</p></section>
</main>
<script>
const notes = @DATA@;
const KINDS = {"true positive": "true", "false positive": "false", "missed": "missed"};
const select = document.getElementById("note"), list = document.getElementById("codes");
const text = document.getElementById("text"), shown = document.getElementById("shown");
const strongest = document.getElementById("top");
let note = 0, code = 0;
function element(name, attributes, content) {
  const made = document.createElement(name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (content !== undefined) made.textContent = content;
  return made;
}
function openNote(number) {
  note = number;
  select.value = number;
  text.replaceChildren(...notes[note].pieces.map(([piece, token]) =>
    token < 0 ? document.createTextNode(piece) : element("span", {"data-token": token}, piece)));
  list.replaceChildren(...notes[note].codes.map((one, n) => {
    const item = document.createElement("li");
    const button = element("button", {type: "button", class: KINDS[one.verdict] || "unknown"});
    button.append(element("span", {class: "verdict"}, one.verdict),
      element("b", {}, one.label), " " + (100 * one.probability).toFixed(0) + " %",
      document.createElement("br"), one.name);
    const bar = element("div", {class: "bar"});
    bar.append(element("i", {style: `width: ${100 * one.probability}%`}));
    button.append(bar);
    button.onclick = () => openCode(n);
    item.append(button);
    return item;
  }));
  openCode(0);
}
function openCode(number) {
  code = number;
  const one = notes[note].codes[code], most = Math.max(...one.weights, 1e-9);
  [...list.querySelectorAll("button")].forEach((button, n) =>
    button.setAttribute("aria-pressed", n === code));
  shown.textContent = `${one.label} ${one.name} (${one.verdict})`;
  for (const span of text.querySelectorAll("[data-token]")) {
    const weight = one.weights[span.dataset.token];
    span.style.backgroundColor = `rgba(208, 32, 32, ${(0.85 * weight / most).toFixed(3)})`;
    span.title = `${(100 * weight).toFixed(1)} % of the weight`;
  }
  const order = one.weights.map((w, n) => [w, n]).sort((a, b) => b[0] - a[0]).slice(0, 6);
  const word = n => text.querySelector(`[data-token="${n}"]`).textContent.trim();
  strongest.textContent = "most weight: " +
    order.map(([w, n]) => `${word(n)} ${(100 * w).toFixed(0)} %`).join(", ");
}
notes.forEach((one, n) => select.append(element("option", {value: n}, one.title)));
select.onchange = () => openNote(Number(select.value));
document.addEventListener("keydown", event => {
  if (event.target === select) return;
  const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
  if (!step) return;
  event.preventDefault();
  const count = notes[note].codes.length;
  openCode((code + step + count) % count);
});
openNote(0);
</script>
</body></html>
"""
