// Lens and credit: what each layer would say next, at words and at patches; and which parts of the picture a written word
// owes its probability to.

addPanel({
  name: "lens",
  label: "Lens and credit",
  explain: "The lens takes the stream after a layer as if it were the last one and reads which word would come next, so that one sees where an answer takes shape. Credit asks the other way round: how much of a written word's probability is lost when a part of the picture is hidden or turned grey.",
  guard: `Lens: softmax(W<sub>U</sub> norm(x<sub>l</sub>)). Early layers need not speak the last layer's language, so an odd word early on
    says little; “settled” is only the layer from which the likeliest word stays the same.`,
  skeleton: `
    <h3>Layer by layer</h3>
    <div class="acts"><button class="go" data-part="lens-go" type="button">Read the layers</button></div>
    <p class="note" data-part="lens-note" aria-live="polite"></p>
    <p class="lens-empty" data-part="lens-empty">A grid of layers and words appears here: the likeliest next word in each cell, darker where it is surer.</p>
    <div data-part="lens-shown" hidden>
      <div class="scroll lens-grid" data-part="lens-grid" tabindex="0" aria-label="Layers by words. Arrow keys move over the cells."></div>
      <div class="scale"><span>0</span><div class="bar" data-part="lens-bar"></div><span>100% probability</span></div>
      <p class="note readout" data-part="lens-cell" aria-live="polite"></p>
      <table data-part="lens-top"></table>
    </div>
    <h3>Words on patches</h3>
    <div class="acts"><button class="go" data-part="lens-patch-go" type="button">Read the patches</button></div>
    <p class="note" data-part="lens-patch-note" aria-live="polite"></p>
    <p class="lens-empty" data-part="lens-patch-empty">The picture appears here with a word in each of its tokens: what the lens reads there.</p>
    <div data-part="lens-patch-shown" hidden>
      <div class="controls"><label>After layer <select data-part="lens-layer"></select></label></div>
      <div class="lens-patches"><canvas data-part="lens-patches" tabindex="0" role="img"></canvas></div>
      <div class="scale"><span>0</span><div class="bar" data-part="lens-patch-bar"></div><span>100% probability</span></div>
      <p class="note readout" data-part="lens-patch-cell" aria-live="polite"></p>
      <p class="note" data-part="lens-patch-same"></p>
      <details data-part="lens-patch-table"><summary>Words as a table</summary><div class="scroll"></div></details>
    </div>
    <details class="guard"><summary>How to read it</summary><div>The same lens, at the picture's tokens (arXiv 2410.07149). The model was never
      trained to say anything there, so a word is a hint of what the token holds, not a caption. Words that come on a plain grey
      picture too, in brackets, come from the place and the question and say nothing about this picture.</div></details>
    <h3>Credit: which part of the picture made it write this word?</h3>
    <div class="acts"><div class="controls"><button class="go" data-part="credit-go" type="button">Share out the credit</button>
      <button type="button" data-part="credit-stop" disabled>Stop</button></div></div>
    <p class="note" data-part="credit-note" aria-live="polite"></p>
    <p class="lens-empty" data-part="credit-empty">Two maps of the picture appear here for the selected words, and how good they are beside a random order.</p>
    <p data-part="credit-said"></p>
    <div class="lens-two" data-part="credit-maps"></div>
    <div data-part="credit-scale" hidden><div class="scale"><span data-part="credit-low"></span><div class="bar" data-part="credit-bar"></div><span data-part="credit-high"></span></div>
      <p class="note">nats of log-probability, one scale for both maps. Orange: for the word; blue: against it.</p></div>
    <div class="lens-two" data-part="credit-curves"></div>
    <div class="lens-legend" data-part="credit-legend"></div>
    <div data-part="credit-tables" hidden><details data-part="credit-table"><summary>Maps as a table</summary><div class="scroll"></div></details>
      <details data-part="curve-table"><summary>Curves as a table</summary><div class="scroll"></div></details></div>
    <details class="guard"><summary>Formulas, and how to read them</summary><div>Occlusion: log p(word) − log p(word | a grey box hides this place)
      (arXiv 1311.2901). Integrated gradients: (x − x′) · ∫ ∂log p ∕ ∂x along the way from grey x′ to the picture x; over all tokens they add up to
      log p(x) − log p(x′) (arXiv 1703.01365), and what is missing to that is the residual. Which experts are chosen jumps along the way, and gradients do not see
      jumps: the map keeps them pinned. A grey box is itself something to see. Where the word is as likely without
      the picture, there is no credit to share out, and a map of it is noise. A good map makes the probability fall soon when its highest
      places are hidden first (deletion), and rise soon when they are shown first (insertion); a map is worth
      something only where it beats the random order.</div></details>`,
  open() {
    words = patches = credit = null;
    cell = patch = null;
    for (const name of ["lens-note", "lens-patch-note", "credit-note", "credit-said"]) say(name, "");
    for (const name of ["lens-go", "lens-patch-go", "credit-go"]) part(name).disabled = false;
    part("credit-stop").disabled = true;
  },
  draw() {
    drawWords();
    drawPatches();
    drawCredit();
  },
});

