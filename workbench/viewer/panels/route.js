// Route: which expert serves which patch and word; picture against words; how even the load is; who works with whom.
// All of it is counted here, from the experts in the payload, as workbench.analyses counts it for one run.

addPanel({
  name: "route",
  label: "Route",
  keeps: ["inside"],
  explain: "In every layer a router sends each patch and each word to a few experts. Here you see which, whether pictures and words go to different ones, and how evenly the work is shared.",
  guard: `The K experts with the largest score + bias are chosen. Chance is K ∕ E. One run has few tokens, so some experts
    serve many and some none by luck alone: that is what the grey control is for. An expert that serves the patches of one
    thing need not know that thing; switch it off in Change to see whether it matters. Nothing here says anything about
    other weights than those named below.`,
  skeleton: `<div class="controls"><label>Layer <select data-part="route-layer"></select></label>
      <span data-part="route-expert" aria-live="polite"></span><button type="button" data-part="route-free" hidden>Let it go</button></div>
    <h3>Picture and words, expert by expert</h3>
    <canvas class="wide" data-part="route-sides" role="img"></canvas>
    <p class="note" data-part="route-sides-note"></p>
    <details data-part="route-sides-table"><summary>Numbers as a table</summary><div class="scroll"></div></details>
    <h3>Do pictures and words go to different experts?</h3>
    <canvas class="wide" data-part="route-apart" role="img"></canvas>
    <p class="note" data-part="route-apart-note"></p>
    <details data-part="route-apart-table"><summary>Numbers as a table</summary><div class="scroll"></div></details>
    <h3>How evenly the work is shared <select data-part="route-group" aria-label="Tokens counted"></select></h3>
    <canvas class="wide" data-part="route-load" role="img"></canvas>
    <p class="note" data-part="route-load-note"></p>
    <details data-part="route-load-table"><summary>Numbers as a table</summary><div class="scroll"></div></details>
    <h3>Who works with whom</h3>
    <canvas data-part="route-pairs" role="img" tabindex="0"></canvas>
    <div class="scale"><span>−50 points</span><div class="bar" data-part="route-pairs-bar"></div><span>+50 points or more</span></div>
    <p class="note readout" data-part="route-pairs-note" aria-live="polite"></p>
    <details data-part="route-pairs-table"><summary>Numbers as a table</summary><div class="scroll"></div></details>`,
  open() {
    const { moe_layers } = run.model;
    options("route-layer", [...moe_layers.keys()], moe_layers);
    const roles = new Set(run.words.role), has = { all: true, picture: run.pictures.length > 0, text: true, question: roles.has("user"), thought: roles.has("thought"), answer: roles.has("answer"), selected: true };
    const names = Object.keys(has).filter((name) => has[name]);
    options("route-group", names, names.map((name) => ({ all: "all tokens", picture: "picture tokens", text: "everything but pictures", selected: "the words chosen" })[name] || `words of the ${name}`));
    pair = null;
  },
  draw() {
    const l = state.tableLayer, cell = shownExpert(), name = run.model.moe_layers[l];
    part("route-layer").value = l;
    say("route-expert", cell ? `Expert ${cell[1]} of layer ${run.model.moe_layers[cell[0]]} is chosen: what it served stays bright.` : "Choose an expert: a bar, a colour under the picture, or a cell below.");
    part("route-free").hidden = !state.expert;
    drawSides(l, name);
    drawApart();
    drawLoad(l, name);
    drawPairs(l, name);
  },
});

