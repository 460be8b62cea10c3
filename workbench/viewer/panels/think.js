// Think: the thought word by word, its steps edited and gone on from, and the answer when there is less room to think.

const TOP = 2; // nats: the one scale of entropy, for every run
const HOWS = {
  change: ["Change it", "The model thinks on after your text. Beside it: the same, with the step as it was."],
  insert: ["Put a step before it", "The model thinks on after your text. Beside it: the same place, with nothing put in."],
  drop: ["Leave it out", "The other steps stay, and the model answers. Beside it: all steps stay."],
  stop: ["Stop after it", "The thought ends there, and the model answers. Beside it: the same place, and it thinks on."],
};
addPanel({
  name: "think",
  label: "Think",
  explain: "What the model wrote before it answered, word by word: how open each word was, what each step does, how much it still looked at the picture. Change a step and see whether the answer follows.",
  guard: `Entropy H<sub>t</sub> = −Σ p log p of the next word at temperature 1: 0 nats, one word was certain; 0.7, two were equally likely; 2, about seven.
    The kind of a step is told by cue words, as in a table: it says what a step looks like, not what it does inside.
    On the picture: attention on all visual tokens while the word was written; the dashed line is chance, the picture's share of all that could be read.
    An answer that changes with the step shows that the step is used; one that stays may also be repaired later on. The run beside each edit,
    which starts at the same place unedited, shows what starting again does by itself.`,
  skeleton: `<p class="note" data-part="think-none" hidden>This reply has no thought. Ask something that takes steps, such as “how many red circles are there?”, and
      its thought will stand here word by word, with steps that you can change.</p>
    <div data-part="think-all">
    <canvas class="wide" data-part="think-strip" tabindex="0" role="img"></canvas>
    <div data-part="think-legend"></div>
    <p class="note readout" data-part="think-word" aria-live="polite"></p>
    <p class="note" data-part="think-thirds"></p>
    <details data-part="think-table"><summary>Numbers as a table</summary><div class="scroll"></div></details>
    <h3>Its steps</h3>
    <div class="think-steps" role="group" aria-label="Steps of the thought" data-part="think-steps"></div>
    <p class="note acts" data-part="think-hint">Click a step to change it and go on from there.</p>
    <div class="acts"><div class="think-editor" data-part="think-editor" hidden>
      <div class="pick" role="group" aria-label="What to do with the step" data-part="think-hows"></div>
      <p class="note" data-part="think-how"></p>
      <textarea rows="2" data-part="think-text"></textarea>
      <div class="think-row"><button class="go" type="button" data-part="think-go">Continue</button></div>
    </div>
    <div class="think-row"><button type="button" data-part="think-stop" hidden>Stop</button><p class="note" data-part="think-note" aria-live="polite"></p></div></div>
    <div class="acts"><h3>Branches</h3>
    <div class="branches" data-part="think-branches"></div>
    <p class="note" data-part="think-empty">Each change becomes a branch here, beside the original.</p>
    <h3>With less room to think</h3>
    <div class="think-two">
      <div><div class="think-row"><button class="go" type="button" data-part="think-budgets">Ask again under limits</button></div>
        <p class="note">This question with its thought closed after 0, 4, 8, … tokens.</p>
        <div class="scroll think-rows" data-part="think-rows"></div></div>
      <div data-part="think-many"><div class="think-row"><button class="go" type="button" data-part="think-held"></button></div>
        <p class="note" data-part="think-curve-note"></p>
        <canvas class="wide" data-part="think-curve" role="img" hidden></canvas>
        <details data-part="think-curve-table" hidden><summary>Numbers as a table</summary><div class="scroll"></div></details></div>
    </div></div></div>`,
  open,
  draw,
});