let words = null, patches = null, credit = null; // what the acts told
let cell = null; // [layer, column of `words`]
let patch = null; // visual token

// Asks for the run shown; what comes for another run is dropped.
function ask(button, note, name, args, take) {
  const about = run.id, edited = run.edits?.length ? " Read without the changes that this run was answered under." : "";
  part(button).disabled = true;
  say(note, "Working…");
  act(name, args, (result) => {
    if (run.id !== about) return;
    if (result.data) take(result.data);
    say(note, standing(result, (result.data?.stopped || "") + edited));
    if (result.done || result.error) part(button).disabled = false;
    if (state.tab === "lens") draw();
  });
}
const onShade = (t) => (isDark() ? (t > 0.55 ? "#12151b" : "#e8ebf1") : t > 0.45 ? "#fff" : "#1d2430");
const layerName = (name) => (name === "embedded" ? "embedded" : `layer ${name}`);

// ---- layer by layer
const MOST = 256; // positions; the act refuses more
part("lens-go").onclick = () => {
  const rows = selectedRows(), spare = Math.max(0, MOST - (rows.at(-1) - rows[0] + 1));
  const first = Math.max(0, Math.min(rows[0] - Math.floor(spare / 2), run.rows - MOST)), last = Math.min(run.rows, first + MOST) - 1;
  ask("lens-go", "lens-note", "lens", { first: run.first_row + first, last: run.first_row + last }, (data) => { if (data.words) { words = data; cell = null; } });
};
function columns() { // of `words`: the selected ones, with neighbours where they are few
  const chosen = selectedRows().map((row) => row + run.first_row - words.first), n = words.settled.length;
  if (!chosen.length || chosen[0] < 0 || chosen.at(-1) >= n) return { chosen, shown: [] };
  const room = Math.max(0, Math.floor((8 - (chosen.at(-1) - chosen[0] + 1)) / 2));
  const from = Math.max(0, chosen[0] - room), to = Math.min(n - 1, chosen.at(-1) + room);
  return { chosen, shown: Array.from({ length: Math.min(40, to - from + 1) }, (_, i) => from + i) };
}
function textAt(position) {
  const at = run.words.at.indexOf(position);
  return at < 0 ? "∅" : legible(run.words.text[at]);
}
function drawWords() {
  part("lens-empty").hidden = Boolean(words);
  part("lens-shown").hidden = !words;
  if (!words) return;
  const { chosen, shown } = columns(), deepest = words.layers.length - 1;
  if (!shown.length) return void part("lens-grid").replaceChildren(make("p", "note", "These words were not read yet: press “Read the layers” again."));
  if (!cell || !shown.includes(cell[1])) cell = [deepest, chosen.at(-1)];
  const made = make("table"), head = made.createTHead().insertRow(), body = made.createTBody(), foot = made.createTFoot();
  const header = (row, text, scope) => row.appendChild(Object.assign(make("th", "", text), { scope }));
  header(head, "after reading", "col");
  for (const n of shown) header(head, textAt(words.first + n), "col").classList.toggle("sel", chosen.includes(n));
  words.layers.forEach((name, l) => {
    const row = body.insertRow();
    header(row, layerName(name), "row");
    for (const n of shown) {
      const box = row.insertCell(), p = words.probs[l][n][0];
      box.textContent = legible(words.words[l][n][0]);
      box.title = `${quote(words.words[l][n][0])} ${percent(p)}`;
      box.style.cssText = `background: ${ramp(p)}; color: ${onShade(p)}`;
      box.classList.toggle("on", cell[0] === l && cell[1] === n);
      box.onclick = () => choose(l, n);
    }
  });
  const settled = foot.insertRow();
  header(settled, "settled", "row");
  for (const n of shown) settled.insertCell().textContent = words.settled[n] ? `from ${words.layers[words.settled[n]]}` : "at once";
  part("lens-grid").replaceChildren(made);
  part("lens-bar").style.background = gradient();
  drawCell(deepest);
}
function drawCell(deepest) {
  const [l, n] = cell, final = words.words[deepest][n][0], rank = words.rank[l][n], { chance } = words;
  say("lens-cell", `After ${words.layers[l] === "embedded" ? "the embedding" : layerName(words.layers[l])}, having read ${quote(textAt(words.first + n))}: the final word ${quote(final)} is number ${rank + 1} with ${percent(words.prob[l][n])} (a guess: number ${Math.round(chance.rank + 1)}, ${percent(chance.prob)}). ${words.settled[n] ? `It is settled from layer ${words.layers[words.settled[n]]} on.` : "It is settled from the start."}`);
  const top = table(["place", "word", "probability"], words.words[l][n].map((word, k) => [k + 1, quote(word), percent(words.probs[l][n][k])]));
  top.dataset.part = "lens-top";
  part("lens-top").replaceWith(top);
}
function choose(l, n) {
  cell = [l, n];
  drawWords();
}
part("lens-grid").onkeydown = (e) => {
  const step = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[e.key];
  if (!step || !words || !cell) return;
  e.preventDefault();
  const { shown } = columns(), l = cell[0] + step[0], n = cell[1] + step[1];
  if (shown.includes(n) && l >= 0 && l < words.layers.length) choose(l, n);
};

