// The picture with its grid, map and marks, and everything around it that speaks of the same numbers.

function geometry() { // of the picture shown: all in pixels of the resized picture, which is what is cut into patches
  const shown = run.pictures[state.picture];
  const [rows, columns] = shown.grid, cell = shown.patch * shown.merge;
  return { ...shown, cell, padded: [columns * shown.patch, rows * shown.patch], across: columns / shown.merge, down: rows / shown.merge };
}
const heat = () => mean(run.attention, selectedRows(), state.layer, state.head);
function drawPicture() {
  const canvas = part("picture");
  if (!run.pictures.length) {
    say("size", "none was given");
    canvas.parentElement.hidden = true;
    return;
  }
  canvas.parentElement.hidden = false;
  const g = geometry(), room = roomFor(canvas), scale = Math.min(room / g.padded[0], (state.tab === "look" ? 400 : 260) / g.padded[1]);
  const [width, height] = [g.padded[0] * scale, g.padded[1] * scale];
  const draw = sized(canvas, width, height);
  say("size", `${g.original[0]} × ${g.original[1]} px, ${g.grid[1]} × ${g.grid[0]} patches`);
  drawPadding(draw, width, height);
  draw.imageSmoothingEnabled = g.resized[0] * 3 > width;
  const image = run.images[state.picture];
  // pale under the map, so that the colours of the map stand out; where a browser has no filters, only less so
  if (run.kind === "run" && state.view === "heat") draw.filter = "saturate(35%)";
  if (image.naturalWidth) draw.drawImage(image, -g.offset[0] * scale, -g.offset[1] * scale, g.resized[0] * scale, g.resized[1] * scale);
  draw.filter = "none";
  if (run.kind === "run") {
    const values = heat(), top = scaleTop(), side = g.cell * scale;
    if (state.view === "heat") {
      draw.fillStyle = isDark() ? "rgba(18,21,27,.5)" : "rgba(255,255,255,.3)"; // so that colours of the map stand out
      draw.fillRect(0, 0, width, height);
    }
    for (let token = 0; token < g.tokens; token++) {
      const t = Math.min(1, values[g.first + token] / top);
      const x = (token % g.across) * side, y = Math.floor(token / g.across) * side;
      if (state.view === "heat") draw.fillStyle = ramp(0.1 + 0.9 * t, Math.min(1, t / 0.15) * (0.24 + 0.4 * t));
      else if (state.view === "spotlight") draw.fillStyle = `rgba(10,12,18,${0.8 * (1 - t)})`;
      else continue;
      draw.fillRect(x, y, side, side);
    }
  }
  drawGrid(draw, g, scale);
  drawClick(draw, g, scale);
  if (run.kind === "run") for (const overlay of overlays) overlay(draw, g, scale);
  const outlined = run.kind === "run" ? state.token : null;
  if (outlined !== null && outlined < g.tokens) {
    draw.strokeStyle = colour("accent");
    draw.lineWidth = 2.5;
    draw.strokeRect((outlined % g.across) * g.cell * scale, Math.floor(outlined / g.across) * g.cell * scale, g.cell * scale, g.cell * scale);
  }
}
function drawPadding(draw, width, height) { // black to the model; hatched here, so that nobody takes it for picture
  draw.fillStyle = colour("wash");
  draw.fillRect(0, 0, width, height);
  draw.strokeStyle = colour("line");
  draw.lineWidth = 2;
  draw.beginPath();
  for (let x = -height; x < width; x += 8) { draw.moveTo(x, height); draw.lineTo(x + height, 0); }
  draw.stroke();
}
function drawGrid(draw, g, scale) {
  const [columns, rows] = [g.grid[1], g.grid[0]], step = g.patch * scale;
  for (let k = 1; k < Math.max(columns, rows); k++) {
    const whole = k % g.merge === 0; // a line between tokens, else one between the patches of a token
    if (!whole && step < 7) continue;
    draw.strokeStyle = `rgba(20,24,34,${whole ? Math.min(0.34, step / 50) : 0.13})`; // thin where the grid is fine
    draw.lineWidth = 1;
    draw.beginPath();
    if (k < columns) { draw.moveTo(k * step, 0); draw.lineTo(k * step, rows * step); }
    if (k < rows) { draw.moveTo(0, k * step); draw.lineTo(columns * step, k * step); }
    draw.stroke();
  }
}
function drawClick(draw, g, scale) { // an answer such as click(x=0.365, y=0.317), in shares of the picture
  const found = /click\(\s*x\s*=\s*([\d.]+)\s*,\s*y\s*=\s*([\d.]+)\s*\)/.exec(run.answer || "");
  if (!found || +found[1] > 1 || +found[2] > 1) return;
  const x = (found[1] * g.resized[0] - g.offset[0]) * scale, y = (found[2] * g.resized[1] - g.offset[1]) * scale;
  for (const [width, style] of [[5, "#fff"], [2, "#1d2430"]]) {
    draw.lineWidth = width;
    draw.strokeStyle = style;
    draw.beginPath();
    draw.arc(x, y, 8, 0, 7);
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) { draw.moveTo(x + 4 * dx, y + 4 * dy); draw.lineTo(x + 14 * dx, y + 14 * dy); }
    draw.stroke();
  }
}
function drawLooking() { // everything around the picture that speaks of the same numbers
  const rows = selectedRows(), values = heat(), { model } = run, top = scaleTop();
  const layers = state.layer === "all" ? `mean of ${model.layers} layers` : `layer ${state.layer}`;
  const heads = run.averaged ? `mean of ${model.heads} heads` : state.head === "all" ? `${model.heads} heads` : `head ${state.head}`;
  const of = `Attention while ${moment()} ${describeSpan()}`;
  say("heat-caption", `${of}, ${layers}, ${heads}: share of each picture token. One scale for all words.`);
  say("heat-top", `${percent(top)} or more`);
  part("heat-bar").style.background = state.view === "spotlight" ? "linear-gradient(90deg, #10131a, #aab1bd, #fff)" : gradient();
  const mass = mean(run.mass, rows, state.layer, state.head), groups = { picture: 0, question: 0, thought: 0, answer: 0, template: 0 };
  run.role_names.forEach((name, i) => {
    const group = run.onPicture[i] ? "picture" : { user: "question", thought: "thought", answer: "answer" }[name] || "template";
    groups[group] += mass[i];
  });
  const inks = { picture: "image", question: "user", thought: "thought", answer: "answer", template: "rest" };
  part("parts").replaceChildren();
  part("parts-legend").replaceChildren();
  for (const [group, share] of Object.entries(groups)) {
    const bar = make("div"), label = make("span", "", `${group} ${percent(share)}`);
    bar.style.cssText = `flex: ${share} 0 0; --c: var(--${inks[group]})`;
    label.style.setProperty("--c", `var(--${inks[group]})`);
    label.dataset.group = group;
    part("parts").append(bar);
    part("parts-legend").append(label);
  }
  say("on-picture", run.pictures.length ? `${percent(groups.picture)} of it went to the picture.` : "There is no picture.");
  if (!run.pictures.length) return;
  const g = geometry(), best = [...values.slice(g.first, g.first + g.tokens)].reduce((b, v, i, all) => (v > all[b] ? i : b), 0);
  part("picture").setAttribute("aria-label", `${of}: most, ${percent(values[g.first + best])}, on ${placeOf(best, g)}. Arrow keys move over the picture tokens.`);
  say("readout", state.token === null ? `${g.tokens} tokens of ${g.merge} × ${g.merge} patches. Most: ${placeOf(best, g)}, ${percent(values[g.first + best])}.` : `${capital(placeOf(state.token, g))}: ${percent(values[g.first + state.token])}`);
  fillTable("heat-table", ["row", ...Array.from({ length: g.across }, (_, c) => `col ${c + 1}`)], Array.from({ length: g.down }, (_, r) =>
    [r + 1, ...Array.from({ length: g.across }, (_, c) => percent(values[g.first + r * g.across + c]))]));
}
const capital = (text) => text[0].toUpperCase() + text.slice(1);
function placeOf(token, g) {
  const row = Math.floor(token / g.across), column = token % g.across;
  const padding = column * g.cell + g.offset[0] >= g.resized[0] || row * g.cell + g.offset[1] >= g.resized[1];
  return `row ${row + 1}, column ${column + 1} (token ${g.first + token}${padding ? ", padding" : ""})`;
}