// ---- the strip: three rows over the same words
const thoughtWords = () => run.words.at.map((_, w) => w).filter((w) => run.words.role[w] === "thought" && run.words.at[w] >= run.prompt_length);
const looked = (w) => (rowOf(w, "write") < 0 ? 0 : onPicture([rowOf(w, "write")], state.layer, state.head));
const evenly = (w) => pictureTokens() / run.words.at[w]; // attention spread over all that the row may read
function drawThought() {
  const words = thoughtWords(), seen = new Map(words.map((w) => [w, looked(w)])), onIt = (w) => seen.get(w);
  const canvas = part("think-strip"), left = 92, room = roomFor(canvas), tall = 42;
  const step = Math.min(48, (room - left) / words.length), [a, b] = span(), width = step > 4 ? step - 2 : step, end = left + step * words.length;
  const draw = sized(canvas, room, 126), tops = [50, 122];
  const labels = [["entropy", 18], [`0 to ${TOP} nats`, 34], ["kind of step", 66], ["on the picture", 90], ["0 to 100%", 106]];
  for (const [text, y] of labels) { draw.fillStyle = colour(/^0/.test(text) ? "faint" : "soft"); draw.fillText(text, 0, y); }
  draw.strokeStyle = colour("line");
  draw.beginPath();
  for (const base of tops) for (const y of [base + 0.5, base - tall + 0.5]) { draw.moveTo(left, y); draw.lineTo(end, y); }
  draw.stroke();
  words.forEach((w, i) => {
    const x = left + i * step + (step > 4 ? 1 : 0), entropy = run.words.entropy[w];
    draw.globalAlpha = w >= a && w <= b ? 1 : 0.6;
    draw.fillStyle = colour(entropy === null ? "rest" : "thought");
    if (entropy === null) draw.fillRect(x, tops[0] - 2, width, 2); // it was given, not chosen
    else draw.fillRect(x, tops[0] - tall * Math.min(1, entropy / TOP), width, tall * Math.min(1, entropy / TOP));
    if (entropy > TOP) { draw.fillStyle = colour("ink"); draw.fillRect(x, tops[0] - tall - 3, width, 2); }
    draw.fillStyle = colour("image");
    draw.fillRect(x, tops[1] - tall * onIt(w), width, tall * onIt(w));
    draw.globalAlpha = 1;
    draw.fillStyle = colour(`k-${kindOf(w) || "other"}`);
    draw.fillRect(left + i * step, 61, step + 0.6, 9);
  });
  draw.fillStyle = colour("panel"); // steps are parted
  for (const [first] of run.segments.slice(1)) draw.fillRect(Math.round(left + words.indexOf(first) * step) - 1, 60, 3, 11);
  draw.strokeStyle = colour("ink");
  draw.setLineDash([4, 3]);
  draw.beginPath();
  if (pictureTokens()) words.forEach((w, i) => { for (const x of [i, i + 1]) draw.lineTo(left + x * step, tops[1] - tall * evenly(w)); });
  draw.stroke();
  draw.setLineDash([]);
  frameSpan(draw, words, left, step, 3, 121);
  canvas.pick = pickWord(words, left, step);
  canvas.setAttribute("aria-label", `The thought, ${words.length} words: entropy, kind of step and attention on the picture of each. Left and right move the word.`);
  const told = (w) => (run.words.entropy[w] === null ? "given, not chosen" : `${run.words.entropy[w].toFixed(2)} nats`);
  const inside = words.filter((w) => w >= a && w <= b), average = (value) => inside.reduce((sum, w) => sum + value(w), 0) / inside.length;
  const here = inside.length === 1 ? `${quote(run.words.text[a])}: ${told(a)}, kind “${kindOf(a) || "other"}”` : `${inside.length} words: ${average((w) => run.words.entropy[w] ?? 0).toFixed(2)} nats a word`;
  say("think-word", !inside.length ? "Click a word of the thought." : pictureTokens() ? `${here}, ${percent(average(onIt))} on the picture; chance ${percent(average(evenly))}.` : `${here}.`);
  const thirds = [0, 1, 2].map((part) => words.filter((_, i) => Math.floor((3 * (i + 0.5)) / words.length) === part));
  const each = thirds.map((some) => (some.length ? `${percent(some.reduce((sum, w) => sum + onIt(w), 0) / some.length)} (chance ${percent(some.reduce((sum, w) => sum + evenly(w), 0) / some.length)})` : "no word"));
  say("think-thirds", pictureTokens() ? `Attention on the picture in the first, second and last third of the thought: ${each.join(", ")}.` : "");
  fillTable("think-table", ["word", "kind", "entropy (nats)", "on the picture", "chance"], () => words.map((w) =>
    [legible(run.words.text[w]), kindOf(w) || "other", run.words.entropy[w]?.toFixed(2) ?? "given", percent(onIt(w)), percent(evenly(w))]));
}
part("think-strip").onclick = (e) => select(part("think-strip").pick(e.offsetX), e.shiftKey);
part("think-strip").onkeydown = (e) => {
  const by = { ArrowRight: 1, ArrowLeft: -1 }[e.key], words = thoughtWords();
  if (!by) return;
  e.preventDefault();
  const at = words.indexOf(state.to);
  select(words[at < 0 ? 0 : Math.max(0, Math.min(words.length - 1, at + by))], e.shiftKey && at >= 0);
};

