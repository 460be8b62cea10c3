// The words of the conversation, and which of them are selected.

const TURNS = ["earlier", "question", "thought", "answer"];
function isTemplate(word) {
  const role = run.words.role[word];
  return role === "special" || role === "system";
}
const isShown = (word) => !isTemplate(word) || !frame.classList.contains("hide-template");
const choosable = () => run.words.at.map((_, w) => w).filter((w) => rowOf(w) >= 0 && isShown(w));
function describeSpan() {
  const [a, b] = span();
  if (a === b) return quote(run.words.text[a]);
  const text = run.words.text.slice(a, b + 1).filter((_, i) => isShown(a + i)).join("").trim();
  return quote(text.length > 40 ? `${text.slice(0, 38)}…` : text);
}
function moment() {
  const [a] = span();
  return run.words.at[a] < run.prompt_length || state.side === "read" ? "reading" : "writing";
}
function buildStrip() {
  const strip = part("strip"), turns = {};
  strip.replaceChildren();
  for (const name of TURNS) {
    const turn = make("div", `turn ${name}`), id = `label-${name}`;
    turn.setAttribute("role", "group");
    turn.setAttribute("aria-labelledby", id);
    const label = Object.assign(make("span", "", name), { id });
    turns[name] = make("div");
    turn.append(label, turns[name]);
    strip.append(turn);
  }
  let turn = "question", before = "";
  run.words.role.forEach((role, w) => {
    turn = run.words.at[w] < run.earlier ? "earlier" : role === "thought" || role === "answer" ? role : turn === "earlier" ? "question" : turn;
    const text = run.words.text[w], tok = make("span", "tok");
    // the blank before a word stays outside it, so that the mark of the selection hugs the word
    const blank = /^ \S/.test(text);
    tok.textContent = blank ? text.slice(1) : text.replace(/\n/g, "⏎\n") || "∅";
    tok.classList.toggle("blank", !text.trim());
    tok.classList.toggle("template", isTemplate(w));
    if (turn === "earlier" && !isTemplate(w)) { // a line for each question, its answer behind it
      if (role === "user" && before && before !== "user") turns.earlier.append(make("br"));
      tok.classList.add(`was-${role}`);
      before = role;
    }
    tok.classList.toggle("off", rowOf(w, "read") < 0 && rowOf(w, "write") < 0);
    tok.id = `word-${w}`;
    tok.dataset.word = w;
    if (kindOf(w)) tok.dataset.kind = kindOf(w);
    tok.setAttribute("role", "option");
    const begun = turns[turn].querySelector(".tok:not(.template)");
    turns[turn].append(blank && begun ? " " : "", tok);
  });
  for (const [name, box] of Object.entries(turns)) {
    const empty = ![...box.children].some((tok) => !tok.classList.contains("template"));
    box.parentElement.hidden = empty && (name === "thought" || name === "earlier");
    if (empty && name === "answer") {
      box.parentElement.classList.add("empty");
      box.prepend(make("span", "", "none was written"));
    }
  }
  if (run.segments.length) turns.thought.after(kindLegend(run.segments.map(([, , kind]) => kind)));
  turns.answer.classList.toggle("long", run.answer.length > 60);
  if (run.truth && (run.answer || run.finished)) {
    const { right, answer } = run.truth;
    const text = right ? "✓ right, as the scene was drawn" : `✗ wrong, the scene says: ${answer}`;
    turns.answer.parentElement.append(make("div", `verdict ${right ? "right" : "wrong"}`, text));
  }
}
function wordAround(word) { // the first and last of the pieces that make one word of the text
  const { text, role } = run.words, joins = (w) => role[w] === role[w - 1] && !/^\s/.test(text[w]) && /[\p{L}\p{N}]$/u.test(text[w - 1]) && /^[\p{L}\p{N}]/u.test(text[w]);
  let [a, b] = [word, word];
  while (a > 0 && joins(a)) a--;
  while (b + 1 < text.length && joins(b + 1)) b++;
  return [a, b];
}
// What the words are underlined with: how much they looked at the patch, whether the expert served them, or their expert.
function underlines() {
  const token = run.pictures.length ? shownToken() : null, cell = shownExpert(), layers = run.model.moe_layers;
  if (token !== null && chosenMap() !== "experts") {
    const g = geometry(), looked = attentionTo(g.first + token), top = scaleTop(), row = Math.floor(token / g.across) + 1;
    return {
      ink: (r) => ramp(0.1 + 0.9 * Math.min(1, looked[r] / top)),
      text: (r) => percent(looked[r]),
      note: `Underlined: how much each word looked at row ${row}, column ${(token % g.across) + 1}, ${layersHeads()}.`,
      ends: ["0", `${percent(top)} or more`],
    };
  }
  if (cell) {
    const [l, e] = cell, rows = choosable().map((w) => rowOf(w)), count = rows.filter((r) => rowExperts(l, r).includes(e)).length;
    return {
      ink: (r) => (rowExperts(l, r).includes(e) ? colour("accent") : null),
      text: (r) => (rowExperts(l, r).includes(e) ? "served by it" : "not served by it"),
      note: `Underlined: the ${count} of ${rows.length} words that chose expert ${e} in layer ${layers[l]}.`,
    };
  }
  if (chosenMap() !== "experts") return null;
  return {
    ink: (r) => expertInk(state.tableLayer, firstExpert(state.tableLayer, r)),
    text: (r) => `expert ${firstExpert(state.tableLayer, r)}`,
    note: `Underlined in the colour of the expert with the largest weight, layer ${layers[state.tableLayer]}.`,
  };
}
function drawStrip() {
  const [a, b] = span(), lines = underlines();
  for (const tok of part("strip").querySelectorAll(".tok")) {
    const on = +tok.dataset.word >= a && +tok.dataset.word <= b, row = rowOf(+tok.dataset.word);
    tok.classList.toggle("sel", on);
    tok.setAttribute("aria-selected", on);
    const ink = lines && row >= 0 ? lines.ink(row) : null;
    tok.classList.toggle("lined", Boolean(ink));
    tok.style.setProperty("--ink-line", ink || "transparent");
    tok.title = lines && row >= 0 ? lines.text(row) : "";
  }
  part("strip").setAttribute("aria-activedescendant", `word-${state.to}`);
  part("strip-scale").hidden = !lines?.ends;
  say("strip-note", lines?.note || "");
  part("strip-note").hidden = !lines;
  if (lines?.ends) {
    part("strip-bar").style.background = gradient();
    for (const [end, text] of [["strip-low", lines.ends[0]], ["strip-top", lines.ends[1]]]) say(end, text);
  }
  part("looked-table").hidden = !lines;
  if (lines) fillTable("looked-table", ["word", lines.ends ? "on this patch" : "expert"], () => choosable().map((w) => [legible(run.words.text[w]), lines.text(rowOf(w))]));
}
