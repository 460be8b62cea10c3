// Compare: another run beside this one, linked by role and place in the role.

addPanel({
  name: "compare",
  label: "Compare",
  explain: "Another run beside this one: another picture, other weights, or the same with an edit. The chosen word is looked up in both, by who speaks and which of their words it is.",
  guard: "Routing agreement of a layer: mean over tokens of |S<sub>A</sub> ∩ S<sub>B</sub>| / K, with S the K experts of a token; two random choices agree on K/E. Tokens are compared while both runs say the same, role by role: after the first other word they are no longer about the same thing. A difference between two runs is one example; a claim needs many, with a control.",
  skeleton: `<div class="row"><label class="acts">Other run <select data-part="compare-run" aria-label="Other run"></select></label>
      <button data-part="compare-open" type="button">Open a file…</button>
      <button class="acts" data-part="compare-picture" type="button">Ask another picture…</button>
      <button class="acts" data-part="compare-weights" type="button" hidden>Ask the other weights</button>
      <button class="acts" data-part="compare-stop" type="button" hidden>Stop</button></div>
    <input type="file" data-part="compare-file" accept=".run,.html" aria-label="Run or viewer file" hidden>
    <input type="file" data-part="compare-image" accept="image/*" aria-label="Another picture" hidden>
    <p class="note" data-part="compare-note" aria-live="polite"></p>
    <p class="say" data-part="compare-empty">Choose a second run, and both pictures, answers and experts appear here side by side.</p>
    <div data-part="compare-both" hidden>
      <div class="facts" data-part="compare-facts"></div><p class="note" data-part="compare-differs"></p>
      <h3>Where both looked, at the linked word</h3>
      <div class="pair"><div><h4 data-part="compare-a-word"></h4><div class="stage"><canvas data-part="compare-a-map" role="img"></canvas></div></div>
        <div><h4 data-part="compare-b-word"></h4><div class="stage"><canvas data-part="compare-b-map" role="img"></canvas></div></div></div>
      <div class="scale"><span>0</span><div class="bar" data-part="compare-bar"></div><span data-part="compare-top"></span></div>
      <h3>Words, those that differ marked</h3>
      <div class="pair"><div class="told" data-part="compare-a-told" aria-label="Words of this run"></div><div class="told" data-part="compare-b-told" aria-label="Words of the other run"></div></div>
      <h3>Experts of the linked words</h3>
      <div class="triple"><div><h4>this run</h4><canvas data-part="compare-a-experts" role="img"></canvas></div><div><h4>other run</h4><canvas data-part="compare-b-experts" role="img"></canvas></div>
        <div><h4>other minus this</h4><canvas data-part="compare-c-experts" role="img"></canvas></div></div>
      <div class="pair"><div class="scale"><span>0</span><div class="bar" data-part="compare-share-bar"></div><span>100% of the words</span></div><div class="scale"><span>−100%</span><div class="bar" data-part="compare-change-bar"></div><span>+100%</span></div></div>
      <details data-part="compare-share-table"><summary>Numbers as a table</summary><div class="scroll"></div></details>
      <h3>How far both chose the same experts</h3><p class="note" data-part="compare-chance"></p><div data-part="compare-same"></div>
    </div>`,
  open() { // the other run stays while this one changes: that is how two settings are compared
    compared.listed = null;
    if (compared.other?.id && compared.other.id === run.id) compared.other = null;
    say("compare-note", "");
  },
  draw() {
    if (canAct && compared.listed !== run.id) listRuns();
    drawCompared();
  },
});
const compared = { other: null, listed: null };

