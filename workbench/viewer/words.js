// The words of the conversation, and which of them are selected.

const TURNS = { question: "question", thought: "thought", answer: "answer" };
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
  for (const name of Object.values(TURNS)) {
    const turn = make("div", `turn ${name}`), id = `label-${name}`;
    turn.setAttribute("role", "group");
    turn.setAttribute("aria-labelledby", id);
    const label = Object.assign(make("span", "", name), { id });
    turns[name] = make("div");
    turn.append(label, turns[name]);
    strip.append(turn);
  }
  let turn = "question";
  run.words.role.forEach((role, w) => {
    if (role === "thought" || role === "answer") turn = role;
    const text = run.words.text[w], tok = make("span", "tok");
    // the blank before a word stays outside it, so that the mark of the selection hugs the word
    const blank = /^ \S/.test(text);
    tok.textContent = blank ? text.slice(1) : text.replace(/\n/g, "⏎\n") || "∅";
    tok.classList.toggle("blank", !text.trim());
    tok.classList.toggle("template", isTemplate(w));
    tok.classList.toggle("off", rowOf(w, "read") < 0 && rowOf(w, "write") < 0);
    tok.id = `word-${w}`;
    tok.dataset.word = w;
    tok.setAttribute("role", "option");
    const begun = turns[turn].querySelector(".tok:not(.template)");
    turns[turn].append(blank && begun ? " " : "", tok);
  });
  for (const [name, box] of Object.entries(turns)) {
    const empty = ![...box.children].some((tok) => !tok.classList.contains("template"));
    box.parentElement.hidden = empty && name === "thought";
    if (empty && name === "answer") {
      box.parentElement.classList.add("empty");
      box.prepend(make("span", "", "none was written"));
    }
  }
  turns.answer.classList.toggle("long", run.answer.length > 60);
  if (run.truth && (run.answer || run.finished)) {
    const { right, answer } = run.truth;
    const text = right ? "✓ right, as the scene was drawn" : `✗ wrong, the scene says: ${answer}`;
    turns.answer.parentElement.append(make("div", `verdict ${right ? "right" : "wrong"}`, text));
  }
}
function drawStrip() {
  const [a, b] = span();
  for (const tok of part("strip").querySelectorAll(".tok")) {
    const on = +tok.dataset.word >= a && +tok.dataset.word <= b;
    tok.classList.toggle("sel", on);
    tok.setAttribute("aria-selected", on);
  }
  part("strip").setAttribute("aria-activedescendant", `word-${state.to}`);
}
