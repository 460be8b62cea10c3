// What the numbers are: rows, means, shares. Everything drawn comes from these.

// A row is what a position read and who served it, after its token was given: writing word t happened in row t - 1.
function rowOf(word, side = state.side) {
  const at = run.words.at[word];
  const row = (at >= run.prompt_length && side === "write" ? at - 1 : at) - run.first_row;
  return row >= 0 && row < run.rows ? row : -1;
}
const span = () => [Math.min(state.from, state.to), Math.max(state.from, state.to)];
function selectedWords() {
  const [a, b] = span();
  return Array.from({ length: b - a + 1 }, (_, i) => a + i).filter((word) => a === b || isShown(word));
}
const rowsOf = (words) => words.map((word) => rowOf(word)).filter((row) => row >= 0);
const selectedRows = () => rowsOf(selectedWords());
const axis = (choice, n) => (n === 1 ? [0] : choice === "all" ? numbers(n) : [choice]);
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
function attentionTo(token) { // (rows): how much each looked at one visual token, counted over all pictures
  const [layers, heads, rows, last] = run.attention.shape, out = new Float32Array(rows);
  const ls = axis(state.layer, layers), hs = axis(state.head, heads);
  for (const l of ls) for (const h of hs) for (let r = 0; r < rows; r++) out[r] += run.attention.at(((l * heads + h) * rows + r) * last + token);
  return out.map((v) => v / (ls.length * hs.length));
}
// What depends on the run alone is counted once a run.
const once = (key, count) => (key in run.counted ? run.counted[key] : (run.counted[key] = count()));
// Visual tokens that nearly every word looks at, whichever it is: in 9 of 10 rows at least 5 times an even share.
const SINK = { times: 5, rows: 0.9 };
function sinks() {
  return once(`sinks ${state.layer} ${state.head}`, countSinks);
}
function countSinks() {
  const [layers, heads, rows, last] = run.attention.shape;
  const ls = axis(state.layer, layers), hs = axis(state.head, heads), often = new Uint32Array(last);
  for (let r = 0; r < rows; r++) {
    const sum = new Float32Array(last), least = (SINK.times * ls.length * hs.length) / (run.first_row + r + 1);
    for (const l of ls) for (const h of hs) {
      const start = ((l * heads + h) * rows + r) * last;
      for (let m = 0; m < last; m++) sum[m] += run.attention.at(start + m);
    }
    for (let m = 0; m < last; m++) if (sum[m] >= least) often[m]++;
  }
  return [...often.keys()].filter((m) => often[m] >= SINK.rows * rows);
}
const pictureTokens = () => run.pictures.reduce((sum, shown) => sum + shown.tokens, 0);
function lastOf({ shape, raw }, l, at) { // (layers, positions, K) -> the K of one place
  const [, count, k] = shape, start = (l * count + at) * k;
  return raw.subarray(start, start + k);
}
const pictureExperts = (l, token) => lastOf(run.chosen_picture, l, token); // the largest weight first; of all pictures' tokens
const rowExperts = (l, row) => lastOf(run.chosen, l, row); // as chosen
function firstExpert(l, row) { // the one with the largest weight; of equal ones the first chosen
  const weights = lastOf(run.weights, l, row);
  return rowExperts(l, row)[weights.indexOf(Math.max(...weights))];
}
// One scale top for the whole run and each kind of map: a map never stretches itself to its own largest value.
function scaleTop() {
  return once(`top ${state.layer === "all"} ${state.head === "all"}`, () => {
    const values = [], [layers, heads] = run.attention.shape;
    const ls = state.layer === "all" ? ["all"] : axis("all", layers), hs = state.head === "all" ? ["all"] : axis("all", heads);
    const words = run.words.at.map((_, w) => w).filter((w) => rowOf(w) >= 0 && run.words.at[w] >= run.prompt_length);
    const step = Math.max(1, Math.ceil((words.length * ls.length * hs.length) / 400));
    let n = 0;
    for (const l of ls) for (const h of hs) for (const w of words) if (n++ % step === 0) values.push(Math.max(...mean(run.attention, [rowOf(w)], l, h)));
    values.sort((a, b) => a - b);
    const high = values[Math.floor(0.9 * (values.length - 1))] || 0;
    return [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1].find((top) => top >= high) || 1;
  });
}
