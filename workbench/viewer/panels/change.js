// Change: a list of changes to the model or the picture, the answer under them, and a random control of the same size.

addPanel({
  name: "change",
  label: "Change",
  explain: "Switch off parts of the model, hide parts of the picture, and let it answer again. The new answer stands beside the old one and beside a random control: as much changed somewhere else, so that what any change of that size does is not taken for what this one does.",
  guard: `p(old answer) = ∏ p(token | all before it), under the change, the old thought given. Experts chosen otherwise =
    1 − |A ∩ B| ∕ K, mean over layers and words of the old reply; two random choices would differ in 1 − K∕E. An answer that
    changes shows that the model, as it is, answers otherwise without this part, here; not what the part is for. One control
    is one draw: look at several. A part set to zero is a state the model never met in training, and that alone can do
    damage; replaced by its mean it is milder.`,
  keeps: ["inside"],
  skeleton: `<div class="acts">
      <h3 id="change-what">What to change</h3>
      <div class="pick" role="group" aria-labelledby="change-what" data-part="change-kinds"></div>
      <p class="note" data-part="change-hint"></p>
      <div class="controls" data-part="change-form"></div>
      <h3>The list</h3>
      <ul class="chips" data-part="change-list" aria-label="Changes in the list"></ul>
      <div class="controls">
        <button class="go" type="button" data-part="change-go">Answer again</button>
        <button type="button" data-part="change-another">Another control</button>
        <button type="button" data-part="change-more">5 more controls</button>
        <button type="button" data-part="change-stop" disabled>Stop</button>
      </div>
      <p class="note" data-part="change-note" aria-live="polite"></p>
    </div>
    <p class="note" data-part="change-stale" hidden>What stands below belongs to the list as it was before; press Answer again.</p>
    <p class="outcome" data-part="change-verdict" aria-live="polite"></p>
    <div class="answers" data-part="change-answers"></div>
    <div class="scroll" data-part="change-numbers"></div>
    <p class="note" data-part="change-read" hidden>All shares from 0 to 100%; the mark on a bar is what two random choices would give.</p>
    <div data-part="change-controls"></div>`,
  open: opened,
  draw: followSelection,
});

let kind = "expert";
let list = []; // { spec, text }
let base = null; // the payload that is changed
let columns = []; // before, changed, control, as the act tells them
let rows = []; // of the controls that were only counted
let seed = 0; // of the last control
let working = false;
let told = ""; // the list that the answers belong to
let box = null; // x0, y0, x1, y1 of the region, in pixels of the original picture
let drag = null;
let fields = {};

