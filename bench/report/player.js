// The step player: shows one generation step by step, from the JSON beside it. No library.
(function () {
  "use strict";
  const source = document.getElementById("player-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const el = (id) => document.getElementById(id);
  const HALF = "\ufffd";
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  let run = data.runs[data.first];
  let at = 0;
  let timer = null;

  const recordOf = (r) => data.records[r.record];
  const method = (r) => recordOf(r).decoders[r.decoder];

  function piece(token) {
    const text = recordOf(run).pieces[token];
    return !text || text.includes(HALF) ? "#" + token : text;
  }
  function visible(token) {
    return piece(token).replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\r/g, "␍");
  }
  function make(tag, className, text) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }
  function count(n, word) {
    return n + " " + word + (n === 1 ? "" : "s");
  }

  function chip(kind, text, says) {
    const item = make("li", "chip " + kind);
    item.append(make("span", "token " + kind, text), make("small", "", says));
    return item;
  }

  // --- what a step did --------------------------------------------------------------------------

  function checked(step, before) {
    const chips = [];
    if (at === 0) {
      chips.push(chip("first", visible(step.c[0]), "first token"));
      return chips;
    }
    if (step.n && before !== undefined) chips.push(chip("past", visible(before), "final already"));
    for (let i = 0; i < step.n; i++) {
      const right = i < step.a;
      const known = step.d ? step.d[i] : right ? step.c[i] : undefined;
      const kind = right ? "accepted" : i === step.a ? "rejected" : "behind";
      const says = right ? "✓ accepted" : i === step.a ? "✗ rejected" : "dropped";
      chips.push(chip(kind, known === undefined ? "?" : visible(known), says));
    }
    if (step.c.length > step.a) {
      chips.push(chip("own", visible(step.c[step.c.length - 1]), step.a < step.n ? "own: instead" : "own: next"));
    }
    return chips;
  }

  function sentence(step) {
    if (at === 0) {
      return "Prefill: the network reads the prompt (" + count(run.prompt, "token") + ") and writes the first token.";
    }
    if (!step.c.length) return "Step " + at + ": nothing became final in this forward.";
    const own = step.c[step.c.length - 1];
    const gain = " " + count(step.c.length, "token") + " final in " + count(step.f, "forward") + ".";
    if (!step.n) return "Step " + at + ": nothing to check. The network writes “" + visible(own) + "”." + gain;
    const verdict =
      step.a === step.n ? "all " + step.n + " guesses were right"
      : step.a === 0 ? "the first guess was wrong, so all " + step.n + " are dropped"
      : step.a + " of " + step.n + " guesses were right, the rest is dropped";
    return "Step " + at + ": " + verdict + "; the network adds its own “" + visible(own) + "”." + gain;
  }

  // --- the blocks of guesses --------------------------------------------------------------------

  function showBlocks(step, following) {
    const box = el("blocks");
    box.replaceChildren();
    const kind = method(run);
    const k = kind.params.block_len;
    const drafts = run.steps.some((s) => s.n);
    el("guess").hidden = !drafts;
    if (!drafts) return;
    const single = kind.name !== "tidar" || at === 0;
    const outcomes = step.o ? step.o[0] : single ? [] : Array.from({ length: k }, (_, i) => i + 1);
    const chosen = step.o ? step.o[1] : step.c.length - 1;
    el("guess-what").textContent =
      kind.name === "tidar"
        ? at === 0
          ? "the first tokens behind the prompt, in the same forward"
          : "in the same forward: " + count(outcomes.length, "block") + " of " + k + ", one for each way the check can end"
        : kind.name === "tidar_two_forward" ? "in a second forward, behind what was kept" : "the next tokens";
    box.hidden = !outcomes.length;
    outcomes.forEach((outcome, i) => {
      const row = make("div", "block" + (i === chosen ? " chosen" : ""));
      row.append(make("span", "if", "if " + outcome + (outcome === 1 ? " becomes final" : " become final")));
      const cells = make("span", "cells");
      for (let j = 0; j < k; j++) cells.append(make("i"));
      row.append(cells, make("span", "fate", i === chosen ? "← happened" : "thrown away"));
      box.append(row);
    });
    box.setAttribute(
      "aria-label",
      outcomes.length + " blocks of " + k + " guesses; " +
        (chosen >= 0 && outcomes.length ? "the block for " + outcomes[chosen] + " final tokens is used, the others are thrown away" : "none is used")
    );
    const list = el("next");
    list.replaceChildren();
    let says = "Draft for the next step:";
    if (!following) says = "The output ended here: the next draft is not needed.";
    else if (!following.n) says = "No draft for the next step.";
    else if (!following.d) says = "Draft for the next step: " + count(following.n, "token") + " (this record keeps their number, not the tokens).";
    else for (const token of following.d) list.append(chip("guess", visible(token), "guess"));
    if (list.children.length) list.prepend(chip("past", visible(step.c[step.c.length - 1]), "final already"));
    el("next-says").textContent = says;
  }

  // --- text and race ----------------------------------------------------------------------------

  function showText() {
    const box = el("text");
    box.replaceChildren();
    let place = 0;
    run.steps.slice(0, at + 1).forEach((step, index) => {
      step.c.forEach((token, i) => {
        const kind = index === 0 ? "first" : i < step.a ? "accepted" : "own";
        const past = place >= run.kept ? " cut" : "";
        const node = make("span", "token " + kind + past + (index === at ? " new" : ""), piece(token));
        if (past) node.title = "behind the end of the output: thrown away";
        box.append(node);
        place += 1;
      });
    });
    box.scrollTop = box.scrollHeight;
  }

  function after(r, forwards) {
    let tokens = 0;
    let used = 0;
    for (const [i, step] of r.steps.entries()) {
      if (i > 0 && used + step.f > forwards) break;
      if (i > 0) used += step.f;
      tokens += step.c.length;
    }
    return Math.min(tokens, r.kept);
  }

  function showRace() {
    const box = el("race");
    box.replaceChildren();
    const forwards = run.steps.slice(1, at + 1).reduce((sum, step) => sum + step.f, 0);
    const rivals = data.runs.filter(
      (r) => r.record === run.record && r.task === run.task && r.problem === run.problem
    );
    const longest = Math.max(...rivals.map((r) => r.kept));
    for (const r of rivals) {
      const tokens = after(r, forwards);
      const row = make("div", "lane" + (r === run ? " mine" : ""));
      row.append(make("span", "who", r.decoder));
      const track = make("span", "track");
      const bar = make("span", "fill");
      bar.style.width = (100 * tokens) / longest + "%";
      track.append(bar);
      row.append(track, make("span", "tokens", count(tokens, "token") + (tokens === r.kept ? ", done" : "")));
      box.append(row);
    }
    const mine = after(run, forwards);
    const noise = recordOf(run).tier === "random"; // no T/NFE of random weights
    const rate = noise ? "random weights, so a rate means nothing" : forwards ? ((mine - 1) / forwards).toFixed(2) + " tokens per forward so far" : "only the prefill so far";
    box.prepend(make("p", "quiet", count(forwards, "decode forward") + "; " + rate + "."));
  }

  // --- drawing and moving -----------------------------------------------------------------------

  function draw() {
    const step = run.steps[at];
    const previous = run.steps[at - 1];
    const last = run.steps.length - 1;
    el("check-what").textContent =
      at === 0 ? "the prompt is read"
      : step.n ? "what was guessed one step ago" : "nothing: this decoder made no guess";
    el("draft").replaceChildren(...checked(step, previous && previous.c[previous.c.length - 1]));
    showBlocks(step, run.steps[at + 1]);
    showText();
    showRace();
    el("said").textContent = sentence(step) + (at === last ? " End of the output (" + run.finish + ")." : "");
    const slider = el("slider");
    slider.max = last;
    slider.value = at;
    slider.setAttribute("aria-valuetext", "step " + at + " of " + last);
    el("where").textContent = at + " / " + last;
    // Not `disabled`: a button that loses the focus would take the arrow keys with it.
    for (const id of ["to-start", "step-back"]) el(id).setAttribute("aria-disabled", at === 0);
    for (const id of ["to-end", "step-on"]) el(id).setAttribute("aria-disabled", at === last);
  }
  function go(to) {
    at = Math.max(0, Math.min(run.steps.length - 1, to));
    draw();
  }
  function pause() {
    clearInterval(timer);
    timer = null;
    el("play").setAttribute("aria-pressed", "false");
    el("play").innerHTML = '<span aria-hidden="true">▶</span> play';
    el("said").setAttribute("aria-live", "polite");
  }
  function play() {
    if (at === run.steps.length - 1) go(0);
    // A screen reader is not to read every step of a running player.
    el("said").setAttribute("aria-live", "off");
    el("play").setAttribute("aria-pressed", "true");
    el("play").innerHTML = '<span aria-hidden="true">‖</span> pause';
    timer = setInterval(() => {
      if (at >= run.steps.length - 1) return pause();
      go(at + 1);
    }, calm.matches ? 2000 : 900);
  }
  const toggle = () => (timer === null ? play() : pause());
  function move(to) {
    pause();
    go(to);
  }

  // --- choosing ---------------------------------------------------------------------------------

  const nameOf = (r) =>
    (data.records.length > 1 ? recordOf(r).name + " · " : "") + r.task + " · " + r.problem;

  function fill(select, names, value) {
    select.replaceChildren(
      ...names.map((name) => {
        const option = make("option", "", name);
        option.selected = name === value;
        return option;
      })
    );
  }
  function choose(problem, decoder) {
    const offered = data.runs.filter((r) => nameOf(r) === problem);
    run = offered.find((r) => r.decoder === decoder) || offered[0];
    fill(el("pick-problem"), [...new Set(data.runs.map(nameOf))], nameOf(run));
    fill(el("pick-decoder"), offered.map((r) => r.decoder), run.decoder);
    move(Math.min(1, run.steps.length - 1));
  }

  el("pick-problem").addEventListener("change", (e) => choose(e.target.value, run.decoder));
  el("pick-decoder").addEventListener("change", (e) => choose(nameOf(run), e.target.value));
  el("slider").addEventListener("input", (e) => move(Number(e.target.value)));
  el("to-start").addEventListener("click", () => move(0));
  el("step-back").addEventListener("click", () => move(at - 1));
  el("step-on").addEventListener("click", () => move(at + 1));
  el("to-end").addEventListener("click", () => move(run.steps.length - 1));
  el("play").addEventListener("click", toggle);
  el("stepper").addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.target.matches("select, #text")) return; // their own keys
    const steps = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: run.steps.length - 1 };
    if (event.key in steps) move(steps[event.key]);
    else if (event.key === " " && !event.target.matches("button")) toggle();
    else return;
    event.preventDefault();
  });
  el("stepper").hidden = false;
  choose(nameOf(run), run.decoder);
})();