// ---- words on patches
part("lens-patch-go").onclick = () => ask("lens-patch-go", "lens-patch-note", "patch_lens", { picture: state.picture }, (data) => {
  if (!data.words) return;
  patches = data;
  patch = null;
  options("lens-layer", data.layers.map((_, l) => l), data.layers);
  part("lens-layer").value = data.layers.length - 1;
});
part("lens-layer").onchange = drawPatches;
function onCells(...canvas) { // the picture, pale and grey, so that the colours seen are those of the map
  const made = pictureCanvas(...canvas), { draw, g, scale } = made;
  draw.globalAlpha = 0.45;
  drawImage(draw, g, scale, "grayscale(1)");
  draw.globalAlpha = 1;
  return made;
}
function drawPatches() {
  const shown = patches && patches.picture === state.picture;
  part("lens-patch-empty").hidden = Boolean(shown);
  part("lens-patch-shown").hidden = !shown;
  if (!shown) return;
  const l = +part("lens-layer").value, canvas = part("lens-patches"), across = geometry().across;
  const { draw, g, side } = onCells(canvas, Math.max(40 * across, Math.min(roomFor(canvas), 76 * across)), Infinity);
  draw.textAlign = "center";
  for (let token = 0; token < g.tokens; token++) {
    const [x, y] = boxOf(token, g.across, side), p = patches.probs[l][token][0], word = patches.words[l][token][0];
    draw.fillStyle = ramp(p, 0.72);
    draw.fillRect(x, y, side, side);
    const marked = (text) => (word === patches.grey[l][token] ? `(${text})` : text);
    let text = legible(word);
    while (text.length > 2 && draw.measureText(marked(text)).width > side - 4) text = `${text.slice(0, -2)}…`;
    draw.fillStyle = onShade(p);
    draw.fillText(marked(text), x + side / 2, y + side / 2);
  }
  drawGrid(draw, { ...g, patch: g.cell, merge: 1, grid: [g.down, g.across] }, side / g.cell);
  if (patch !== null) outline(draw, patch, g.across, side);
  canvas.cell = (x, y) => Math.min(g.down - 1, Math.floor(y / side)) * g.across + Math.min(g.across - 1, Math.floor(x / side));
  const same = patches.grey[l].filter((word, token) => word === patches.words[l][token][0]).length, name = layerName(patches.layers[l]);
  say("lens-patch-same", `${capital(name)}: on ${same} of ${g.tokens} tokens the same word comes on a plain grey picture of this size; those are in brackets.`);
  say("lens-patch-cell", patch === null ? "Point at a token, or use the arrow keys, for its three likeliest words." : `${capital(placeOf(patch, g))}: ${patches.words[l][patch].map((word, k) => `${quote(word)} ${percent(patches.probs[l][patch][k])}`).join(", ")}. On grey: ${quote(patches.grey[l][patch])}.`);
  part("lens-patch-bar").style.background = gradient();
  canvas.setAttribute("aria-label", `The likeliest word at each picture token after ${name}; ${same} of ${g.tokens} are the same on grey. Arrow keys move over the tokens.`);
  fillTable("lens-patch-table", ["row", ...Array.from({ length: g.across }, (_, c) => `col ${c + 1}`)], () => byRow(g, (token) => legible(patches.words[l][token][0])));
}
const byRow = (g, text) => Array.from({ length: g.down }, (_, r) => [r + 1, ...Array.from({ length: g.across }, (_, c) => text(r * g.across + c))]);
const pointPatch = (token) => { if (patches && token !== patch) { patch = token; drawPatches(); } };
part("lens-patches").onpointermove = part("lens-patches").onpointerdown = (e) => pointPatch(e.target.cell?.(...inside(e.target, e)) ?? null);
part("lens-patches").onkeydown = (e) => {
  const g = geometry(), step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: g.across, ArrowUp: -g.across }[e.key];
  if (!step) return;
  e.preventDefault();
  pointPatch(patch === null ? 0 : Math.max(0, Math.min(g.tokens - 1, patch + step)));
};

