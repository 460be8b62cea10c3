// What the picture can be painted with. A map gives, for the selection and the picture shown:
//   cells()  a value a cell, null where there is nothing to say; null altogether while it is not known
//   light(v) from 0, nothing, to 1, the end of the scale; ink(v) its colour; text(v) as it is read out
//   ends(), bar()  the two ends of the scale and its colours; say(of) the caption; guard: formula, and how to read it
//   needs()  what has to be asked of the model first: { key, name, args, take }, or null
// A cell is a visual token; for MoonViT it is a patch.

const STEPS = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1];
const upTo = (value) => STEPS.find((step) => step >= value) || 1;
const heatInk = (t) => ramp(0.1 + 0.9 * t, Math.min(1, t / 0.15) * (0.24 + 0.4 * t));
const ofPicture = (values) => { const g = geometry(); return [...values.slice(g.first, g.first + g.tokens)]; };
function diverging(t, alpha = 1) { // -1..1: blue below, orange above, pale between; told apart by colour-blind eyes
  const [far, near] = t < 0 ? [[33, 102, 172], isDark() ? [60, 74, 96] : [235, 239, 245]] : [[217, 95, 2], isDark() ? [92, 70, 52] : [248, 238, 230]];
  const at = Math.min(1, Math.abs(t));
  return `rgba(${near.map((a, i) => Math.round(a + (far[i] - a) * at))},${alpha})`;
}
const divergingBar = () => `linear-gradient(90deg, ${[-1, -0.5, 0, 0.5, 1].map((t) => diverging(t)).join(", ")})`;

// ---- colours of experts: the seven that serve most in a layer, told apart by colour-blind eyes (Okabe and Ito)
const EXPERT_INKS = ["#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#F0E442"];
function expertInks(l) { // expert -> colour, by how often it is the first expert of a visual token or a word
  return once(`inks ${l}`, () => {
    const counts = new Uint32Array(run.model.experts), tokens = pictureTokens();
    for (let token = 0; token < tokens; token++) counts[pictureExperts(l, token)[0]]++;
    for (let row = 0; row < run.rows; row++) counts[firstExpert(l, row)]++;
    const order = [...counts.keys()].filter((e) => counts[e]).sort((a, b) => counts[b] - counts[a] || a - b);
    return new Map(order.slice(0, EXPERT_INKS.length).map((e, i) => [e, EXPERT_INKS[i]]));
  });
}
const expertInk = (l, e) => expertInks(l).get(e) || colour("faint");
const served = (l, e) => ofPicture(Float32Array.from({ length: pictureTokens() }, (_, token) => (pictureExperts(l, token).includes(e) ? 1 : 0)));

const lastWord = () => run.words.at[state.to]; // the position of the word chosen last
const onlyWritten = () => "Relevancy asks what made the model write a word: choose a word of the thought or the answer.";
const patchShown = () => (state.token === null ? null : state.patch ?? patchesOf(state.token)[0]);
function patchesOf(token) { // of the picture shown: its merge x merge patches
  const g = geometry(), row = Math.floor(token / g.across) * g.merge, column = (token % g.across) * g.merge;
  return Array.from({ length: g.merge ** 2 }, (_, i) => (row + Math.floor(i / g.merge)) * g.grid[1] + column + (i % g.merge));
}
const layersHeads = () => {
  const { layers, heads } = run.model;
  return [state.layer === "all" ? `mean of ${layers} layers` : `layer ${state.layer}`, run.averaged ? `mean of ${heads} heads` : state.head === "all" ? `${heads} heads` : `head ${state.head}`].join(", ");
};

