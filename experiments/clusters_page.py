"""Which tokens share a cluster: found in a model, drawn as a page."""

import html
import json

import jax
import numpy as np


def clusters_by_head(model, ids: np.ndarray) -> dict[str, np.ndarray]:
  """`layer 2, head 1` -> bool [T, C], the clusters that each token is in.

  Where keys have clusters of their own: `layer 2, head 1, queries` and `..., keys`. A query sees
  keys of the same color.
  """

  def find(ids):
    found = []
    for mixer, x in model.mixer_inputs(ids):
      of = {}
      if mixer.config.routed_heads and mixer.config.shared:
        of[""] = mixer.clusters_of(x)[0]
      elif mixer.config.routed_heads:
        of[", queries"] = mixer.clusters_of(x)[0]
        of[", keys"] = mixer.clusters_of(x, as_key=True)[0]
      found.append(of)
    return found

  by_layer = jax.jit(find)(ids[None])
  return {
    f"layer {layer + 1}, head {head + 1}{kind}": np.asarray(of[kind][:, head])
    for layer, of in enumerate(by_layer)
    for head in range(next(iter(of.values())).shape[1] if of else 0)
    for kind in sorted(of, reverse=True)  # queries first
  }


def page(words: list[str], clusters: dict[str, np.ndarray]) -> str:
  """The HTML page; `clusters` has bool [T, C] for the T words, by the name of the head."""
  shown = [
    f"<span id=t{n}>{html.escape(word.replace(chr(10), '⏎' + chr(10)))}</span>"
    for n, word in enumerate(words)
  ]
  data = {name: [np.flatnonzero(row).tolist() for row in of] for name, of in clusters.items()}
  options = "".join(f"<option>{html.escape(name)}</option>" for name in data)
  return (
    _PAGE.replace("@OPTIONS@", options)
    .replace("@TOKENS@", "".join(shown))
    .replace("@DATA@", json.dumps(data).replace("<", "\\u003c"))
  )


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Clusters of tokens</title>
<style>
body { font-family: sans-serif; margin: 2em; max-width: 60em }
#text { font: 15px/1.7 monospace; white-space: pre-wrap; word-break: break-all }
#text span { border-radius: 2px }
#text span.same { outline: 2px solid #000 }
#text span.here { background: #000 !important; color: #fff }
</style>
<h1>Which tokens share a cluster</h1>
<p><label>Head <select id="head">@OPTIONS@</select></label> <span id="info"></span></p>
<div id="text">@TOKENS@</div>
<script>
const data = @DATA@, spans = [...document.querySelectorAll("#text span")];
const head = document.getElementById("head"), info = document.getElementById("info");
function color(c) { return c === undefined ? "none" : `hsl(${(c * 137.5) % 360} 75% 82%)`; }
function paint() {
  const of = data[head.value], sizes = {};
  of.forEach((list, n) => {
    spans[n].style.background = color(list[0]);
    spans[n].title = list.length ? "cluster " + list.join(", ") : "in no cluster";
    list.forEach(c => sizes[c] = (sizes[c] || 0) + 1);
  });
  info.textContent = Object.keys(sizes).length + " clusters used; the largest has " +
    Math.max(0, ...Object.values(sizes)) + " of " + spans.length + " tokens";
}
function mark(n) {
  const mine = new Set(n < 0 ? [] : data[head.value][n]);
  const others = data[head.value.replace(/, queries$/, ", keys")];  // a query meets keys
  spans.forEach((span, m) => {
    span.className = m === n ? "here" : others[m].some(c => mine.has(c)) ? "same" : "";
  });
}
spans.forEach((span, n) => {
  span.onmouseenter = () => mark(n);
  span.onmouseleave = () => mark(-1);
});
head.onchange = paint;
paint();
</script>
"""
