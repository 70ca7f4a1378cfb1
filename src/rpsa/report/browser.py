"""The part of the page where responses can be read side by side: three selects and a few lines of script.

Responses come from models and may hold anything. They reach the page as JSON in a script element that they cannot
end, and are only ever set as text.
"""

STYLE = """
.browser { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
.browser > * { min-width: 0; }
.choose { display: flex; flex-wrap: wrap; gap: .5rem 1rem; margin: .5rem 0 1rem; }
.choose label { display: grid; font-size: .85rem; color: #505a64; min-width: 0; max-width: 100%; }
.choose select { font: inherit; font-size: 16px; max-width: 100%; padding: .25rem; }
.browser pre { background: #f5f6f8; padding: .6rem; overflow-wrap: anywhere; }
.browser h3 { font-size: 1rem; margin: .2rem 0; } .asked { grid-column: 1 / -1; }
@media print { .choose { display: none; } }
"""

_MARKUP = """<h2>Responses</h2>
<p class="note">A few items of each set on <span id="base"></span>, those first on which the models differ. Long texts
are cut in the middle. Responses to harmful requests stay closed until opened.</p>
<noscript><p>Choosing and showing responses needs JavaScript, which is off. All of them are in the run's folder:
evaluate/*/samples.jsonl.</p></noscript>
<div id="responses" hidden>
<div class="choose">
<label>Set <select id="set"></select></label>
<label>Item <select id="item"></select></label>
<label>Method <select id="method"></select></label>
</div>
<div class="browser">
<div class="asked"><h3>Prompt</h3><pre id="prompt"></pre>
<div id="gold"><h3>Right answer</h3><pre id="answer"></pre></div></div>
<div><h3>original</h3><p class="note" id="verdict-0"></p>
<details id="details-0"><summary>Response</summary><pre id="text-0"></pre></details></div>
<div><h3 id="name"></h3><p class="note" id="verdict-1"></p>
<details id="details-1"><summary>Response</summary><pre id="text-1"></pre></details></div>
</div>
</div>
<script type="application/json" id="chosen">{json}</script>
<script>{script}</script>"""

_SCRIPT = """
"use strict";
(() => {
  const $ = id => document.getElementById(id);
  const chosen = JSON.parse($("chosen").textContent);
  const fill = (id, names) => $(id).replaceChildren(...names.map((name, i) => new Option(name, i)));
  const set = () => chosen.sets[$("set").value];
  function show() {
    const item = set().items[$("item").value], method = +$("method").value + 1;
    $("prompt").textContent = item.prompt;
    $("gold").hidden = !item.answer;
    $("answer").textContent = item.answer;
    $("name").textContent = chosen.methods[method];
    [item.responses[0], item.responses[method]].forEach((response, side) => {
      $("verdict-" + side).textContent = !response ? "no response" : response.outcome
        + (set().kind === "reasoning" ? ", extracted: " + (response.extracted ?? "nothing") : "")
        + (response.out_of_tokens ? ", out of tokens" : "");
      $("text-" + side).textContent = response ? response.text : "";
      $("details-" + side).open = set().kind !== "attack";
    });
  }
  function choose() { fill("item", set().items.map(item => item.id)); show(); }
  $("base").textContent = chosen.base;
  fill("set", chosen.sets.map(one => one.name));
  fill("method", chosen.methods.slice(1));
  $("set").onchange = choose;
  $("item").onchange = $("method").onchange = show;
  $("responses").hidden = false;
  choose();
})();
"""


def render_browser(chosen: str) -> str:
    """`chosen` is the JSON of `rpsa.report.responses.chosen_responses`."""
    return _MARKUP.format(json=chosen, script=_SCRIPT)