const MAPS = {
  attention: {
    label: "attention",
    cells: () => ofPicture(heat()),
    light: (v) => Math.min(1, v / scaleTop()),
    text: percent,
    ends: () => ["0", `${percent(scaleTop())} or more`],
    say: (of) => `Attention while ${of}, ${layersHeads()}: share of each picture token. One scale for all words.`,
    guard: "softmax(q·k ∕ √d), mean over the layers, heads and words chosen. It says where was read, not what was made of it: a sink takes a large share and may pass nothing on, and a model can look at the right place and answer wrong (arXiv 2502.17422).",
  },
  relative: {
    label: "÷ neutral",
    needs: () => (run.neutral ? null : { key: "neutral", name: "neutral", args: {}, async take(data) {
      run.neutral = { question: data.question, word: await unpack(data.word), prompt: await unpack(data.prompt) };
    } }),
    cells() {
      if (!run.neutral) return null;
      const asked = heat(), anyway = mean(run.neutral[neutralRow()], [0], state.layer, state.head);
      return ofPicture(asked.map((v, m) => (anyway[m] >= 1e-6 ? v / anyway[m] : NaN))).map((v) => (Number.isNaN(v) ? null : v));
    },
    light: (v) => (lean(v) + 1) / 2,
    ink: (v) => { const t = lean(v); return diverging(t, Math.min(0.85, 0.1 + 1.1 * Math.abs(t))); },
    text: (v) => `${v >= 10 ? Math.round(v) : v.toFixed(2)} ×`,
    ends: () => ["¼ ×", "4 × or more"],
    bar: divergingBar,
    say: (of) => `Attention while ${of}, divided by what ${neutralRow() === "word" ? "the last word" : "the last position of the prompt"} of the neutral question ${quote(run.neutral?.question || "")} gives, ${layersHeads()}. 1 × is no difference.`,
    guard: "A(this question) ∕ A(neutral question), means over heads and layers taken before dividing (arXiv 2502.17422). It shows what the question adds, with what is looked at anyway divided out. Where both are small the quotient is unsteady: compare with “attention”.",
  },
  relevancy: {
    label: "relevancy",
    needs: () => (run.owed.has(lastWord()) || lastWord() < run.prompt_length ? null : { key: `owed ${lastWord()}`, name: "relevancy", args: { position: lastWord() }, async take(data) {
      run.owed.set(data.position, { ...data, picture: (await unpack(data.picture)).raw });
    } }),
    cells: () => (run.owed.has(lastWord()) ? ofPicture(run.owed.get(lastWord()).picture) : null),
    light: (v) => Math.min(1, v / owedTop()),
    text: percent,
    ends: () => ["0", `${percent(owedTop())} or more`],
    say: () => (lastWord() < run.prompt_length ? onlyWritten() : `What the logit of ${quote(run.words.text[state.to])} owes to each picture token, of all it owes; all layers and heads${state.from === state.to ? "" : "; of the word chosen last"}. One scale for all words.`),
    guard: "R ← R + Ā R from layer to layer, Ā = mean over heads of (∂logit∕∂A · A)⁺ (arXiv 2103.15679). It weighs attention by what it did for this word, and sees only attention: whether a patch mattered is known when it is taken away.",
  },
  eye: {
    label: "MoonViT",
    needs() {
      const patch = patchShown(), known = run.eye && run.eye.patch === patch && run.eye.picture === state.picture;
      return patch === null || known ? null : { key: `eye ${state.picture} ${patch}`, name: "eye", args: { picture: state.picture, patch }, async take(data) {
        run.eye = { ...data, attention: await unpack(data.attention) };
        const [layers, heads] = run.eye.attention.shape;
        for (const [name, n] of [["eye-layer", layers], ["eye-head", heads]]) options(name, ["all", ...numbers(n)]);
        part("eye-layer").value = state.eyeLayer;
        part("eye-head").value = state.eyeHead;
      } };
    },
    cells: () => (state.token === null || !run.eye || MAPS.eye.needs() ? null : [...mean(run.eye.attention, [0], state.eyeLayer, state.eyeHead)]),
    light: (v) => Math.min(1, v / eyeTop()),
    text: percent,
    ends: () => ["0", `${percent(eyeTop())} or more`],
    say() {
      if (state.token === null) return "Click a patch of the picture: what MoonViT itself read there, before any word, appears here.";
      const [layers, heads] = run.eye ? run.eye.attention.shape : [0, 0], g = geometry(), patch = patchShown(), chance = percent(1 / (g.grid[0] * g.grid[1]));
      const of = [state.eyeLayer === "all" ? `mean of ${layers} layers` : `layer ${state.eyeLayer}`, state.eyeHead === "all" ? `mean of ${heads} heads` : `head ${state.eyeHead}`].join(", ");
      return `What MoonViT read from patch row ${Math.floor(patch / g.grid[1]) + 1}, column ${(patch % g.grid[1]) + 1} (outlined), ${of}: share of each patch. Spread evenly it would be ${chance}.`;
    },
    guard: "softmax(q·k ∕ √d) of this patch over all patches of its own picture; MoonViT has no mask and no words. Early layers tend to look nearby, later ones at what looks alike; it knows nothing of the question.",
  },
  experts: {
    label: "experts",
    cells: () => ofPicture(Float32Array.from({ length: pictureTokens() }, (_, token) => pictureExperts(state.tableLayer, token)[0])),
    light: () => 1,
    ink: (e) => `color-mix(in srgb, ${expertInk(state.tableLayer, e)} 72%, transparent)`,
    text: (e) => `expert ${e}`,
    tell: (token) => `experts ${[...pictureExperts(state.tableLayer, geometry().first + token)].join(" and ")}, the largest weight first`,
    say: () => `Layer ${run.model.moe_layers[state.tableLayer]}: each picture token in the colour of the expert with the largest weight. The seven that serve most have a colour; the layer is chosen at “Why these”.`,
    guard: "Colour = argmax of the weights of the K chosen experts of a token; choose an expert to see all that it was chosen for. A patch of one colour need not mean that the expert “knows” the thing there: place, colour and load balance move experts too.",
  },
  served: { // an expert is chosen: what it served stays bright
    cells: () => served(...shownExpert()),
    light: (v) => v,
    text: (v) => (v ? "served by it" : "not served by it"),
    say() {
      const [l, e] = shownExpert(), all = served(l, e), count = all.reduce((sum, v) => sum + v, 0);
      return `Bright: the ${count} of ${all.length} picture tokens that chose expert ${e} in layer ${run.model.moe_layers[l]}, ${percent(count / all.length)}; chance ${percent(run.model.top_k / run.model.experts)}.`;
    },
    guard: "A token is served by the K experts with the largest score plus bias; bright here whatever their weight.",
  },
};
const lean = (v) => Math.max(-1, Math.min(1, Math.log2(Math.max(v, 1e-6)) / 2)); // a quotient from 1/4 to 4
const neutralRow = () => (run.words.role[state.to] === "user" ? "word" : "prompt");
const owedTop = () => upTo(8 / run.prompt_length);
const eyeTop = () => { const g = geometry(); return upTo(10 / (g.grid[0] * g.grid[1])); };
// The route tab shows experts unless another map is asked for there.
const chosenMap = () => (state.tab === "route" ? state.routeMap : state.map);
const mapName = () => (shownExpert() ? "served" : chosenMap());
const shownMap = () => MAPS[mapName()];
const inkOf = (one, v) => (one.ink ? one.ink(v) : heatInk(one.light(v)));

// ---- what the map shown still needs of the model; asked for at once, unless something else is being worked on
let waiting = null; // the key of what is being asked
function fetchMap() {
  const need = canAct && run.id ? shownMap().needs?.() : null, failed = need && run.failed[need.key];
  part("map-go").hidden = !need || waiting !== null || !(failed || awaited.size);
  say("map-note", failed || (waiting !== null && need ? "Working…" : ""));
  if (need && !failed && waiting === null && !awaited.size) askMap(need);
}
function askMap(need) {
  const mine = run;
  waiting = need.key;
  delete run.failed[need.key];
  say("map-note", "Working…");
  act(need.name, need.args, async ({ data, done, error }) => {
    if (!done && !error) return say("map-note", data?.note || "Working…");
    waiting = null;
    if (run !== mine) return draw();
    if (error || !data || !Object.keys(data).some((key) => key !== "note")) run.failed[need.key] = error || "It was stopped.";
    else await need.take(data);
    if (run === mine) draw();
  });
}
part("map-go").onclick = () => { const need = shownMap().needs?.(); if (need) askMap(need); };
