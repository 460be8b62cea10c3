// What the numbers are: rows, means, shares. Everything drawn comes from these.

// A row is what a position read and who served it, after its token was given: writing word t happened in row t - 1.
function rowOf(word, side = state.side) {
  const at = run.words.at[word];
  const row = (at >= run.prompt_length && side === "write" ? at - 1 : at) - run.first_row;
  return row >= 0 && row < run.rows ? row : -1;
}
const span = () => [Math.min(state.from, state.to), Math.max(state.from, state.to)];
function selectedRows() {
  const [a, b] = span(), rows = [];
  for (let word = a; word <= b; word++) if (rowOf(word) >= 0 && (a === b || isShown(word))) rows.push(rowOf(word));
  return rows;
}
const axis = (choice, n) => (n === 1 ? [0] : choice === "all" ? [...Array(n).keys()] : [choice]);
function mean(array, rows, layer, head) { // (layers, heads, rows, last) -> last: over the layers, heads and rows asked for
  const [layers, heads, length, last] = array.shape, out = new Float32Array(last);
  const ls = axis(layer, layers), hs = axis(head, heads), n = ls.length * hs.length * rows.length || 1;
  for (const l of ls) for (const h of hs) for (const r of rows) {
    const start = ((l * heads + h) * length + r) * last;
    for (let m = 0; m < last; m++) out[m] += array.at(start + m);
  }
  return out.map((v) => v / n);
}
const onPicture = (rows, layer, head) => mean(run.mass, rows, layer, head).reduce((sum, v, i) => sum + (run.onPicture[i] ? v : 0), 0);
function expertShares(rows) { // (moe layers, experts): share of the rows that chose each expert
  const [layers, length, k] = run.chosen.shape, experts = run.model.experts;
  return [...Array(layers).keys()].map((l) => {
    const shares = new Float32Array(experts);
    for (const r of rows) for (let j = 0; j < k; j++) shares[run.chosen.raw[(l * length + r) * k + j]] += 1 / rows.length;
    return shares;
  });
}
function expertDetails(rows, l) { // one entry an expert, means over the rows; the weight counts 0 where not chosen
  const [, length, k] = run.chosen.shape, experts = run.model.experts, shares = expertShares(rows)[l];
  const found = [...Array(experts).keys()].map((e) => ({ expert: e, share: shares[e], score: 0, bias: run.bias.raw[l * experts + e], weight: 0 }));
  for (const r of rows) {
    for (let e = 0; e < experts; e++) found[e].score += run.scores.at((l * length + r) * experts + e) / rows.length;
    for (let j = 0; j < k; j++) {
      const at = (l * length + r) * k + j;
      found[run.chosen.raw[at]].weight += run.weights.raw[at] / rows.length;
    }
  }
  return found.sort((a, b) => b.share - a.share || b.score + b.bias - a.score - a.bias);
}
// One scale top for the whole run and each kind of map: a map never stretches itself to its own largest value.
function scaleTop() {
  const kind = `${state.layer === "all"} ${state.head === "all"}`;
  if (!(kind in run.tops)) {
    const values = [], [layers, heads] = run.attention.shape;
    const ls = state.layer === "all" ? ["all"] : axis("all", layers), hs = state.head === "all" ? ["all"] : axis("all", heads);
    const words = run.words.at.map((_, w) => w).filter((w) => rowOf(w) >= 0 && run.words.at[w] >= run.prompt_length);
    const step = Math.max(1, Math.ceil((words.length * ls.length * hs.length) / 400));
    let n = 0;
    for (const l of ls) for (const h of hs) for (const w of words) if (n++ % step === 0) values.push(Math.max(...mean(run.attention, [rowOf(w)], l, h)));
    values.sort((a, b) => a - b);
    const high = values[Math.floor(0.9 * (values.length - 1))] || 0;
    run.tops[kind] = [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1].find((top) => top >= high) || 1;
  }
  return run.tops[kind];
}