const count = (n) => numbers(n).map((i) => [i, `${i}`]);
const parts = () => [["question", "the question"], ...(run.thought ? [["thought", "the thought"]] : [])];
const shownPictures = () => run.pictures.map((_, i) => [`picture ${i}`, `picture ${i + 1}`]);
const named = (value, options) => options.find(([known]) => `${known}` === `${value}`)?.[1] ?? value;
const HOW = [["contribution", "counts as zero: what it writes is left out"], ["renormalise", "dropped: the others are scaled up"], ["route around", "avoided: the next best is chosen"]];
const REPLACED = [["mean", "the mean token"], ["zero", "zero"]];
const PARTS = [["attn", "attention"], ["ffn", "experts (FFN)"], ["both", "attention and experts"]];
const LOOKERS = () => [["everything", "everything after it"], ["reply", "all that is written"], ...(run.thought ? [["thought", "the thought"]] : []), ["answer", "the answer"], ["question", "the question"], ...(run.pictures.length > 1 ? shownPictures() : [])];
const LOOKED = () => [...(run.pictures.length ? [["picture", run.pictures.length > 1 ? "all pictures" : "the picture"]] : []), ...(run.pictures.length > 1 ? shownPictures() : []), ...parts()];
// What can be changed: the fields of its form, a spec for the model, and a few words for the list.
const KINDS = {
  expert: {
    hint: "Click a cell of the expert grid below, or choose here.",
    fields: { layer: ["Layer", () => run.model.moe_layers.map((l) => [l, l])], expert: ["Expert", () => count(run.model.experts)], how: ["How", () => HOW] },
    spec: (v) => ({ layer: +v.layer, expert: +v.expert, how: v.how }),
    text: (v) => `expert ${v.expert} of layer ${v.layer} ${named(v.how, HOW).split(":")[0]}`,
  },
  head: {
    hint: "One attention head: what it read becomes zero, or what it reads on average in this reply.",
    fields: { layer: ["Layer", () => count(run.model.layers)], head: ["Head", () => count(run.model.heads)], how: ["Set to", () => [["zero", "zero"], ["mean", "its mean"]]] },
    spec: (v) => ({ layer: +v.layer, head: +v.head, how: v.how }),
    text: (v) => `head ${v.head} of layer ${v.layer} set to ${v.how === "zero" ? "zero" : "its mean"}`,
  },
  layer: {
    hint: "What a whole layer writes into the stream counts as zero.",
    fields: { layer: ["Layer", () => count(run.model.layers)], part: ["Part", () => PARTS] },
    spec: (v) => ({ layer: +v.layer, part: v.part }),
    text: (v) => `${named(v.part, PARTS)} of layer ${v.layer} off`,
  },
  patch: {
    kind: "token",
    hint: () => (state.token === null ? "Click a patch of the picture (or move to it with the arrow keys), then add it." : `Chosen: ${placeOf(state.token, geometry())}.`),
    fields: { how: ["Replaced by", () => REPLACED] },
    spec: (v) => ({ token: geometry().first + state.token, how: v.how }),
    text: (v) => `patch ${placeOf(state.token, geometry()).replace(/ \(.*/, "")}${run.pictures.length > 1 ? ` of picture ${state.picture + 1}` : ""} → ${named(v.how, REPLACED)}`,
    missing: () => (state.token === null ? "Choose a patch first: click it on the picture." : ""),
  },
  picture: {
    hint: "All tokens of one picture. They keep their places, but show nothing of their own.",
    fields: { picture: ["Picture", () => run.pictures.map((_, i) => [i, i + 1])], how: ["Replaced by", () => REPLACED] },
    spec: (v) => ({ picture: +v.picture, how: v.how }),
    text: (v) => `picture ${+v.picture + 1} → ${named(v.how, REPLACED)}`,
  },
  region: {
    hint: "Draw a rectangle on the picture with the mouse, or give its corners in pixels. It is painted in the picture's mean colour before the model sees it.",
    corners: true,
    spec: () => ({ picture: state.picture, box }),
    text: () => `picture ${state.picture + 1} blank from ${box[0]}, ${box[1]} to ${box[2]}, ${box[3]}`,
    missing: () => (box && box.every(Number.isFinite) ? "" : "Draw a rectangle on the picture first."),
  },
  bias: {
    hint: "The bias tips which experts are chosen, and enters no weight. Scores lie between 0 and 1.",
    fields: { layer: ["Layer", () => run.model.moe_layers.map((l) => [l, l])], expert: ["Expert", () => count(run.model.experts)] },
    slider: true,
    spec: (v) => ({ layer: +v.layer, expert: +v.expert, by: +v.by }),
    text: (v) => `bias of expert ${v.expert}, layer ${v.layer}, ${signed(+v.by)}`,
    missing: (v) => (+v.by ? "" : "Move the slider: a shift by 0 changes nothing."),
  },
  "top-k": {
    hint: () => `Every layer chooses ${run.model.top_k} of ${run.model.experts} experts for a word; choose another number.`,
    fields: { k: ["Experts a word", () => count(run.model.experts + 1).filter(([k]) => k > 0 && k !== base.model.top_k)] },
    spec: (v) => ({ k: +v.k }),
    text: (v) => `${v.k} experts a word`,
  },
  attention: {
    kind: "block",
    hint: "Some positions cannot look at others, in any layer or head: what they know of them has to come another way.",
    fields: { from: ["From", LOOKERS], to: ["To", LOOKED] },
    spec: (v) => ({ from: v.from, to: v.to }),
    text: (v) => `${named(v.from, LOOKERS())} cannot look at ${named(v.to, LOOKED())}`,
  },
};