// ---- counting
let pair = null; // the cell of the matrix that is pointed at
function tokensOf(group, l) { // the K experts of each token of a group, one after the other
  const out = [], pictures = group === "all" || group === "picture" ? pictureTokens() : 0;
  for (let token = 0; token < pictures; token++) out.push(...pictureExperts(l, token));
  if (group === "picture") return out;
  if (group === "selected") {
    for (const row of selectedRows()) out.push(...rowExperts(l, row));
    return out;
  }
  run.words.at.forEach((at, w) => { // those before the first row come in their order
    if (group !== "all" && group !== "text" && groupOf(run.words.role[w]) !== group) return;
    out.push(...(at < run.first_row ? lastOf(run.chosen_early, l, w) : rowExperts(l, at - run.first_row)));
  });
  return out;
}
function counted(ids) {
  const counts = new Float64Array(run.model.experts);
  for (const e of ids) counts[e]++;
  return counts;
}
const share = (counts) => { const sum = counts.reduce((a, b) => a + b, 0); return counts.map((n) => n / sum); };
const bits = (p) => -p.reduce((sum, v) => sum + (v > 0 ? v * Math.log2(v) : 0), 0);
const divergence = (p, q) => bits(p.map((v, i) => (v + q[i]) / 2)) - (bits(p) + bits(q)) / 2; // Jensen-Shannon
const excess = (counts) => Math.max(...counts) / (counts.reduce((a, b) => a + b, 0) / counts.length) - 1; // MaxVio
function random(seed) { // mulberry32: the control is the same whenever the run is opened
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}
const SHUFFLES = 200;
function quantile(sorted, q) {
  const at = q * (sorted.length - 1), low = Math.floor(at);
  return sorted[low] + (at - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]);
}
function howFarApart() { // by layer: picture against all other tokens, beside which of them are pictures dealt out anew
  const layers = run.model.moe_layers.length, k = run.model.top_k, m = pictureTokens(), next = random(0);
  const ids = Array.from({ length: layers }, (_, l) => [...tokensOf("picture", l), ...tokensOf("text", l)]);
  const isPicture = Uint8Array.from({ length: ids[0].length / k }, (_, i) => (i < m ? 1 : 0));
  const measure = () => ids.map((all) => {
    const counts = [new Float64Array(run.model.experts), new Float64Array(run.model.experts)];
    for (let i = 0; i < all.length; i++) counts[isPicture[Math.floor(i / k)]][all[i]]++;
    return divergence(share(counts[0]), share(counts[1]));
  });
  const value = measure(), dealt = [];
  for (let shuffle = 0; shuffle < SHUFFLES; shuffle++) {
    for (let i = isPicture.length - 1; i > 0; i--) {
      const j = Math.floor(next() * (i + 1)), held = isPicture[i];
      isPicture[i] = isPicture[j];
      isPicture[j] = held;
    }
    dealt.push(measure());
  }
  const sorted = ids.map((_, l) => dealt.map((one) => one[l]).sort((a, b) => a - b));
  return { value, low: sorted.map((s) => quantile(s, 0.025)), high: sorted.map((s) => quantile(s, 0.975)) };
}
function together(l) { // (E, E): the share of i's tokens that chose j too, and what the loads alone lead to
  const { experts: n, top_k: k } = run.model, ids = tokensOf("all", l), tokens = ids.length / k;
  const both = Array.from({ length: n }, () => new Float64Array(n));
  for (let t = 0; t < tokens; t++) for (let a = 0; a < k; a++) for (let b = 0; b < k; b++) both[ids[t * k + a]][ids[t * k + b]]++;
  const f = both.map((line, i) => line[i] / tokens);
  return both.map((line, i) => [...line].map((count, j) => (f[i] ? { tokens: line[i], share: count / line[i], loads: i === j ? 1 : ((k - 1) * f[j]) / (k - f[i]) } : null)));
}

// ---- drawing
function bars(draw, values, l, { left, wide, base, tall, top }, up = 1) {
  values.forEach((value, e) => {
    const chosen = state.expert?.[0] === l && state.expert[1] === e;
    draw.fillStyle = expertInk(l, e);
    draw.fillRect(left + e * wide + 1, base, wide - 2, -up * Math.min(1, value / top) * tall);
    if (!chosen) return;
    draw.strokeStyle = colour("ink");
    draw.lineWidth = 2;
    draw.strokeRect(left + e * wide, base, wide, -up * tall);
  });
}
function line(draw, x0, x1, y, ink, dashes = []) {
  draw.strokeStyle = colour(ink);
  draw.lineWidth = 1;
  draw.setLineDash(dashes);
  draw.beginPath();
  draw.moveTo(x0, Math.round(y) + 0.5);
  draw.lineTo(x1, Math.round(y) + 0.5);
  draw.stroke();
  draw.setLineDash([]);
}
const chance = () => run.model.top_k / run.model.experts;
const topLoad = () => Math.min(1, 6 * chance()); // the end of the axis of loads, the same for every group and layer
function countLoads(group, l) {
  const ids = tokensOf(group, l), counts = counted(ids);
  return { counts, tokens: ids.length / run.model.top_k, load: [...counts].map((n) => (n * run.model.top_k) / (ids.length || 1)) };
}
const loads = (group, l) => (group === "selected" ? countLoads(group, l) : once(`loads ${group} ${l}`, () => countLoads(group, l)));
const pickExpert = (left, wide) => (x) => { const e = Math.floor((x - left) / wide); return e >= 0 && e < run.model.experts ? e : null; };