function listRuns() {
  compared.listed = run.id;
  act("runs", {}, ({ data }) => {
    if (!data?.runs) return;
    const others = data.runs.filter((one) => one.id !== run.id);
    const label = (one) => `${one.id}: ${short(one.question, 34)} → ${short(one.answer || "no answer", 18)} · ${one.weights}${one.edits.length ? ` · ${short(one.edits.join("; "), 40)}` : ""}`;
    options("compare-run", ["", ...others.map((one) => one.id)], [others.length ? "choose…" : "there is none yet: ask a second question", ...others.map(label)]);
    part("compare-run").value = compared.other?.id && others.some((one) => one.id === compared.other.id) ? compared.other.id : "";
    part("compare-weights").hidden = !data.against;
    part("compare-weights").title = data.against;
  });
}
async function compareWith(payload) {
  const [opened, loaded] = await Promise.all([open(payload), images(payload)]);
  compared.other = { ...opened, images: loaded };
  compared.listed = null;
  if (run?.kind === "run") draw();
}
part("compare-run").onchange = (e) => {
  const id = e.target.value;
  if (id) acting(e.target, part("compare-note"), "show_run", { id }, handed(compareWith));
};
choosesFile("compare-open", "compare-file", (file) => openFile(file, part("compare-open"), part("compare-note"), compareWith));
choosesFile("compare-picture", "compare-image", async (file) => {
  const path = await uploaded(file, part("compare-note"));
  if (path) askAgain("compare-picture", "ask_other", { path });
});
part("compare-weights").onclick = () => askAgain("compare-weights", "ask_against", {});
stops("compare-stop");
const askAgain = (button, name, args) => acting(part(button), part("compare-note"), name, args, handed(compareWith), part("compare-stop"));