// ---- credit
part("credit-go").onclick = () => {
  const [a, b] = span();
  credit = null;
  part("credit-stop").disabled = false;
  ask("credit-go", "credit-note", "credit", { first: run.words.at[a], last: run.words.at[b] }, (data) => { if (data.loss) credit = data; });
};
stops("credit-stop");
const NATS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50];
const nats = (v) => `${v < 0 ? "−" : ""}${Math.abs(v) < 0.1 && v ? Math.abs(v).toPrecision(2).replace(/e-(\d+)/, " · 10^−$1") : Math.abs(v).toFixed(2)}`;
const LINES = { "integrated gradients": ["--answer"], occlusion: ["--image"], random: ["--ink", [5, 4]], centre: ["--faint", [2, 3]] };
function drawCredit() {
  part("credit-stop").disabled = !part("credit-go").disabled;
  part("credit-empty").hidden = Boolean(credit) || part("credit-go").disabled;
  for (const name of ["credit-scale", "credit-tables"]) part(name).hidden = !credit;
  part("curve-table").hidden = !credit?.curves;
  if (!credit) {
    for (const name of ["credit-maps", "credit-curves", "credit-legend"]) part(name).replaceChildren();
    return say("credit-said", "");
  }
  const { word, ends, gap, loss, gradients } = credit, maps = [["hidden by a grey box (occlusion)", loss], ...(gradients ? [["integrated gradients", gradients]] : [])];
  say("credit-said", !ends ? "" : `${quote(word)}: ${percent(Math.exp(ends[1]))} sure with the picture, ${percent(Math.exp(ends[0]))} with plain grey in its place: ${nats(ends[1] - ends[0])} nats to share out. The gradients add up to ${nats(gradients.flat().reduce((a, b) => a + b, 0))}; residual ${nats(gap["routing pinned"])} with the experts pinned, ${nats(gap["routing free"])} with routing free.${ends[1] - ends[0] < 0.1 ? " The picture adds next to nothing to this word: the maps show noise." : ""}`);
  const largest = Math.max(...maps.flatMap(([, map]) => map.flat()).map(Math.abs)), top = NATS.find((step) => step >= largest) || largest;
  say("credit-low", `−${top}`);
  say("credit-high", `+${top} nats`);
  part("credit-bar").style.background = divergingBar();
  while (part("credit-maps").children.length !== maps.length) part("credit-maps").replaceChildren(...maps.map(() => { const box = make("div"); box.append(make("h4"), make("canvas")); return box; }));
  maps.forEach(([name, map], i) => {
    const [title, canvas] = part("credit-maps").children[i].children, { draw, g, scale, side } = onCells(canvas, roomFor(canvas), 280), values = map.flat();
    title.textContent = capital(name);
    values.forEach((v, token) => {
      draw.fillStyle = diverging(v / top, 0.2 + 0.65 * Math.min(1, Math.abs(v) / top));
      draw.fillRect(...boxOf(token, g.across, side));
    });
    drawGrid(draw, g, scale);
    const best = values.indexOf(Math.max(...values));
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${name} for ${quote(word)}: most, ${nats(values[best])} nats, on ${placeOf(best, g)}`);
  });
  const g = geometry();
  fillTable("credit-table", ["map, row", ...Array.from({ length: g.across }, (_, c) => `col ${c + 1}`)], () => maps.flatMap(([name, map]) => byRow(g, (token) => nats(map.flat()[token])).map(([r, ...cells]) => [`${name.split(" ")[0]}, ${r}`, ...cells])));
  drawCurves();
}
function drawCurves() {
  const { curves } = credit, ways = curves ? [["deletion", "hidden, best first: low is good"], ["insertion", "shown, best first: high is good"]] : [];
  while (part("credit-curves").children.length !== ways.length) part("credit-curves").replaceChildren(...ways.map(() => { const box = make("div"); box.append(make("h4"), make("canvas")); return box; }));
  ways.forEach(([way, text], i) => {
    const [title, canvas] = part("credit-curves").children[i].children, wide = Math.min(380, roomFor(canvas)), draw = sized(canvas, wide, 170), left = 34, bottom = 140;
    const x = (share) => left + share * (wide - left - 12), y = (p) => bottom - p * 124;
    title.textContent = `Share of the picture ${text}`;
    draw.fillStyle = colour("soft");
    draw.strokeStyle = colour("line");
    for (const t of [0, 0.5, 1]) {
      draw.fillText(percent(t), 0, y(t));
      draw.fillText(percent(t), Math.min(x(t) - 8, wide - 32), bottom + 16);
      draw.beginPath();
      draw.moveTo(left, y(t));
      draw.lineTo(x(1), y(t));
      draw.stroke();
    }
    curves.maps.forEach((name, m) => {
      draw.lineWidth = m ? 2 : 5; // the first stays in sight where another runs along it
      draw.strokeStyle = colour(LINES[name][0].slice(2));
      draw.setLineDash(LINES[name][1] || []);
      draw.beginPath();
      curves.shares.forEach((share, k) => draw[k ? "lineTo" : "moveTo"](x(share), y(curves[way][m][k])));
      draw.stroke();
    });
    draw.setLineDash([]);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${way}, probability of ${quote(credit.word)} from 0 to 100%; areas: ${curves.maps.map((name, m) => `${name} ${curves.areas[way][m].toFixed(2)}`).join(", ")}`);
  });
  part("credit-legend").replaceChildren(...(curves ? curves.maps.map((name, m) => {
    const label = make("span", "", `${name}${curves.controls.includes(name) ? " (control)" : ""}: area ${curves.areas.deletion[m].toFixed(2)} hidden, ${curves.areas.insertion[m].toFixed(2)} shown`);
    label.style.cssText = `--c: var(${LINES[name][0]}); --dash: ${LINES[name][1] ? "dashed" : "solid"}`;
    return label;
  }) : []));
  if (curves) fillTable("curve-table", ["way, share", ...curves.maps], () => ways.flatMap(([way]) => curves.shares.map((share, k) => [`${way}, ${percent(share)}`, ...curves.maps.map((_, m) => percent(curves[way][m][k]))])));
}