function drawSides(l, name) { // up: picture, down: everything else
  const canvas = part("route-sides"), room = roomFor(canvas), left = 62, wide = (room - left) / run.model.experts, tall = 52;
  const draw = sized(canvas, room, 2 * tall + 44), picture = loads("picture", l), text = loads("text", l), top = topLoad();
  const upper = { left, wide, base: tall + 12, tall, top }, lower = { ...upper, base: tall + 28 };
  if (picture.tokens) bars(draw, picture.load, l, upper);
  bars(draw, text.load, l, lower, -1);
  expertAxis(draw, left, wide, tall + 20);
  draw.fillStyle = colour("soft");
  draw.fillText("picture", 0, upper.base - tall / 2);
  draw.fillText("words", 0, lower.base + tall / 2);
  for (const [box, up] of [[upper, 1], [lower, -1]]) line(draw, left, room, box.base - up * tall * (chance() / top), "ink", [3, 3]);
  canvas.pick = pickExpert(left, wide);
  const most = (side) => side.load.indexOf(Math.max(...side.load));
  say("route-sides-note", picture.tokens
    ? `Layer ${name}: share of ${picture.tokens} picture tokens (up) and of ${text.tokens} others (down) that chose each expert, 0 to ${percent(top)}; dashed: chance, ${percent(chance())}. Most for the picture: expert ${most(picture)}, ${percent(Math.max(...picture.load))}; for words: expert ${most(text)}, ${percent(Math.max(...text.load))}.`
    : `Layer ${name}: there is no picture, so only the words are counted. Dashed: chance, ${percent(chance())}.`);
  canvas.setAttribute("aria-label", part("route-sides-note").textContent);
  const p = share(picture.counts), q = share(text.counts);
  fillTable("route-sides-table", ["expert", "picture", "words", "preference"], () => picture.load.map((v, e) =>
    [e, percent(v), percent(text.load[e]), p[e] + q[e] > 0 ? fixed((p[e] - q[e]) / (p[e] + q[e])) : "none"]));
}
function drawApart() {
  const canvas = part("route-apart"), found = run.pictures.length ? once("apart", howFarApart) : null, layers = run.model.moe_layers, left = 34, right = 64, tall = 22;
  canvas.hidden = !found;
  if (!found) return say("route-apart-note", "There is no picture in this run, so there is nothing to compare words with.");
  const room = roomFor(canvas), draw = sized(canvas, room, layers.length * tall + 16), x = (v) => left + v * (room - left - right);
  layers.forEach((name, l) => {
    const y = (l + 0.5) * tall;
    draw.fillStyle = colour(l === state.tableLayer ? "accent" : "soft");
    draw.fillText(`L${name}`, 0, y);
    line(draw, left, room - right, y, "line");
    draw.fillStyle = colour("rest");
    draw.fillRect(x(found.low[l]), y - 5, Math.max(2, x(found.high[l]) - x(found.low[l])), 10);
    draw.fillStyle = colour("accent");
    draw.beginPath();
    draw.arc(x(found.value[l]), y, 5, 0, 7);
    draw.fill();
    draw.fillStyle = colour("ink");
    draw.fillText(`${found.value[l].toFixed(2)} bit`, room - right + 14, y);
  });
  draw.fillStyle = colour("soft");
  draw.fillText("0, the same", left, layers.length * tall + 8);
  const end = "1, nothing in common";
  draw.fillText(end, room - right - draw.measureText(end).width, layers.length * tall + 8);
  canvas.pick = (_, y) => Math.floor(y / tall);
  const above = layers.filter((_, l) => found.value[l] > found.high[l]).length;
  say("route-apart-note", `Distance (Jensen-Shannon) of how picture tokens and all others spread over experts. Grey: where it lies in 95 of 100 deals when “picture” is dealt out to the tokens at random, ${SHUFFLES} deals; ${above} of ${layers.length} layers lie above. Neighbours are alike anyway, which a deal does not keep.`);
  canvas.setAttribute("aria-label", `Distance of picture and words by layer: ${layers.map((name, l) => `layer ${name} ${found.value[l].toFixed(2)} bit`).join(", ")}`);
  fillTable("route-apart-table", ["layer", "distance (bit)", "control from", "control to"], () => layers.map((name, l) => [name, ...[found.value, found.low, found.high].map((v) => v[l].toFixed(3))]));
}
function drawLoad(l, name) {
  const group = part("route-group").value, canvas = part("route-load"), room = roomFor(canvas), left = 40, wide = (room - left) / run.model.experts, tall = 84;
  const draw = sized(canvas, room, tall + 28), { load, counts, tokens } = loads(group, l), top = topLoad(), box = { left, wide, base: tall + 6, tall, top };
  bars(draw, load, l, box);
  expertAxis(draw, left, wide, tall + 18);
  draw.fillStyle = colour("soft");
  draw.fillText(percent(top), 0, 12);
  draw.fillText("0", 0, tall + 2);
  line(draw, left, room, box.base, "line");
  line(draw, left, room, box.base - tall * (chance() / top), "ink", [3, 3]);
  canvas.pick = pickExpert(left, wide);
  const idle = [...counts].filter((n) => !n).length, vio = tokens ? excess(counts) : NaN;
  say("route-load-note", !tokens ? "There are no such tokens." : `Layer ${name}, ${tokens} ${tokens === 1 ? "token" : "tokens"}: share that chose each expert; dashed: chance, ${percent(chance())}. MaxVio ${vio.toFixed(2)}: the busiest serves ${(vio + 1).toFixed(1)} times its even part (0 is even, ${(run.model.experts / run.model.top_k - 1).toFixed(0)} the most). ${idle} ${idle === 1 ? "expert is" : "experts are"} idle.`);
  canvas.setAttribute("aria-label", part("route-load-note").textContent);
  const layers = run.model.moe_layers;
  fillTable("route-load-table", ["expert", ...layers.map((n) => `L${n}`)], () => {
    const all = layers.map((_, i) => loads(group, i));
    return [...load.map((_, e) => [e, ...all.map((one) => percent(one.load[e]))]), ["MaxVio", ...all.map((one) => (one.tokens ? excess(one.counts).toFixed(2) : "none"))]];
  });
}
function drawPairs(l, name) {
  const canvas = part("route-pairs"), cells = once(`together ${l}`, () => together(l)), n = cells.length, left = 28, top = 18;
  const side = Math.max(4, Math.min(20, (roomFor(canvas) - left) / n)), draw = sized(canvas, left + side * n, top + side * n);
  expertAxis(draw, left, side, 8);
  const every = Math.ceil(14 / side);
  cells.forEach((row, i) => {
    draw.fillStyle = colour("soft");
    if (i % every === 0) draw.fillText(`${i}`, 6, top + (i + 0.5) * side);
    row.forEach((cell, j) => {
      draw.fillStyle = i === j || !cell ? colour("wash") : diverging(Math.max(-1, Math.min(1, (cell.share - cell.loads) / 0.5)));
      draw.fillRect(left + j * side, top + i * side, side - 1, side - 1);
    });
  });
  if (pair) {
    draw.strokeStyle = colour("ink");
    draw.lineWidth = 2;
    draw.strokeRect(left + pair[1] * side - 0.5, top + pair[0] * side - 0.5, side, side);
  }
  canvas.pick = (x, y) => { const i = Math.floor((y - top) / side), j = Math.floor((x - left) / side); return i >= 0 && j >= 0 && i < n && j < n ? [i, j] : null; };
  part("route-pairs-bar").style.background = divergingBar();
  const best = cells.flatMap((row, i) => row.map((cell, j) => ({ i, j, more: cell && i !== j ? cell.share - cell.loads : -1 }))).sort((a, b) => b.more - a.more)[0];
  const told = (i, j) => (cells[i][j] ? `Of the ${cells[i][i].tokens} tokens of expert ${i}, ${percent(cells[i][j].share)} chose expert ${j} as well; their loads alone lead to ${percent(cells[i][j].loads)}` : `Expert ${i} served no token`);
  say("route-pairs-note", pair ? `Layer ${name}. ${told(...pair)}.` : `Layer ${name}, all tokens: how much more (orange) or less (blue) often two experts are chosen together than their loads alone lead to. Most: ${told(best.i, best.j).toLowerCase()}. With equal loads chance is ${percent((run.model.top_k - 1) / (run.model.experts - 1))}.`);
  canvas.setAttribute("aria-label", `Experts chosen together in layer ${name}. ${told(best.i, best.j)}. Arrow keys move over the cells.`);
  const shown = pair?.[0] ?? best.i;
  fillTable("route-pairs-table", [`with expert ${shown}`, "share", "by loads alone"], () => cells[shown].map((cell, j) => [j, cell ? percent(cell.share) : "none", cell ? percent(cell.loads) : "none"]));
}

