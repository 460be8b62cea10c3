// Along the reply: how sure, how much on the picture; and which heads read the picture.

const written = () => run.words.at.map((_, w) => w).filter((w) => run.words.at[w] >= run.prompt_length && isShown(w));
const TRACKS = [["sure of the word", "faint", (w) => Math.exp(run.words.logprob[w] ?? -Infinity)],
  ["on the picture", "image", (w) => (rowOf(w) < 0 ? 0 : onPicture([rowOf(w)], state.layer, state.head))]];
function drawTracks() {
  const canvas = part("tracks"), words = written(), left = 104, room = roomFor(canvas), step = Math.min(48, (room - left) / Math.max(1, words.length));
  const draw = sized(canvas, room, 100), [a, b] = span(), values = TRACKS.map(([, , value]) => words.map(value));
  TRACKS.forEach(([name, ink], k) => {
    const base = 44 + 50 * k, tall = 36;
    draw.fillStyle = colour("soft");
    draw.fillText(name, 0, base - 14);
    draw.strokeStyle = colour("line");
    draw.beginPath();
    for (const y of [base + 0.5, base - tall + 0.5]) { draw.moveTo(left, y); draw.lineTo(left + step * words.length, y); }
    draw.stroke();
    draw.fillStyle = colour(ink);
    words.forEach((w, i) => {
      draw.globalAlpha = w >= a && w <= b ? 1 : 0.5;
      draw.fillRect(left + i * step + (step > 4 ? 1 : 0), base - tall * values[k][i], step > 4 ? step - 2 : step, tall * values[k][i]);
    });
    draw.globalAlpha = 1;
  });
  frameSpan(draw, words, left, step, 2, 96);
  canvas.setAttribute("aria-label", "Two rows of bars, one bar for each written word: its probability, and its share of attention on the picture");
  say("track-word", a === b && run.words.logprob[a] !== null ? `${quote(run.words.text[a])}: ${percent(Math.exp(run.words.logprob[a]))} sure, ${percent(onPicture(selectedRows(), state.layer, state.head))} on the picture.` : `${b - a + 1} words: ${percent(onPicture(selectedRows(), state.layer, state.head))} of their attention on the picture.`);
  canvas.pick = pickWord(words, left, step);
  fillTable("track-table", ["word", "probability", "entropy (nats)", "on the picture"], () => words.map((w, i) =>
    [legible(run.words.text[w]), percent(values[0][i]), (run.words.entropy[w] ?? 0).toFixed(2), percent(values[1][i])]));
}
// Of a row of bars, one a word, each `step` wide: the selected words framed, and the word under the mouse.
function frameSpan(draw, words, left, step, top, tall) {
  const [a, b] = span(), first = words.findIndex((w) => w >= a), last = words.findLastIndex((w) => w <= b);
  if (first < 0 || last < first) return;
  draw.strokeStyle = colour("accent");
  draw.lineWidth = 2;
  draw.strokeRect(left + first * step, top, (last - first + 1) * step, tall);
}
const pickWord = (words, left, step) => (x) => words[Math.max(0, Math.min(words.length - 1, Math.floor((x - left) / step)))];
function headShares() {
  const [layers, heads] = run.mass.shape, rows = selectedRows();
  return Array.from({ length: layers }, (_, l) => Array.from({ length: heads }, (_, h) => onPicture(rows, l, h)));
}
function drawHeads() {
  const canvas = part("heads"), shares = headShares(), rows = shares.length, columns = shares[0].length, left = 34, top = 16;
  const room = roomFor(canvas), wide = Math.min(90, (room - left) / columns), tall = Math.max(10, Math.min(20, 130 / rows));
  const draw = sized(canvas, room, top + rows * tall + 2);
  draw.fillStyle = colour("soft");
  for (let h = 0; h < columns; h++) if (wide > 20 || h % 4 === 0) draw.fillText(run.averaged ? "mean" : `${h}`, left + (h + 0.5) * wide - (run.averaged ? 14 : 3), 7);
  shares.forEach((line, l) => {
    if (tall > 13 || l % 3 === 0) { draw.fillStyle = colour("soft"); draw.fillText(`L${l}`, 0, top + (l + 0.5) * tall); }
    line.forEach((share, h) => {
      draw.fillStyle = ramp(share);
      draw.fillRect(left + h * wide, top + l * tall, wide - 2, tall - 2);
      const chosen = (state.layer === l || state.layer === "all") && (state.head === h || state.head === "all");
      if (chosen && !(state.layer === "all" && state.head === "all")) {
        draw.strokeStyle = colour("accent");
        draw.lineWidth = 2;
        draw.strokeRect(left + h * wide + 1, top + l * tall + 1, wide - 4, tall - 4);
      }
    });
  });
  canvas.pick = (x, y) => [Math.floor((y - top) / tall), Math.floor((x - left) / wide)];
  const all = shares.flat(), best = all.indexOf(Math.max(...all));
  const place = [rows > 1 && `layer ${Math.floor(best / columns)}`, columns > 1 && `head ${best % columns}`].filter(Boolean).join(", ");
  const most = `${place || "mean of all"}: ${percent(all[best])}`, why = `${run.averaged} are averaged, to keep so long a run small`;
  say("head-word", `Most: ${most}. ${run.averaged ? capital(why) : "Click a cell to look through that head"}.`);
  canvas.setAttribute("aria-label", `Share of attention on the picture for each layer and head; most in ${most}`);
  fillTable("head-table", ["layer", ...shares[0].map((_, h) => `head ${h}`)], () => shares.map((line, l) => [l, ...line.map(percent)]));
}
