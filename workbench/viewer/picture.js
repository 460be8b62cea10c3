// The picture with its grid, map and marks, and everything around it that speaks of the same numbers.

function geometry() { // of the picture shown: all in pixels of the resized picture, which is what is cut into patches
  const shown = run.pictures[state.picture];
  const [rows, columns] = shown.grid, cell = shown.patch * shown.merge;
  return { ...shown, cell, padded: [columns * shown.patch, rows * shown.patch], across: columns / shown.merge, down: rows / shown.merge };
}
const preview = { token: null, cell: null }; // what is pointed at; a click keeps it in the state
const shownToken = () => preview.token ?? state.token;
const shownExpert = () => preview.cell ?? state.expert;
const heat = () => mean(run.attention, selectedRows(), state.layer, state.head);
function drawPicture() {
  const canvas = part("picture");
  if (!run.pictures.length) {
    say("size", "none was given");
    canvas.parentElement.hidden = true;
    return;
  }
  canvas.parentElement.hidden = false;
  const { draw, g, scale, width, height } = pictureCanvas(canvas, roomFor(canvas), state.tab === "look" ? 400 : 260);
  say("size", `${g.original[0]} × ${g.original[1]} px, ${g.grid[1]} × ${g.grid[0]} patches`);
  draw.imageSmoothingEnabled = g.resized[0] * 3 > width;
  const values = run.kind === "run" && state.view !== "picture" ? shownMap().cells() : null;
  drawImage(draw, g, scale, values && state.view === "heat" && mapName() !== "served" ? PALE : "none");
  if (values) drawMap(draw, g, values, scale, width, height);
  drawGrid(draw, g, scale);
  drawClick(draw, g, scale);
  if (run.kind === "run") for (const overlay of overlays) overlay(draw, g, scale);
  if (run.kind === "run" && shownToken() !== null && shownToken() < g.tokens) outline(draw, shownToken(), g.across, g.cell * scale);
}
function pictureCanvas(canvas, room, tallest) { // sized for the picture shown with its padding, ready to be drawn on
  const g = geometry(), scale = Math.min(room / g.padded[0], tallest / g.padded[1]), [width, height] = g.padded.map((side) => side * scale);
  const draw = sized(canvas, width, height);
  drawPadding(draw, width, height);
  return { draw, g, scale, width, height, side: g.cell * scale };
}
const PALE = "saturate(35%)"; // so that the colours of the map stand out; where a browser has no filters, only less so
function drawImage(draw, g, scale, filter) {
  const image = run.images[state.picture];
  draw.filter = filter;
  if (image.naturalWidth) draw.drawImage(image, -g.offset[0] * scale, -g.offset[1] * scale, g.resized[0] * scale, g.resized[1] * scale);
  draw.filter = "none";
}
function drawVeil(draw, width, height) { // for the same reason
  draw.fillStyle = isDark() ? "rgba(18,21,27,.5)" : "rgba(255,255,255,.3)";
  draw.fillRect(0, 0, width, height);
}
const boxOf = (cell, across, side) => [(cell % across) * side, Math.floor(cell / across) * side, side, side];
function outline(draw, cell, across, side) {
  draw.strokeStyle = colour("accent");
  draw.lineWidth = 2.5;
  draw.strokeRect(...boxOf(cell, across, side));
}
function drawMap(draw, g, values, scale, width, height) {
  const one = shownMap(), patches = mapName() === "eye";
  const [across, side] = patches ? [g.grid[1], g.patch * scale] : [g.across, g.cell * scale];
  const shade = state.view === "spotlight" || mapName() === "served";
  if (!shade) drawVeil(draw, width, height);
  values.forEach((value, cell) => {
    if (value === null) return;
    draw.fillStyle = shade ? `rgba(10,12,18,${0.8 * (1 - one.light(value))})` : inkOf(one, value);
    draw.fillRect(...boxOf(cell, across, side));
  });
  if (mapName() === "experts" && side > 17) numberCells(draw, values, across, side);
  if (mapName() === "attention") drawSinks(draw, g, side);
  if (patches && patchShown() !== null) outline(draw, patchShown(), across, side);
}
function numberCells(draw, values, across, side) { // so that a colour is never the only thing that tells experts apart
  draw.textAlign = "center";
  values.forEach((value, cell) => {
    const x = (cell % across + 0.5) * side, y = (Math.floor(cell / across) + 0.5) * side;
    draw.lineWidth = 3;
    draw.strokeStyle = "rgba(255,255,255,.85)";
    draw.strokeText(value, x, y);
    draw.fillStyle = "#1d2430";
    draw.fillText(value, x, y);
  });
  draw.textAlign = "start";
}
const sinksShown = (g) => sinks().map((m) => m - g.first).filter((token) => token >= 0 && token < g.tokens);
function drawSinks(draw, g, side) {
  for (const token of sinksShown(g)) {
    const x = (token % g.across + 1) * side - 7, y = Math.floor(token / g.across) * side + 7;
    for (const [width, style] of [[4, "#fff"], [1.8, "#1d2430"]]) {
      draw.lineWidth = width;
      draw.strokeStyle = style;
      draw.beginPath();
      draw.arc(x, y, 4, 0, 7);
      draw.stroke();
    }
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
  const name = mapName(), one = MAPS[name], of = `${moment()} ${describeSpan()}`;
  fetchMap();
  drawParts(name);
  drawThumbs();
  for (const select of ["layer", "head"]) part(`${select}-label`).hidden = !["attention", "relative"].includes(name);
  for (const select of ["eye-layer", "eye-head"]) part(`${select}-label`).hidden = name !== "eye" || !run.eye;
  part("heat-scale").hidden = !one.ends || !run.pictures.length;
  part("maps").hidden = !run.pictures.length;
  say("look-guard", one.guard);
  if (!run.pictures.length) return say("heat-caption", "");
  const g = geometry(), values = one.cells(), unit = name === "eye" ? "patch" : "token", across = name === "eye" ? g.grid[1] : g.across;
  say("heat-caption", one.say(of));
  if (one.ends) {
    for (const [end, text] of [["heat-low", one.ends()[0]], ["heat-top", one.ends()[1]]]) say(end, text);
    part("heat-bar").style.background = state.view === "spotlight" ? "linear-gradient(90deg, #10131a, #aab1bd, #fff)" : one.bar ? one.bar() : gradient();
  }
  drawExpertKey(chosenMap() === "experts");
  const marked = name === "attention" ? sinksShown(g).length : 0;
  part("sink-note").hidden = name !== "attention";
  say("sink-note", marked ? `○ ${marked} attention ${marked === 1 ? "sink" : "sinks"}: 9 of 10 words give it at least ${SINK.times} times an even share, whichever word it is. What a sink gets says little.`
    : `No attention sinks here: no patch gets ${SINK.times} times an even share from 9 of 10 words.`);
  const best = values?.reduce((b, v, i) => (v !== null && (values[b] === null || v > values[b]) ? i : b), 0), token = shownToken();
  const told = (at, v) => `${capital(placeOf(at, g, unit))}: ${v === null ? "too little to divide by" : one.tell ? one.tell(at) : one.text(v)}.`;
  const numeric = Boolean(one.ends), most = values && numeric && values[best] !== null ? ` Most: ${placeOf(best, g, unit)}, ${one.text(values[best])}.` : "";
  part("picture").setAttribute("aria-label", `${one.say(of)}${most} Arrow keys move over the picture tokens.`);
  say("readout", token !== null && values && unit === "token" ? told(token, values[token]) : `${g.tokens} tokens of ${g.merge} × ${g.merge} patches.${most}`);
  fillTable("heat-table", ["row", ...Array.from({ length: across }, (_, c) => `col ${c + 1}`)], () => Array.from({ length: values ? values.length / across : 0 }, (_, r) =>
    [r + 1, ...values.slice(r * across, (r + 1) * across).map((v) => (v === null ? "none" : one.text(v)))]));
}
function thumb(image) { // a small picture for a button
  const small = new Image();
  small.src = image.src;
  small.alt = "";
  return small;
}
function drawThumbs() { // how much of the attention each of several pictures gets
  if (run.pictures.length < 2) return;
  const mass = mean(run.mass, selectedRows(), state.layer, state.head);
  [...part("pictures").children].forEach((button, i) => {
    const at = run.role_names.indexOf(`image ${i}`), share = at < 0 ? "" : `, ${percent(mass[at])}`;
    button.lastChild.textContent = `${i + 1}${share}`;
    button.setAttribute("aria-label", `picture ${i + 1}${share && `${share} of the attention`}`);
  });
}
const GROUPS = { picture: "image", question: "user", thought: "thought", answer: "answer", template: "rest" }; // and their colours
const groupOf = (role) => (role.startsWith("image") ? "picture" : { user: "question", thought: "thought", answer: "answer" }[role] || "template");
function drawParts(name) { // shares of picture, question, thought and answer
  const sums = Object.fromEntries(Object.keys(GROUPS).map((group) => [group, 0])), owed = name === "relevancy" && run.owed.get(lastWord());
  if (owed) owed.roles.forEach((role, i) => (sums[groupOf(role)] += owed.share[i]));
  else mean(run.mass, selectedRows(), state.layer, state.head).forEach((v, i) => (sums[groupOf(run.role_names[i])] += v));
  part("parts").replaceChildren();
  part("parts-legend").replaceChildren();
  for (const [group, share] of Object.entries(sums)) {
    const bar = make("div"), label = make("span", "", `${group} ${percent(share)}`);
    bar.style.cssText = `flex: ${share} 0 0; --c: var(--${GROUPS[group]})`;
    label.style.setProperty("--c", `var(--${GROUPS[group]})`);
    label.dataset.group = group;
    part("parts").append(bar);
    part("parts-legend").append(label);
  }
  const what = owed ? `${percent(sums.picture)} of what its logit owes goes to the picture.` : `${percent(sums.picture)} of it went to the picture.`;
  say("on-picture", run.pictures.length ? what : "There is no picture.");
}
function drawExpertKey(on) { // the colours of experts, each a button that chooses it
  const key = part("expert-key"), l = state.tableLayer;
  key.hidden = !on;
  if (!on) return;
  const values = MAPS.experts.cells();
  key.replaceChildren(...[...expertInks(l)].map(([e, ink]) => {
    const share = values.filter((v) => v === e).length / (values.length || 1), button = makeButton(share ? `${e} · ${percent(share)}` : `${e} · words`, () => chooseExpert(l, e));
    button.style.setProperty("--c", ink);
    button.setAttribute("aria-label", `Expert ${e}, first for ${percent(share)} of the picture; choose it`);
    button.setAttribute("aria-pressed", `${state.expert}` === `${[l, e]}`);
    return button;
  }));
}
const capital = (text) => text[0].toUpperCase() + text.slice(1);
function placeOf(cell, g, unit = "token") {
  const [across, side] = unit === "patch" ? [g.grid[1], g.patch] : [g.across, g.cell], row = Math.floor(cell / across), column = cell % across;
  const padding = column * side + g.offset[0] >= g.resized[0] || row * side + g.offset[1] >= g.resized[1];
  return `row ${row + 1}, column ${column + 1} (${unit} ${unit === "patch" ? cell : g.first + cell}${padding ? ", padding" : ""})`;
}