// ---- steps, and the one that is edited
let chosen = null, how = "change", working = null; // working: the branch or the table that is being made
const trees = []; // { root, branches, rows, curve }: the original of each question, and what was made of it
let tree = null;
const bare = (text) => text.trim().replace(/[,;]$/, "");
function buildSteps() {
  part("think-steps").replaceChildren(...stepTexts(run).map(([text, kind], k) => {
    const [from, to] = run.segments[k], button = makeButton("", () => { choose(k); set({ from, to }); });
    button.dataset.kind = kind;
    button.append(make("i", "", `${k + 1} · ${kind}`), bare(text));
    return button;
  }));
}
function choose(k, way = how) {
  [chosen, how] = [k, way];
  const text = part("think-text");
  part("think-editor").hidden = false;
  part("think-hint").hidden = true;
  say("think-how", HOWS[how][1]);
  text.hidden = how !== "change" && how !== "insert";
  text.value = how === "change" ? bare(stepTexts(run)[k][0]) : "";
  text.placeholder = how === "insert" ? "What the model should have thought first" : "";
  text.setAttribute("aria-label", how === "insert" ? `New step before step ${k + 1}` : `Step ${k + 1}, as the model should have thought it`);
  part("think-go").textContent = how === "drop" || how === "stop" ? "Answer now" : "Continue";
  drawSteps();
}
function drawSteps() {
  [...part("think-steps").children].forEach((button, k) => button.setAttribute("aria-pressed", k === chosen));
  for (const button of part("think-hows").children) button.setAttribute("aria-pressed", button.dataset.value === how);
}
choices("think-hows", Object.entries(HOWS).map(([name, [text]]) => [name, text]), (name) => choose(chosen, name));