// ---- hands
part("route-layer").onchange = (e) => set({ tableLayer: +e.target.value, expert: null });
part("route-free").onclick = () => set({ expert: null });
part("route-group").onchange = () => drawPanels();
const under = (canvas, e) => canvas.pick(...inside(canvas, e));
for (const name of ["route-sides", "route-load"]) part(name).onclick = (e) => { const expert = under(e.target, e); if (expert !== null) chooseExpert(state.tableLayer, expert); };
part("route-apart").onclick = (e) => { const l = under(e.target, e); if (l < run.model.moe_layers.length) set({ tableLayer: l, expert: null }); };
const pairs = part("route-pairs"), pointPair = (cell) => { if (`${cell}` !== `${pair}`) { pair = cell; drawPairs(state.tableLayer, run.model.moe_layers[state.tableLayer]); } };
pairs.onpointermove = (e) => pointPair(under(pairs, e));
pairs.onpointerleave = () => pointPair(null);
pairs.onclick = (e) => { const cell = under(pairs, e); if (cell) chooseExpert(state.tableLayer, cell[0]); };
pairs.onkeydown = (e) => {
  const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[e.key], last = run.model.experts - 1;
  if (!step) return;
  e.preventDefault();
  pointPair(pair ? pair.map((v, i) => Math.max(0, Math.min(last, v + step[i]))) : [0, 0]);
};
