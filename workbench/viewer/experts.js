// Which experts served the selected words, and why these.

function expertAxis(draw, left, wide, y) {
  const every = [1, 2, 4, 8, 16].find((n) => n * wide > 22) || 16;
  draw.fillStyle = colour("soft");
  for (let e = 0; e < run.model.experts; e += every) draw.fillText(`${e}`, left + (e + 0.5) * wide - (e > 9 ? 7 : 3), y);
}
const shareInk = (share) => (share ? ramp(0.08 + 0.84 * share) : colour("wash"));
function drawExperts() {
  const { moe_layers: layers, experts, top_k: k } = run.model, rows = selectedRows(), shares = expertShares(rows);
  const canvas = part("experts"), left = 26, top = 18, room = roomFor(canvas), wide = (room - left) / experts;
  const tall = Math.max(9, Math.min(40, 360 / layers.length)), gap = wide > 8 ? 2 : 1;
  const draw = sized(canvas, room, top + layers.length * tall);
  expertAxis(draw, left, wide, 8);
  layers.forEach((name, l) => {
    if (tall > 11 || l % 2 === 0) { draw.fillStyle = colour(l === state.tableLayer ? "accent" : "soft"); draw.fillText(`L${name}`, 0, top + (l + 0.5) * tall); }
    shares[l].forEach((share, e) => {
      draw.fillStyle = shareInk(share);
      draw.fillRect(left + e * wide, top + l * tall, wide - gap, tall - gap - 1);
      if (share && l === state.tableLayer) {
        draw.strokeStyle = colour("accent");
        draw.lineWidth = 2;
        draw.strokeRect(left + e * wide, top + l * tall, wide - gap, tall - gap - 1);
      }
    });
  });
  if (state.expert) {
    draw.strokeStyle = colour("ink");
    draw.lineWidth = 2;
    draw.strokeRect(left + state.expert[1] * wide - 1, top + state.expert[0] * tall - 1, wide - gap + 2, tall - gap + 1);
  }
  canvas.pick = (x, y) => [Math.floor((y - top) / tall), Math.floor((x - left) / wide)];
  const chance = k / experts, words = rows.length === 1 ? `${moment()} ${describeSpan()}` : `${rows.length} words, ${describeSpan()}`;
  say("expert-words", words);
  const mark = make("b");
  mark.style.left = `${100 * chance}%`;
  part("expert-bar").style.background = gradient();
  part("expert-bar").replaceChildren(mark);
  say("chance", `Each layer picks ${k} of ${experts} experts for a word; the line marks chance, ${percent(chance)}.`);
  const [l, e] = shownExpert() || [];
  say("expert-readout", shownExpert() ? `Layer ${layers[l]}, expert ${e}: chosen for ${percent(shares[l][e])} of the selected words, chance ${percent(chance)}.` : "Point at a cell for its share. Click it to keep it: what it served stays bright on the picture and underlined in the words.");
  canvas.setAttribute("aria-label", `Experts chosen for ${describeSpan()}: ${layers.map((name, i) => `layer ${name}: ${[...shares[i]].map((s, x) => [s, x]).filter(([s]) => s > chance).map(([, x]) => x).join(", ")}`).join("; ")}. Up and down choose a layer, left and right an expert.`);
  fillTable("share-table", ["expert", ...layers.map((name) => `L${name}`)], () => Array.from({ length: experts }, (_, x) => [x, ...shares.map((s) => percent(s[x]))]));
  const details = expertDetails(rows, state.tableLayer), listed = details.filter((d) => d.share > 0).slice(0, 8);
  const shown = listed.concat(details.filter((d) => d.share === 0).slice(0, 2));
  const one = rows.length === 1, made = table(["expert", "score", "bias", "sum", "weight"], shown.map((d) =>
    [d.expert + (one || !d.share ? "" : ` (${percent(d.share)})`), d.score.toFixed(2), signed(d.bias), fixed(d.score + d.bias), d.share ? d.weight.toFixed(2) : "none"]), (i) => (shown[i].share ? "in" : ""));
  made.dataset.part = "expert-table";
  part("expert-table").replaceWith(made);
  part("table-layer").value = state.tableLayer;
}