// ---- the form, and the list
function opened() {
  const same = base && JSON.stringify(base.pictures) === JSON.stringify(finished.pictures);
  if (!columns.some((one) => one.id === run.id && run.id)) { // another run: answers of the last one do not belong to it
    if (!same) list = list.filter(({ spec }) => !["token", "picture", "region", "block"].includes(spec.kind));
    [base, columns, rows, box, told] = [finished, [], [], null, ""];
    say("change-verdict", "");
    say("change-note", "");
    part("change-controls").replaceChildren();
  }
  buildForm();
  drawList();
  drawAnswers();
}
choices("change-kinds", Object.keys(KINDS).map((name) => [name, name]), (name) => { kind = name; buildForm(); set({}); });
function buildForm() {
  const form = part("change-form"), add = makeButton("Add to the list", addToList);
  fields = {};
  form.replaceChildren();
  for (const button of part("change-kinds").children) {
    button.setAttribute("aria-pressed", button.dataset.value === kind);
    button.disabled = ["patch", "picture", "region"].includes(button.dataset.value) && !run.pictures.length;
  }
  const field = (name, label, input) => {
    const made = make("label", "", `${label} `);
    input.dataset.part = `change-${name}`;
    made.append(input);
    form.append(made);
    return (fields[name] = input);
  };
  for (const [name, [label, options]] of Object.entries(KINDS[kind].fields || {})) {
    const select = field(name, label, make("select"));
    select.append(...options().map(([value, text]) => Object.assign(make("option", "", text), { value })));
    select.onchange = () => chosenHere(name);
  }
  if (KINDS[kind].slider) {
    const slider = field("by", "Shift", Object.assign(make("input"), { type: "range", min: -1, max: 1, step: 0.05, value: 0.5 })), shown = make("output", "", "+0.50");
    slider.after(shown);
    slider.oninput = () => (shown.textContent = signed(+slider.value));
  }
  if (KINDS[kind].corners) ["from x", "y", "to x", "y"].forEach((label, i) => {
    const input = field(`corner-${i}`, label, Object.assign(make("input"), { type: "number", min: 0, max: geometry().original[i % 2] }));
    input.oninput = () => { box = [0, 1, 2, 3].map((k) => (fields[`corner-${k}`].value === "" ? NaN : +fields[`corner-${k}`].value)); drawPicture(); };
  });
  add.dataset.part = "change-add";
  form.append(add);
  takeMouse(kind === "region");
}
function chosenHere(name) { // the one selection follows the form
  if (["expert", "bias"].includes(kind) && ["layer", "expert"].includes(name)) {
    const l = run.model.moe_layers.indexOf(+fields.layer.value);
    set({ tableLayer: l, expert: [l, +fields.expert.value], token: null, patch: null });
  } else if (["layer", "head"].includes(name) && !run.averaged) set({ [name]: +fields[name].value });
}
function followSelection() { // and the form the selection
  const { hint } = KINDS[kind];
  if (["expert", "bias"].includes(kind) && state.expert) [fields.layer.value, fields.expert.value] = [run.model.moe_layers[state.expert[0]], state.expert[1]];
  if (kind === "head" && state.head !== "all") fields.head.value = state.head;
  if (["head", "layer"].includes(kind) && state.layer !== "all") fields.layer.value = state.layer;
  say("change-hint", typeof hint === "string" ? hint : hint());
  takeMouse(kind === "region");
}
const values = () => Object.fromEntries(Object.entries(fields).map(([name, input]) => [name, input.value]));
function addToList() {
  const one = KINDS[kind], chosen = values(), missing = one.missing?.(chosen);
  say("change-note", missing || "");
  if (missing) return;
  const spec = { kind: one.kind || kind, ...one.spec(chosen) };
  if (list.some((other) => JSON.stringify(other.spec) === JSON.stringify(spec))) return say("change-note", "This is in the list already.");
  list.push({ spec, text: one.text(chosen) });
  if (kind === "region") { box = null; for (let i = 0; i < 4; i++) fields[`corner-${i}`].value = ""; }
  drawList();
  drawPicture();
}
function drawList() {
  const chips = list.map(({ text }, i) => {
    const chip = make("li"), button = makeButton(text, () => {
      list.splice(i, 1);
      drawList();
      drawPicture();
      (part("change-list").querySelectorAll("button")[Math.min(i, list.length - 1)] || part("change-add")).focus();
    }, "chip");
    button.setAttribute("aria-label", `Remove: ${text}`);
    button.append(make("span", "", "×"));
    chip.append(button);
    return chip;
  });
  part("change-list").replaceChildren(...(chips.length ? chips : [make("li", "note", "Nothing yet. Choose what to change above and add it; several changes work together.")]));
  drawButtons();
}
function drawButtons() {
  const now = JSON.stringify(list), answered = columns.length > 1 && now === told;
  part("change-go").disabled = working || !list.length;
  part("change-another").disabled = part("change-more").disabled = working || !answered || columns.length < 3;
  part("change-stop").disabled = !working;
  const stale = columns.length > 1 && now !== told;
  part("change-answers").classList.toggle("stale", stale);
  part("change-stale").hidden = !stale;
}