// ---- asking the model, one thing at a time
function work(what, name, args, receive) {
  working = what;
  say("think-note", "Working…");
  act(name, args, ({ data, done, error }) => {
    if (data) receive(data, done);
    say("think-note", error || (done ? "" : data.note ? `${capital(data.note.replace("…", ""))}…` : "Working…"));
    if (error && what.pieces) what.tree.branches = what.tree.branches.filter((branch) => branch !== what);
    if (done || error) working = null;
    drawWork();
  });
  drawWork();
}
stops("think-stop");
part("think-go").onclick = () => {
  const titles = { change: "step # changed", insert: "a step put before step #", drop: "step # left out", stop: "stopped after step #" };
  const from = tree.branches.find((branch) => branch.payload?.id === run.id);
  tree.made = (tree.made || 0) + 1;
  const title = `${tree.made} · ${titles[how].replace("#", chosen + 1)}`;
  const branch = { tree, number: tree.made, title: title + (from ? `, from branch ${from.number}` : ""), pieces: [], branch: null, control: null };
  tree.branches.push(branch);
  work(branch, "think_edit", { step: chosen, how, text: part("think-text").value }, (data) => Object.assign(branch, data));
  part("think-branches").lastElementChild?.scrollIntoView({ block: "nearest", behavior: "smooth" });
};
part("think-budgets").onclick = () => {
  const own = tree;
  work({}, "think_budgets", {}, (data) => { if (data.rows) own.rows = data.rows; });
};
part("think-held").onclick = () => {
  const own = tree;
  work({}, "think_held_out", {}, (data) => { if (data.n) own.curve = data; });
};
function drawWork() {
  for (const name of ["think-go", "think-budgets", "think-held"]) part(name).disabled = Boolean(working);
  part("think-stop").hidden = !working;
  drawBranches();
  drawLess();
}

// ---- branches side by side
function verdict(right) {
  return right === null || right === undefined ? [] : [make("span", right ? "right" : "wrong", right ? " ✓ right" : " ✗ wrong")];
}
function said(answer, right) {
  const made = make("div", "said", answer || "no answer");
  made.append(...verdict(right));
  return made;
}
function path(pieces) {
  const made = make("div", "path");
  made.append(...pieces.map(([text, kind, how], i) => inKind(i ? text : text.trimStart(), kind, how)), pieces.length ? "" : "no thought");
  return made;
}
function finding({ branch, control }) {
  if (branch.same) return control?.same === false ? "The answer stayed, though starting again alone changes it." : "The answer stayed as it was.";
  if (!control || control.same === null) return "The answer is another one.";
  return control.same ? "The answer is another one; starting again without the edit keeps it." : "The answer is another one, but starting again without the edit changes it too.";
}
function card(title, payload, ...inside) {
  const made = make("article", "branch"), shown = payload && payload.id === run.id, row = make("div", "think-row");
  made.classList.toggle("shown", Boolean(shown));
  made.append(make("h4", "", title), ...inside, row);
  const focus = () => part("think-branches").querySelector(".shown button")?.focus();
  if (payload) {
    const button = makeButton(shown ? "Shown" : "Show", () => shown || show(payload).then(focus));
    button.title = "Makes it the run that every panel speaks of";
    button.setAttribute("aria-pressed", Boolean(shown));
    row.append(button);
  }
  return [made, row];
}
function drawBranches() {
  const { root, branches } = tree;
  const [original] = card("Original", root, path(stepTexts(root)), said(root.answer, root.truth?.right));
  part("think-empty").hidden = branches.length > 0;
  part("think-branches").replaceChildren(original, ...branches.map((one) => {
    const inside = [], { branch, control } = one;
    if (branch) inside.push(path(branch.pieces), said(branch.answer || "…", branch.right));
    if (branch && !branch.finished) inside.push(make("p", "", "Cut off: it was stopped, or reached the longest reply."));
    if (one.without?.length) inside.push(make("p", "", `Written without: ${one.without.join("; ")}.`));
    if (control) {
      const against = make("div", "against");
      against.append(make("p", "", "Not edited, from the same place:"), said(control.answer || "…", control.right));
      inside.push(against);
    }
    if (one.payload) inside.push(make("p", "finding", finding(one)));
    const [made, row] = card(one.title, one.payload, ...inside);
    if (one.payload) row.append(makeButton("Remove", () => {
      tree.branches = branches.filter((other) => other !== one);
      drawBranches();
      part("think-branches").querySelector("button").focus();
    }));
    return made;
  }));
}

