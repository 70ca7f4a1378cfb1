"use strict";
(() => {
  const $ = id => document.getElementById(id);
  const chosen = JSON.parse($("chosen").textContent);
  const fill = (id, names) => $(id).replaceChildren(...names.map((name, i) => new Option(name, i)));
  const set = () => chosen.sets[$("set").value];
  function show() {
    const item = set().items[$("item").value], method = +$("method").value + 1;
    $("prompt").textContent = item.prompt;
    $("gold").hidden = set().kind !== "reasoning";
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