// ---- the picture: a rectangle drawn with the mouse, and what the list hides of it
const region = {
  down(x, y) { drag = original(x, y); },
  move(x, y) {
    if (!drag) return;
    const [a, b] = drag, [c, d] = original(x, y);
    box = [Math.min(a, c), Math.min(b, d), Math.max(a, c), Math.max(b, d)];
    box.forEach((side, i) => (fields[`corner-${i}`].value = side));
    drawPicture();
  },
  up(x, y) { region.move(x, y); drag = null; },
};
function original(x, y) { // pixels of the resized picture -> whole pixels of the original, inside it
  const g = geometry();
  return [x, y].map((v, i) => Math.round(Math.max(0, Math.min(g.original[i], (v * g.original[i]) / g.resized[i]))));
}
function takeMouse(wanted) {
  const mine = wanted && state.tab === "change" && run?.pictures.length > 0;
  if (mine) tool = region;
  else if (tool === region) tool = null;
  part("picture").style.touchAction = tool === region ? "none" : "";
}
overlays.push((draw, g, scale) => {
  if (state.tab !== "change") return takeMouse(false);
  const mark = (x, y, w, h, firm) => {
    for (const [width, style] of [[4, "#fff"], [2, firm ? "#1d2430" : colour("accent")]]) {
      draw.lineWidth = width;
      draw.strokeStyle = style;
      draw.strokeRect(x, y, w, h);
      if (!firm) continue;
      draw.beginPath();
      draw.moveTo(x, y); draw.lineTo(x + w, y + h); draw.moveTo(x + w, y); draw.lineTo(x, y + h);
      draw.stroke();
    }
  };
  const place = ([x0, y0, x1, y1], firm) => {
    const [sx, sy] = [0, 1].map((i) => (g.resized[i] / g.original[i]) * scale);
    mark(x0 * sx - g.offset[0] * scale, y0 * sy - g.offset[1] * scale, (x1 - x0) * sx, (y1 - y0) * sy, firm);
  };
  for (const { spec } of list) {
    if (spec.kind === "region" && spec.picture === state.picture) place(spec.box, true);
    const token = spec.kind === "token" ? spec.token - g.first : -1, side = g.cell * scale;
    if (token >= 0 && token < g.tokens) mark((token % g.across) * side + 2, Math.floor(token / g.across) * side + 2, side - 4, side - 4, true);
  }
  if (kind === "region" && box?.every(Number.isFinite)) place(box, false);
});

// ---- asking
function asking(name, args, take) {
  working = true;
  drawButtons();
  say("change-note", "Working…");
  const changes = list.map(({ spec }) => spec);
  act(name, { changes, ...args }, (result) => {
    if (result.data) take(result.data);
    working = !(result.done || result.error);
    say("change-note", standing(result, result.data?.stopped));
    drawButtons();
  }, base.id);
}
function takeVerdict(data) {
  say("change-verdict", [data.verdict, data.no_control].filter(Boolean).join(" "));
}
part("change-go").onclick = () => {
  const asked = JSON.stringify(list);
  asking("change", { seed: 0 }, (data) => {
    if (!data.columns) return;
    [columns, rows, told, seed] = [data.columns, [], asked, 0];
    columns[0].payload = base;
    columns[0].id = base.id;
    takeVerdict(data);
    drawAnswers();
    drawControls("");
  });
};
part("change-another").onclick = () => {
  const next = seed + 1 + rows.length;
  asking("another control", { seed: next, answer: columns[1].said }, (data) => {
    if (!data.columns) return;
    if (data.columns.length) columns[2] = data.columns[0];
    [seed, rows] = [next, []];
    takeVerdict(data);
    drawAnswers();
    drawControls("");
  });
};
part("change-more").onclick = () => asking("more controls", { seed: seed + 1, count: 5 }, (data) => {
  if (!data.rows) return;
  rows = data.rows;
  drawControls(data.sentence);
});
stops("change-stop");