// ---- less room to think
function drawLess() {
  const { rows, curve, root } = tree, limit = (budget) => (budget === null ? "no limit" : `${budget}`);
  part("think-rows").replaceChildren(...(rows?.length ? [table(["limit", "used", "answer", ""], rows.map((row) =>
    [limit(row.budget), row.tokens, row.answer || "none", row.right === null ? (row.same ? "as with no limit" : "another") : row.right ? "✓ right" : "✗ wrong"]), (i) => (rows[i].right ? "in" : ""))] : []));
  const family = root.truth?.family;
  part("think-many").hidden = !family;
  say("think-held", `Measure on 20 “${family}” scenes`);
  say("think-curve-note", curve ? `${curve.n} held-out “${curve.family}” scenes, greedy. Lines: 95% interval. Dashed: the best constant answer, ${percent(curve.chance)}.` : "How often the answer is right under each limit, on scenes that the model was never trained on.");
  for (const name of ["think-curve", "think-curve-table"]) part(name).hidden = !curve;
  if (curve) drawCurve(curve);
}
function drawCurve({ budgets, accuracy, low, high, within, chance, n }) {
  const canvas = part("think-curve"), room = roomFor(canvas), left = 34, tall = 120, base = 130, step = (room - left) / accuracy.length;
  const draw = sized(canvas, room, 166), y = (share) => base - tall * share, names = [...budgets.map(String), "no limit"];
  draw.fillStyle = colour("soft");
  for (const share of [0, 0.5, 1]) draw.fillText(`${100 * share}%`, 0, y(share));
  draw.fillText("limit on the thought, in tokens", left, 160);
  draw.strokeStyle = colour("line");
  draw.beginPath();
  for (const share of [0, 0.5, 1]) { draw.moveTo(left, y(share) + 0.5); draw.lineTo(room, y(share) + 0.5); }
  draw.stroke();
  const x = (i) => left + (i + 0.5) * step;
  draw.strokeStyle = colour("ink");
  draw.setLineDash([4, 3]);
  draw.beginPath();
  draw.moveTo(left, y(chance));
  draw.lineTo(room, y(chance));
  draw.stroke();
  draw.setLineDash([]);
  draw.strokeStyle = draw.fillStyle = colour("accent");
  draw.lineWidth = 2;
  draw.beginPath();
  accuracy.forEach((share, i) => { draw.moveTo(x(i), y(low[i])); draw.lineTo(x(i), y(high[i])); });
  accuracy.forEach((share, i) => (i ? draw.lineTo(x(i), y(share)) : draw.moveTo(x(i), y(share))));
  draw.stroke();
  accuracy.forEach((share, i) => { draw.beginPath(); draw.arc(x(i), y(share), 4, 0, 7); draw.fill(); });
  draw.fillStyle = colour("soft");
  draw.textAlign = "center";
  names.forEach((name, i) => draw.fillText(name, x(i), base + 14));
  canvas.setAttribute("aria-label", `Right answers of ${n} scenes: ${names.map((name, i) => `${name}: ${percent(accuracy[i])}`).join(", ")}`);
  fillTable("think-curve-table", ["limit", "right", "95% interval", "thoughts that fit"], () => names.map((name, i) =>
    [name, percent(accuracy[i]), `${percent(low[i])} to ${percent(high[i])}`, percent(within[i] ?? 1)]));
}

function open() {
  const holds = ({ root, branches }) => root.id === run.id || branches.some((branch) => branch.payload?.id === run.id);
  tree = run.id ? trees.find(holds) : null;
  if (!tree) {
    trees.push((tree = { root: finished, branches: [], rows: null, curve: null }));
    if (trees.length > 4) trees.shift();
  }
  chosen = null;
  part("think-editor").hidden = true;
  part("think-hint").hidden = false;
  const none = !run.segments.length;
  part("think-none").hidden = !none;
  part("think-all").hidden = none;
  if (none) return;
  part("think-legend").replaceChildren(kindLegend(run.segments.map(([, , kind]) => kind)));
  buildSteps();
  drawWork();
}
function draw() {
  if (!run.segments.length) return;
  drawThought();
  drawSteps();
  drawLess();
}