// ---- both runs
// All numbers of the viewer speak of `run`; here the same functions speak of another one for a moment.
function within(one, compute) {
  const kept = run, { layer, head, picture } = state, fits = (choice, n) => (choice === "all" || choice < n ? choice : "all");
  run = one;
  Object.assign(state, { layer: fits(layer, one.mass.shape[0]), head: fits(head, one.mass.shape[1]), picture: Math.max(0, Math.min(picture, one.pictures.length - 1)) });
  try { return compute(); } finally {
    run = kept;
    Object.assign(state, { layer, head, picture });
  }
}
const spoken = (one, role) => one.words.role.map((r, w) => [r, w]).filter(([r, w]) => r === role && one.words.at[w] >= one.earlier).map(([, w]) => w);
function linkedWord(word) { // the other run's word for one of this run's, or -1
  const role = run.words.role[word], place = spoken(run, role).indexOf(word);
  return place < 0 ? -1 : spoken(compared.other, role)[place] ?? -1;
}
const linkedWords = () => selectedWords().map(linkedWord).filter((w) => w >= 0);
function sure(one) { // probability of the whole answer as it was written
  const logs = spoken(one, "answer").filter((w) => one.words.at[w] >= one.prompt_length).map((w) => one.words.logprob[w]);
  return logs.length && logs.every((v) => v !== null) ? Math.exp(logs.reduce((sum, v) => sum + v, 0)) : null;
}
function facts(one, words) {
  const shown = (v) => (v === null ? "not known" : percent(v)), first = words[0], log = words.length === 1 ? one.words.logprob[first] : null;
  return { question: one.question, answer: one.answer || "none", "sure of the answer": shown(sure(one)), "sure of the linked word": words.length === 1 && log !== null ? percent(Math.exp(log)) : "–",
    "on the picture": words.length ? percent(within(one, () => onPicture(rowsOf(words), state.layer, state.head))) : "–",
    "words of the thought": `${spoken(one, "thought").length}`, weights: one.model.name, edits: (one.edits || []).join("; ") || "none" };
}
function differing() {
  const [a, b] = [run, compared.other], found = [];
  const unlike = (name, x, y) => { if (JSON.stringify(x) !== JSON.stringify(y)) found.push(name); };
  unlike("the question", a.question, b.question);
  unlike("the pictures", a.pictures.map((one) => one.src), b.pictures.map((one) => one.src));
  unlike("the weights", a.model.versions.weights, b.model.versions.weights);
  unlike("the number format or device", [a.model.dtype, a.model.device], [b.model.dtype, b.model.device]);
  unlike("the edits", a.edits, b.edits);
  for (const name of ["seed", "temperature", "thought_budget", "max_new_tokens"]) unlike(name.replaceAll("_", " "), a.settings[name], b.settings[name]);
  return found;
}
function drawCompared() {
  const { other } = compared, both = Boolean(other && run.kind === "run");
  part("compare-both").hidden = !both;
  part("compare-empty").hidden = both;
  if (!both) return;
  const mine = selectedWords().filter((w) => rowOf(w) >= 0), theirs = linkedWords();
  const told = [facts(run, mine), facts(other, theirs)];
  part("compare-facts").replaceChildren(table(["", "this run", "other run"], Object.keys(told[0]).map((name) => [name, told[0][name], told[1][name]])));
  const unlike = differing();
  say("compare-differs", unlike.length ? `They differ in ${unlike.join(", ")}.` : "Both were asked the same of the same weights.");
  drawMaps(mine, theirs);
  drawTold();
  drawBothExperts(mine, theirs);
  drawAgreement();
}
function drawMaps(mine, theirs) {
  const pair = [["a", run, mine], ["b", compared.other, theirs]], top = Math.max(...pair.map(([, one]) => within(one, scaleTop)));
  for (const [name, one, words] of pair) {
    const canvas = part(`compare-${name}-map`), text = words.length ? quote(words.map((w) => one.words.text[w]).join("")) : "no such word";
    say(`compare-${name}-word`, `${name === "a" ? "this run" : "other run"}: ${short(text, 40)}`);
    canvas.parentElement.hidden = !one.pictures.length;
    if (one.pictures.length) within(one, () => paintMap(canvas, rowsOf(words), top, text));
  }
  part("compare-bar").style.background = gradient();
  say("compare-top", `${percent(top)} or more of a word's attention, one scale for both`);
}
function paintMap(canvas, rows, top, text) {
  const { draw, g, scale, side, width, height } = pictureCanvas(canvas, roomFor(canvas), 260);
  drawImage(draw, g, scale, PALE);
  drawVeil(draw, width, height);
  const values = ofPicture(mean(run.attention, rows, state.layer, state.head));
  if (rows.length) values.forEach((v, token) => {
    draw.fillStyle = heatInk(Math.min(1, v / top));
    draw.fillRect(...boxOf(token, g.across, side));
  });
  drawGrid(draw, g, scale);
  drawClick(draw, g, scale);
  const best = values.reduce((most, v, i, all) => (v > all[most] ? i : most), 0);
  canvas.setAttribute("aria-label", `Attention of ${text}: ${rows.length ? `most, ${percent(values[best])}, on ${placeOf(best, g)}` : "none"}`);
}
function unlikeWords(a, b) { // words of one list that are not in a longest common sequence with the other: [of a, of b]
  const n = b.length + 1, best = new Uint16Array((a.length + 1) * n);
  for (let i = a.length - 1; i >= 0; i--) for (let j = b.length - 1; j >= 0; j--) best[i * n + j] = a[i] === b[j] ? best[(i + 1) * n + j + 1] + 1 : Math.max(best[(i + 1) * n + j], best[i * n + j + 1]);
  const left = new Set(), right = new Set();
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) { i++; j++; } else if (j >= b.length || (i < a.length && best[(i + 1) * n + j] >= best[i * n + j + 1])) left.add(i++);
    else right.add(j++);
  }
  return [left, right];
}
function drawTold() {
  const boxes = ["a", "b"].map((name) => part(`compare-${name}-told`)), runs = [run, compared.other], linked = new Set(linkedWords()), [from, to] = span();
  boxes.forEach((box) => box.replaceChildren());
  for (const role of ["user", "thought", "answer"]) {
    const words = runs.map((one) => spoken(one, role)), unlike = unlikeWords(...words.map((list, k) => list.map((w) => runs[k].words.text[w])));
    boxes.forEach((box, k) => {
      if (!words[k].length) return;
      box.append(make("span", "label", role === "user" ? "question" : role));
      words[k].forEach((w, place) => {
        const text = runs[k].words.text[w], tok = make("span", `tok${unlike[k].has(place) ? " unlike" : ""}`, text.replace(/^ (?=\S)/, ""));
        if ((k === 0 && w >= from && w <= to) || (k === 1 && linked.has(w))) tok.classList.add("sel");
        const target = k === 0 ? w : words[0][place];
        if (target !== undefined) tok.onclick = () => select(target);
        box.append(/^ \S/.test(text) && place ? " " : "", tok);
      });
    });
  }
}

// ---- experts
const changeInk = (v) => // less is blue, more is brown
  `color-mix(in srgb, ${v < 0 ? "#2166ac" : "#b2560d"} ${Math.round(100 * Math.min(1, Math.abs(v)))}%, ${colour("wash")})`;