// ---- what came of it
const NAMES = { before: "Before", changed: "Changed", control: "Random control" };
function drawAnswers() {
  part("change-answers").replaceChildren(...columns.map((one, i) => {
    const card = make("div", "column"), top = make("h4", "", NAMES[one.name]), shown = run.id === one.id;
    const button = makeButton(shown ? "shown" : "show", () => show(one.payload));
    button.disabled = shown;
    button.setAttribute("aria-label", `${shown ? "Shown in the viewer" : "Show in the viewer"}: ${NAMES[one.name].toLowerCase()}`);
    top.append(button);
    const answer = words("said", one.answer, "no answer"), thought = words("mulled", one.thought, "no thought");
    const what = make("ul", "lines");
    one.lines.forEach((text, k) => {
      const item = make("li", "", text);
      if (one.touched[k]) item.append(make("span", "", ` (touched ${one.touched[k]})`));
      what.append(item);
    });
    card.append(top, answer, thought, what);
    card.dataset.column = one.name;
    return card;
  }));
  part("change-read").hidden = !columns.length;
  if (!columns.length) return part("change-numbers").replaceChildren();
  const head = ["how likely, how different", ...columns.map((one) => one.name)], { top_k: k, experts } = base.model;
  const share = (v) => (v === null ? "none" : percent(v)), chanceOf = 1 - k / experts;
  const lines = [
    ["the old answer, after the old thought", ...columns.map((one) => share(one.answer_logprob === null ? null : Math.exp(one.answer_logprob)))],
    ["the whole old reply, log-probability in nats", ...columns.map((one) => fixed(one.reply))],
    ["experts chosen otherwise", ...columns.map((one) => share(one.moved))],
    ["attention on the picture", ...columns.map((one) => share(one.picture))],
  ];
  const made = table(head, lines);
  const bar = (row, values, mark) => values.forEach((v, i) => {
    const cell = made.tBodies[0].rows[row].cells[i + 1], track = make("div", "level"), fill = make("i");
    if (v === null) return;
    fill.style.width = `${100 * v}%`;
    track.append(fill);
    if (mark !== undefined) { const tick = make("b"); tick.style.left = `${100 * mark}%`; track.append(tick); }
    cell.append(track);
  });
  bar(0, columns.map((one) => (one.answer_logprob === null ? null : Math.exp(one.answer_logprob))));
  bar(2, columns.map((one) => one.moved), chanceOf);
  bar(3, columns.map((one) => one.picture));
  part("change-numbers").replaceChildren(made);
}
function words(className, pieces, none) {
  const line = make("p", className);
  if (!pieces.length) { line.classList.add("none"); line.textContent = none; }
  for (const [text, differs] of pieces) line.append(/^\s/.test(text) ? " " : "", differs ? make("mark", "", text.trim()) : text.trim());
  return line;
}
function drawControls(sentence) {
  const box = part("change-controls");
  box.replaceChildren();
  if (!rows.length) return;
  box.append(make("h3", "", "More random controls"), make("p", "outcome", sentence));
  const answer = (text) => (text.length > 60 ? `${text.slice(0, 58)}…` : text || "none");
  const made = table(["changed instead", "answer", "old reply, nats"], rows.map((row) =>
    [row.lines.join("; "), answer(row.answer), fixed(row.reply)]), (i) => (rows[i].changed ? "in" : ""));
  const scroll = make("div", "scroll");
  scroll.append(made);
  box.append(scroll, make("p", "note", "Bold: the answer is another than before. These answers are counted, not kept."));
}
