// The linked viewer of one run. Plain JavaScript without dependencies, in a shadow root, so that every host shows it alike:
//   const viewer = kimiViewer(element); viewer.show(payload);      (payload: see payload.py)
// One small state (a span of words, layer, head, view) drives every panel; each draw function below draws one of them.
// Text from the run enters the page as text nodes only.
function kimiViewer(host) {
  "use strict";
  const CSS = `@CSS@`;
  const SKELETON = `
  <div class="kv hide-template waiting"><div class="cols">
    <section class="look" aria-label="Picture">
      <h2>Picture <i data-part="size"></i></h2>
      <div class="controls" data-part="pictures" hidden></div>
      <div class="stage"><canvas data-part="picture" tabindex="0" role="img"></canvas></div>
      <div class="later">
        <div class="scale"><span>0</span><div class="bar" data-part="heat-bar"></div><span data-part="heat-top"></span></div>
        <p class="note" data-part="heat-caption"></p>
        <div class="controls">
          <label>Layer <select data-part="layer"></select></label><label>Head <select data-part="head"></select></label>
          <div class="pick" role="group" aria-label="How the picture is shown" data-part="views"></div>
        </div>
        <p class="note readout" data-part="readout" aria-live="polite"></p>
        <div class="parts" data-part="parts" aria-hidden="true"></div>
        <div class="legend" data-part="parts-legend"></div>
        <p class="say">Attention is where it read from, not why it answered. <span data-part="on-picture"></span></p>
        <details data-part="heat-table"><summary>Numbers as a table</summary><div class="scroll"></div></details>
      </div>
    </section>
    <div class="middle"><section class="words" aria-label="Conversation">
      <h2>Conversation <i class="later">click a word, or ← →</i></h2>
      <div class="strip" data-part="strip" role="listbox" aria-multiselectable="true" aria-label="Words of the conversation" tabindex="0"></div>
      <p class="note" data-part="note"></p>
      <div class="later">
        <div class="controls">
          <div class="pick" role="group" aria-label="Which moment is shown" data-part="sides"></div>
          <label><input type="checkbox" data-part="template"> template words</label>
        </div>
      </div>
    </section>
    <section class="along later" aria-label="Along the reply, and heads">
        <h2>Along the reply <i>0 to 100%</i></h2>
        <canvas class="wide" data-part="tracks" role="img"></canvas>
        <p class="note" data-part="track-word"></p>
        <details data-part="track-table"><summary>Numbers as a table</summary><div class="scroll"></div></details>
        <h2 class="next">Which heads read the picture</h2>
        <canvas class="wide" data-part="heads" role="img"></canvas>
        <div class="scale"><span>0</span><div class="bar" data-part="head-bar"></div><span>100% of its attention</span></div>
        <p class="note" data-part="head-word"></p>
        <details data-part="head-table"><summary>Numbers as a table</summary><div class="scroll"></div></details>
    </section></div>
    <section class="inside" aria-label="Experts">
      <h2>Experts <i class="later" data-part="expert-words"></i></h2>
      <p class="soon">Which experts worked appears when the reply is complete.</p>
      <div class="later">
        <canvas class="wide" data-part="experts" tabindex="0" role="img"></canvas>
        <div class="scale"><span>0</span><div class="bar" data-part="expert-bar"></div><span>100% of the words</span></div>
        <p class="note" data-part="chance"></p>
        <p class="note readout" data-part="expert-readout" aria-live="polite"></p>
        <h2 class="next">Why these, in layer <select data-part="table-layer" aria-label="Layer of the table"></select></h2>
        <table data-part="expert-table"></table>
        <p class="say">Score plus bias decides who is chosen; the weight comes from the score alone. The bias keeps the load even.</p>
        <details data-part="share-table"><summary>All layers as a table</summary><div class="scroll"></div></details>
      </div>
    </section>
  </div><div class="foot" data-part="foot"></div></div>`;

  const root = host.shadowRoot || host.attachShadow({ mode: "open" });
  root.innerHTML = `<style>${CSS}</style>${SKELETON}`;
  const frame = root.querySelector(".kv");
  const part = (name) => root.querySelector(`[data-part="${name}"]`);
  const state = { from: 0, to: 0, layer: "all", head: "all", tableLayer: 0, view: "heat", side: "write", picture: 0, token: null, expert: null };
  let run = null; // what `open` makes of a payload
  let finished = null; // the last payload of a run
  let latest = 0; // a slow decode must not overwrite a newer run

  // ---- small helpers ----------------------------------------------------------------------------------------------
  function make(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }
  const say = (name, text) => (part(name).textContent = text);
  const percent = (v) => (v >= 0.0995 ? `${Math.round(100 * v)}%` : v >= 0.0005 || v === 0 ? `${+(100 * v).toFixed(1)}%` : "<0.1%");
  const quote = (text) => `“${text.trim() || "␣"}”`;
  const colour = (name) => getComputedStyle(frame).getPropertyValue(`--${name}`).trim();
  const isDark = () => frame.dataset.theme === "dark";
  const MAGMA = [[252, 253, 191], [254, 176, 120], [241, 96, 93], [183, 55, 121], [114, 31, 129], [44, 17, 95]];
  function ramp(t, alpha = 1) { // 0..1; the high end is the one that stands out: dark on light, light on dark
    const stops = isDark() ? [[34, 40, 52], ...MAGMA.slice().reverse()] : MAGMA;
    const at = Math.max(0, Math.min(0.9999, t)) * (stops.length - 1), i = Math.floor(at);
    const mixed = stops[i].map((a, k) => Math.round(a + (stops[i + 1][k] - a) * (at - i)));
    return `rgba(${mixed},${alpha})`;
  }
  const gradient = () => `linear-gradient(90deg, ${[0, 0.2, 0.4, 0.6, 0.8, 1].map((t) => ramp(t)).join(", ")})`;
  function sized(canvas, width, height) { // a canvas in CSS pixels, sharp on every screen
    const dots = window.devicePixelRatio || 1;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    canvas.width = Math.round(width * dots);
    canvas.height = Math.round(height * dots);
    const draw = canvas.getContext("2d");
    draw.scale(dots, dots);
    draw.font = `11.5px ${getComputedStyle(frame).fontFamily}`;
    draw.textBaseline = "middle";
    return draw;
  }
  function roomFor(canvas) {
    const box = getComputedStyle(canvas.parentElement);
    return Math.max(60, canvas.parentElement.clientWidth - parseFloat(box.paddingLeft) - parseFloat(box.paddingRight));
  }
  function table(head, rows, mark = () => "") {
    const made = make("table"), top = made.createTHead().insertRow(), body = made.createTBody();
    for (const text of head) top.append(Object.assign(make("th", "", text), { scope: "col" }));
    rows.forEach((cells, i) => {
      const row = body.insertRow();
      row.className = mark(i);
      cells.forEach((text, k) => row.append(k ? make("td", "", text) : Object.assign(make("th", "", text), { scope: "row" })));
    });
    return made;
  }
  const fillTable = (name, ...rest) => part(name).open && part(name).querySelector(".scroll").replaceChildren(table(...rest));

  // ---- a payload's arrays ------------------------------------------------------------------------------------------
  async function unpack({ shape, kind, data }) {
    const squeezed = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
    const stream = new Blob([squeezed]).stream().pipeThrough(new DecompressionStream("deflate"));
    const bytes = await new Response(stream).arrayBuffer();
    const raw = kind === "float32" ? new Float32Array(bytes) : kind.endsWith("16") ? new Uint16Array(bytes) : new Uint8Array(bytes);
    const steps = { root8: 256, unit8: 256, unit16: 65536 }[kind];
    if (!steps) return { shape, raw, at: (i) => raw[i] };
    const value = Float32Array.from({ length: steps }, (_, q) => (kind === "root8" ? (q / 255) ** 2 : q / (steps - 1)));
    return { shape, raw, at: (i) => value[raw[i]] };
  }
  async function open(payload) {
    const names = ["attention", "mass", "chosen", "weights", "scores", "bias"];
    const arrays = await Promise.all(names.map((name) => unpack(payload[name])));
    const opened = { ...payload, ...Object.fromEntries(names.map((name, i) => [name, arrays[i]])), tops: {} };
    opened.onPicture = payload.role_names.map((name) => name.startsWith("image"));
    return opened;
  }
  function images(payload) {
    return Promise.all(payload.pictures.map(async ({ src }) => {
      const image = new Image();
      image.src = src;
      await image.decode().catch(() => {});
      return image;
    }));
  }

  // ---- what the numbers are ----------------------------------------------------------------------------------------
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

  // ---- words -------------------------------------------------------------------------------------------------------
  const TURNS = { question: "question", thought: "thought", answer: "answer" };
  function isTemplate(word) {
    const role = run.words.role[word];
    return role === "special" || role === "system";
  }
  const isShown = (word) => !isTemplate(word) || !frame.classList.contains("hide-template");
  const choosable = () => run.words.at.map((_, w) => w).filter((w) => rowOf(w) >= 0 && isShown(w));
  function describeSpan() {
    const [a, b] = span();
    if (a === b) return quote(run.words.text[a]);
    const text = run.words.text.slice(a, b + 1).filter((_, i) => isShown(a + i)).join("").trim();
    return quote(text.length > 40 ? `${text.slice(0, 38)}…` : text);
  }
  function moment() {
    const [a] = span();
    return run.words.at[a] < run.prompt_length || state.side === "read" ? "reading" : "writing";
  }
  function buildStrip() {
    const strip = part("strip"), turns = {};
    strip.replaceChildren();
    for (const name of Object.values(TURNS)) {
      const turn = make("div", `turn ${name}`), id = `label-${name}`;
      turn.setAttribute("role", "group");
      turn.setAttribute("aria-labelledby", id);
      const label = Object.assign(make("span", "", name), { id });
      turns[name] = make("div");
      turn.append(label, turns[name]);
      strip.append(turn);
    }
    let turn = "question";
    run.words.role.forEach((role, w) => {
      if (role === "thought" || role === "answer") turn = role;
      const text = run.words.text[w], tok = make("span", "tok");
      // the blank before a word stays outside it, so that the mark of the selection hugs the word
      const blank = /^ \S/.test(text);
      tok.textContent = blank ? text.slice(1) : text.replace(/\n/g, "⏎\n") || "∅";
      tok.classList.toggle("blank", !text.trim());
      tok.classList.toggle("template", isTemplate(w));
      tok.classList.toggle("off", rowOf(w, "read") < 0 && rowOf(w, "write") < 0);
      tok.id = `word-${w}`;
      tok.dataset.word = w;
      tok.setAttribute("role", "option");
      const begun = turns[turn].querySelector(".tok:not(.template)");
      turns[turn].append(blank && begun ? " " : "", tok);
    });
    for (const [name, box] of Object.entries(turns)) {
      const empty = ![...box.children].some((tok) => !tok.classList.contains("template"));
      box.parentElement.hidden = empty && name === "thought";
      if (empty && name === "answer") {
        box.parentElement.classList.add("empty");
        box.prepend(make("span", "", "none was written"));
      }
    }
    turns.answer.classList.toggle("long", run.answer.length > 60);
    if (run.truth && (run.answer || run.finished)) {
      const { right, answer } = run.truth;
      const text = right ? "✓ right, as the scene was drawn" : `✗ wrong, the scene says: ${answer}`;
      turns.answer.parentElement.append(make("div", `verdict ${right ? "right" : "wrong"}`, text));
    }
  }
  function drawStrip() {
    const [a, b] = span();
    for (const tok of part("strip").querySelectorAll(".tok")) {
      const on = +tok.dataset.word >= a && +tok.dataset.word <= b;
      tok.classList.toggle("sel", on);
      tok.setAttribute("aria-selected", on);
    }
    part("strip").setAttribute("aria-activedescendant", `word-${state.to}`);
  }

  // ---- picture -----------------------------------------------------------------------------------------------------
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
    const g = geometry(), room = roomFor(canvas), scale = Math.min(room / g.padded[0], 400 / g.padded[1]);
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

  // ---- along the reply, heads --------------------------------------------------------------------------------------
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
    const first = words.findIndex((w) => w >= a), last = words.findLastIndex((w) => w <= b);
    if (first >= 0 && last >= first) {
      draw.strokeStyle = colour("accent");
      draw.lineWidth = 2;
      draw.strokeRect(left + first * step, 2, (last - first + 1) * step, 96);
    }
    canvas.setAttribute("aria-label", "Two rows of bars, one bar for each written word: its probability, and its share of attention on the picture");
    say("track-word", a === b && run.words.logprob[a] !== null ? `${quote(run.words.text[a])}: ${percent(Math.exp(run.words.logprob[a]))} sure, ${percent(onPicture(selectedRows(), state.layer, state.head))} on the picture.` : `${b - a + 1} words: ${percent(onPicture(selectedRows(), state.layer, state.head))} of their attention on the picture.`);
    canvas.pick = (x) => words[Math.max(0, Math.min(words.length - 1, Math.floor((x - left) / step)))];
    fillTable("track-table", ["word", "probability", "entropy (nats)", "on the picture"], words.map((w, i) =>
      [run.words.text[w].trim() || "␣", percent(values[0][i]), (run.words.entropy[w] ?? 0).toFixed(2), percent(values[1][i])]));
  }
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
    fillTable("head-table", ["layer", ...shares[0].map((_, h) => `head ${h}`)], shares.map((line, l) => [l, ...line.map(percent)]));
  }

  // ---- experts -----------------------------------------------------------------------------------------------------
  function drawExperts() {
    const { moe_layers: layers, experts, top_k: k } = run.model, rows = selectedRows(), shares = expertShares(rows);
    const canvas = part("experts"), left = 26, top = 18, room = roomFor(canvas), wide = (room - left) / experts;
    const tall = Math.max(9, Math.min(40, 360 / layers.length)), gap = wide > 8 ? 2 : 1;
    const draw = sized(canvas, room, top + layers.length * tall);
    const every = [1, 2, 4, 8, 16].find((n) => n * wide > 22) || 16;
    draw.fillStyle = colour("soft");
    for (let e = 0; e < experts; e += every) draw.fillText(`${e}`, left + (e + 0.5) * wide - (e > 9 ? 7 : 3), 8);
    layers.forEach((name, l) => {
      if (tall > 11 || l % 2 === 0) { draw.fillStyle = colour(l === state.tableLayer ? "accent" : "soft"); draw.fillText(`L${name}`, 0, top + (l + 0.5) * tall); }
      shares[l].forEach((share, e) => {
        draw.fillStyle = share ? ramp(0.08 + 0.84 * share) : colour("wash");
        draw.fillRect(left + e * wide, top + l * tall, wide - gap, tall - gap - 1);
        if (share && l === state.tableLayer) {
          draw.strokeStyle = colour("accent");
          draw.lineWidth = 2;
          draw.strokeRect(left + e * wide, top + l * tall, wide - gap, tall - gap - 1);
        }
      });
    });
    canvas.pick = (x, y) => [Math.floor((y - top) / tall), Math.floor((x - left) / wide)];
    const chance = k / experts, words = rows.length === 1 ? `${moment()} ${describeSpan()}` : `${rows.length} words, ${describeSpan()}`;
    say("expert-words", words);
    const mark = make("b");
    mark.style.left = `${100 * chance}%`;
    part("expert-bar").style.background = gradient();
    part("expert-bar").replaceChildren(mark);
    say("chance", `Each layer picks ${k} of ${experts} experts for a word; the line marks chance, ${percent(chance)}.`);
    const [l, e] = state.expert || [];
    say("expert-readout", state.expert ? `Layer ${layers[l]}, expert ${e}: chosen for ${percent(shares[l][e])} of the selected words, chance ${percent(chance)}.` : "Point at a cell for its share; click a layer to see why.");
    canvas.setAttribute("aria-label", `Experts chosen for ${describeSpan()}: ${layers.map((name, i) => `layer ${name}: ${[...shares[i]].map((s, x) => [s, x]).filter(([s]) => s > chance).map(([, x]) => x).join(", ")}`).join("; ")}. Up and down choose a layer.`);
    fillTable("share-table", ["expert", ...layers.map((name) => `L${name}`)], Array.from({ length: experts }, (_, x) => [x, ...shares.map((s) => percent(s[x]))]));
    const details = expertDetails(rows, state.tableLayer), listed = details.filter((d) => d.share > 0).slice(0, 8);
    const shown = listed.concat(details.filter((d) => d.share === 0).slice(0, 2));
    const signed = (v) => (v < 0 ? "−" : "+") + Math.abs(v).toFixed(2);
    const one = rows.length === 1, made = table(["expert", "score", "bias", "sum", "weight"], shown.map((d) =>
      [d.expert + (one || !d.share ? "" : ` (${percent(d.share)})`), d.score.toFixed(2), signed(d.bias), (d.score + d.bias).toFixed(2), d.share ? d.weight.toFixed(2) : "none"]), (i) => (shown[i].share ? "in" : ""));
    made.dataset.part = "expert-table";
    part("expert-table").replaceWith(made);
    part("table-layer").value = state.tableLayer;
  }

  // ---- everything --------------------------------------------------------------------------------------------------
  function draw() {
    if (!run) return;
    drawPicture();
    if (run.kind !== "run") return;
    for (const [name, key] of [["layer", "layer"], ["head", "head"]]) part(name).value = state[key];
    for (const name of ["views", "sides"]) for (const button of part(name).children) button.setAttribute("aria-pressed", button.dataset.value === state[name === "views" ? "view" : "side"]);
    part("head-bar").style.background = gradient();
    drawStrip();
    drawLooking();
    drawTracks();
    drawHeads();
    drawExperts();
  }
  function set(changes) {
    Object.assign(state, changes);
    draw();
  }
  function select(word, extend = false) {
    if (!run || run.kind !== "run" || rowOf(word) < 0) return;
    set(extend ? { to: word } : { from: word, to: word });
    root.getElementById(`word-${word}`)?.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
  function options(name, values, labels) {
    part(name).replaceChildren(...values.map((value, i) => Object.assign(make("option", "", labels[i]), { value })));
  }
  function choices(name, values, pick) {
    part(name).replaceChildren(...values.map(([value, text]) => {
      const button = make("button", "", text);
      button.type = "button";
      button.dataset.value = value;
      button.onclick = () => pick(value);
      return button;
    }));
  }
  function buildControls() {
    const { layers, heads, moe_layers } = run.model, numbers = (n) => [...Array(n).keys()];
    options("layer", ["all", ...numbers(layers)], ["all", ...numbers(layers)]);
    options("head", ["all", ...numbers(heads)], ["all", ...numbers(heads)]);
    options("table-layer", numbers(moe_layers.length), moe_layers);
    part("head").disabled = run.averaged !== "";
    part("layer").disabled = run.averaged === "layers and heads";
    part("pictures").hidden = run.pictures.length < 2;
    choices("pictures", run.pictures.map((_, i) => [i, `picture ${i + 1}`]), (i) => set({ picture: i, token: null }));
  }
  function foot() {
    const { name, device, dtype, versions } = run.model;
    const parts = [`Weights: ${name}`, `on ${device === "cpu" ? "CPU" : device}${dtype ? `, ${dtype}` : ""}`, ...Object.entries(versions || {}).map(([k, v]) => `${k} ${v}`)];
    say("foot", parts.join(" · "));
  }
  function showProgress() {
    const strip = part("strip");
    strip.replaceChildren();
    const writing = run.answer ? "answer" : run.thought ? "thought" : "";
    for (const name of ["question", "thought", "answer"]) {
      const turn = make("div", `turn ${name}`), box = make("div", `plain${name === writing ? " caret" : ""}${run[name].length > 60 ? " long" : ""}`, run[name]);
      turn.hidden = name !== "question" && !run[name];
      turn.append(make("span", "", name), box);
      strip.append(turn);
    }
  }
  async function show(payload) {
    const turn = ++latest;
    if (payload?.kind === "none") payload = finished; // nothing came of it: back to the last run
    if (!payload) return;
    if (payload.kind === "run") finished = payload;
    const known = run && JSON.stringify(run.pictures) === JSON.stringify(payload.pictures);
    const [opened, loaded] = await Promise.all([payload.kind === "run" ? open(payload) : payload, known ? run.images : images(payload)]);
    if (turn !== latest) return;
    const started = payload.kind === "progress" && run?.kind !== "progress";
    run = { ...opened, images: loaded };
    frame.classList.toggle("waiting", run.kind !== "run");
    say("note", run.note || "");
    part("note").hidden = !run.note;
    foot();
    if (run.kind === "run") {
      Object.assign(state, { layer: "all", head: "all", side: "write", picture: 0, token: null, expert: null });
      state.tableLayer = Math.min(state.tableLayer, run.model.moe_layers.length - 1);
      buildStrip();
      buildControls();
      const first = (role) => run.words.role.findIndex((r, w) => r === role && rowOf(w) >= 0 && run.words.text[w].trim());
      let chosen = [first("answer"), first("thought"), first("user")].find((w) => w >= 0) ?? 0;
      if (run.start === "looking" && run.pictures.length) { // the word that was read most from the picture
        const share = (w) => onPicture([rowOf(w)], "all", "all"), words = written().filter((w) => rowOf(w) >= 0);
        chosen = words.reduce((best, w) => (share(w) > share(best) ? w : best), chosen);
      }
      Object.assign(state, { from: chosen, to: chosen });
    } else showProgress();
    draw();
    host.dataset.showing = run.kind;
    // on a phone the answer would be written below the fold
    if (started && host.clientWidth < 580) host.scrollIntoView({ behavior: "smooth", block: "start" });
  }

  // ---- hands -------------------------------------------------------------------------------------------------------
  choices("views", [["heat", "heat"], ["spotlight", "spotlight"], ["picture", "picture"]], (view) => set({ view }));
  choices("sides", [["write", "while writing it"], ["read", "after reading it"]], (side) => {
    set({ side });
    if (!selectedRows().length) select(choosable().at(-1)); // the last word of all was written, but never read back
  });
  const number = (value) => (value === "all" ? value : +value);
  part("layer").onchange = (e) => {
    const layer = number(e.target.value), moe = run.model.moe_layers.indexOf(layer);
    set({ layer, tableLayer: moe < 0 ? state.tableLayer : moe });
  };
  part("head").onchange = (e) => set({ head: number(e.target.value) });
  part("table-layer").onchange = (e) => set({ tableLayer: +e.target.value });
  part("template").onchange = (e) => {
    frame.classList.toggle("hide-template", !e.target.checked);
    if (!selectedRows().length) select(choosable().at(-1));
    else draw();
  };
  for (const details of root.querySelectorAll("details")) details.ontoggle = draw;
  let dragging = false;
  part("strip").onpointerdown = (e) => {
    const tok = e.target.closest(".tok");
    if (!tok) return;
    dragging = e.pointerType === "mouse";
    select(+tok.dataset.word, e.shiftKey);
    part("strip").focus({ preventScroll: true });
    e.preventDefault();
  };
  part("strip").onpointerover = (e) => {
    const tok = dragging && e.buttons && e.target.closest(".tok");
    if (tok) select(+tok.dataset.word, true);
  };
  window.addEventListener("pointerup", () => (dragging = false));
  part("strip").onkeydown = (e) => {
    if (run?.kind !== "run" || e.altKey || e.ctrlKey || e.metaKey) return;
    const words = choosable(), at = words.indexOf(state.to);
    const here = root.getElementById(`word-${state.to}`).getBoundingClientRect();
    const line = (up) => { // the nearest word on the next line up or down
      const rest = words.map((w) => [w, root.getElementById(`word-${w}`).getBoundingClientRect()])
        .filter(([, box]) => (up ? box.bottom < here.top + 4 : box.top > here.bottom - 4));
      const far = ([, box]) => 4 * Math.abs(box.top - here.top) + Math.abs(box.left - here.left);
      return rest.sort((a, b) => far(a) - far(b))[0]?.[0];
    };
    const aim = { ArrowRight: words[at + 1], ArrowLeft: words[at - 1], Home: words[0], End: words.at(-1), ArrowUp: line(true), ArrowDown: line(false) };
    if (!(e.key in aim)) return;
    e.preventDefault();
    if (aim[e.key] !== undefined) select(aim[e.key], e.shiftKey);
  };
  const inside = (canvas, e) => {
    const box = canvas.getBoundingClientRect();
    return [e.clientX - box.left, e.clientY - box.top];
  };
  const picture = part("picture");
  const tokenUnder = (e) => {
    if (run?.kind !== "run" || !run.pictures.length) return null;
    const g = geometry(), [x, y] = inside(picture, e), side = picture.clientWidth / g.across;
    const column = Math.floor(x / side), row = Math.floor(y / side);
    return column >= 0 && row >= 0 && column < g.across && row < g.down ? row * g.across + column : null;
  };
  const point = (token) => { if (token !== state.token) { state.token = token; drawPicture(); drawLooking(); } };
  picture.onpointermove = picture.onpointerdown = (e) => point(tokenUnder(e));
  picture.onpointerleave = () => run?.kind === "run" && root.activeElement !== picture && point(null);
  picture.onblur = () => run?.kind === "run" && point(null);
  picture.onkeydown = (e) => {
    const g = run?.kind === "run" && run.pictures.length && geometry();
    const step = g && { ArrowRight: 1, ArrowLeft: -1, ArrowDown: g.across, ArrowUp: -g.across }[e.key];
    if (!step) return;
    e.preventDefault();
    point(state.token === null ? 0 : Math.max(0, Math.min(g.tokens - 1, state.token + step)));
  };
  part("tracks").onclick = (e) => select(part("tracks").pick(...inside(part("tracks"), e)), e.shiftKey);
  part("heads").onclick = (e) => {
    const [l, h] = part("heads").pick(...inside(part("heads"), e)), [layers, heads] = run.mass.shape;
    const same = state.layer === l && state.head === h;
    const layer = l >= 0 && l < layers && layers > 1 && !same ? l : "all", head = h >= 0 && h < heads && heads > 1 && !same ? h : "all";
    set({ layer, head });
  };
  const experts = part("experts");
  const cellUnder = (e) => {
    const [l, x] = experts.pick(...inside(experts, e));
    return l >= 0 && l < run.model.moe_layers.length && x >= 0 && x < run.model.experts ? [l, x] : null;
  };
  experts.onpointermove = (e) => {
    const cell = run?.kind === "run" ? cellUnder(e) : null;
    if (`${cell}` !== `${state.expert}`) { state.expert = cell; drawExperts(); }
  };
  experts.onpointerleave = () => { if (run?.kind === "run") { state.expert = null; drawExperts(); } };
  experts.onclick = (e) => { const cell = cellUnder(e); if (cell) set({ tableLayer: cell[0], expert: cell }); };
  experts.onkeydown = (e) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[e.key];
    if (!step) return;
    e.preventDefault();
    set({ tableLayer: Math.max(0, Math.min(run.model.moe_layers.length - 1, state.tableLayer + step)) });
  };

  // ---- the host: its theme, its width ------------------------------------------------------------------------------
  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
  function theme() {
    const gradio = document.querySelector(".gradio-container");
    const dark = gradio ? document.body.classList.contains("dark") : prefersDark.matches;
    const next = dark ? "dark" : "light";
    if (frame.dataset.theme !== next) { frame.dataset.theme = next; draw(); }
  }
  theme();
  prefersDark.addEventListener("change", theme);
  new MutationObserver(theme).observe(document.body, { attributes: true, attributeFilter: ["class"] });
  let width = 0;
  new ResizeObserver(() => {
    if (host.clientWidth === width) return;
    width = host.clientWidth;
    draw();
  }).observe(host);
  return { show, select, state };
}