const comparable = () => ["experts", "top_k", "moe_layers"].every((name) => JSON.stringify(run.model[name]) === JSON.stringify(compared.other.model[name]));
function drawBothExperts(mine, theirs) {
  const { other } = compared, shares = [[run, mine], [other, theirs]].map(([one, words]) => within(one, () => expertShares(rowsOf(words))));
  const alike = comparable(), change = alike && mine.length && theirs.length ? shares[0].map((line, l) => [...line].map((v, e) => shares[1][l][e] - v)) : null;
  const grids = [["a", shares[0], run, shareInk], ["b", shares[1], other, shareInk], ["c", change, run, changeInk]];
  for (const [name, values, one, ink] of grids) {
    const canvas = part(`compare-${name}-experts`), layers = one.model.moe_layers, left = 24, room = roomFor(canvas), wide = (room - left) / one.model.experts, tall = Math.max(7, Math.min(20, 240 / layers.length));
    const draw = sized(canvas, room, layers.length * tall + 2);
    layers.forEach((layer, l) => {
      draw.fillStyle = colour("soft");
      if (tall > 11 || l % 3 === 0) draw.fillText(`L${layer}`, 0, (l + 0.5) * tall);
      for (let e = 0; values && e < one.model.experts; e++) {
        draw.fillStyle = ink(values[l][e]);
        draw.fillRect(left + e * wide, l * tall, wide - (wide > 5 ? 1.5 : 0.5), tall - 1.5);
      }
    });
    canvas.setAttribute("aria-label", values ? `Layer by expert; the numbers are in the table below` : "Not comparable");
  }
  part("compare-share-bar").style.background = gradient();
  part("compare-change-bar").style.background = `linear-gradient(90deg, ${[-1, -0.5, 0, 0.5, 1].map(changeInk).join(", ")})`;
  part("compare-share-table").hidden = !change;
  if (change) fillTable("compare-share-table", ["layer", "expert", "this", "other", "other − this"], () => shares[0].flatMap((line, l) =>
    [...line].map((v, e) => [run.model.moe_layers[l], e, percent(v), percent(shares[1][l][e]), signedPercent(shares[1][l][e] - v)]).filter((row) => row[2] !== "0%" || row[3] !== "0%")));
}
const signedPercent = (v) => (v < 0 ? `−${percent(-v)}` : v > 0 ? `+${percent(v)}` : "0%");
// Where the experts of a position are: of a row, of a word before the rows, of a visual token.
function expertsAt(one, layer, place) {
  if (place.row >= 0) return lastOf(one.chosen, layer, place.row);
  return place.early >= 0 ? lastOf(one.chosen_early, layer, place.early) : lastOf(one.chosen_picture, layer, place.visual);
}
function placesOf(one) { // role -> [{ text, row | early | visual }], in order
  const found = {};
  one.words.at.forEach((at, w) => (found[one.words.role[w]] ??= []).push({ text: one.words.text[w], row: at - one.first_row, early: at < one.first_row ? w : -1 }));
  one.pictures.forEach((shown, n) => (found[`image ${n}`] = Array.from({ length: shown.tokens }, (_, i) => ({ text: "", row: -1, early: -1, visual: shown.first + i }))));
  return found;
}
function drawAgreement() {
  const { experts: count, top_k: k, moe_layers: layers } = run.model, other = compared.other;
  if (!comparable()) {
    say("compare-chance", "These two models have other numbers of layers or experts, so that their choices cannot be compared.");
    part("compare-same").replaceChildren();
    return;
  }
  const [mine, theirs] = [placesOf(run), placesOf(other)], groups = { all: [], picture: [], question: [], thought: [], answer: [] };
  for (const [role, list] of Object.entries(mine)) {
    const unlike = list.findIndex((place, i) => place.text !== theirs[role]?.[i]?.text), upto = unlike < 0 ? list.length : unlike;
    const pairs = list.slice(0, upto).map((place, i) => [place, theirs[role][i]]);
    groups.all.push(...pairs);
    groups[groupOf(role)]?.push(...pairs); // words of the template are in "all" alone
  }
  const shown = Object.entries(groups).filter(([, pairs]) => pairs.length);
  const same = (l, pairs) => pairs.reduce((sum, [a, b]) => {
    const theirs = expertsAt(other, l, b);
    return sum + expertsAt(run, l, a).reduce((n, e) => n + (theirs.includes(e) ? 1 : 0), 0) / k;
  }, 0) / pairs.length;
  const rows = layers.map((layer, l) => [`L${layer}`, ...shown.map(([, pairs]) => percent(same(l, pairs)))]);
  part("compare-same").replaceChildren(table(["layer", ...shown.map(([name, pairs]) => `${name} (${pairs.length})`)], rows));
  say("compare-chance", `Share of a token's ${k} experts that both runs chose, over tokens that both have in common; by chance ${percent(k / count)}.`);
}
