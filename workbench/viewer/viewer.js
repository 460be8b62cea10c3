// The linked viewer of one run. Plain JavaScript without dependencies, in a shadow root, so that every host shows it alike:
//   const viewer = kimiViewer(element, hands); viewer.show(payload);      (payload: see payload.py)
// hands.act, where there is one, hands a question that needs the model to Python (see panels.js).
// One small state (a span of words, layer, head, view) drives every panel; each draw function below draws one of them.
// Text from the run enters the page as text nodes only.
function kimiViewer(host, hands) {
  "use strict";
  const CSS = `@CSS@`;
  const SKELETON = `
  <div class="kv hide-template waiting"><nav class="tabs later" role="tablist" aria-label="What is shown" data-part="tabs"></nav>
  <div class="cols" data-tab="look">
    <section class="look" aria-label="Picture">
      <h2>Picture <i data-part="size"></i></h2>
      <div class="thumbs" role="group" aria-label="Which picture is shown" data-part="pictures" hidden></div>
      <div class="stage"><canvas data-part="picture" tabindex="0" role="img"></canvas></div>
      <div class="later">
        <div class="scale" data-part="heat-scale"><span data-part="heat-low"></span><div class="bar" data-part="heat-bar"></div><span data-part="heat-top"></span></div>
        <div class="key" data-part="expert-key" role="group" aria-label="Experts by colour" hidden></div>
        <div class="controls"><div class="chips" role="group" aria-label="What the picture is painted with" data-part="maps"></div></div>
        <p class="note" data-part="heat-caption"></p>
        <p class="note" aria-live="polite"><span data-part="map-note"></span> <button type="button" data-part="map-go" hidden>Compute it</button></p>
        <p class="note" data-part="sink-note"></p>
        <div class="controls">
          <label data-part="layer-label">Layer <select data-part="layer"></select></label><label data-part="head-label">Head <select data-part="head"></select></label>
          <label data-part="eye-layer-label" hidden>Layer of MoonViT <select data-part="eye-layer"></select></label><label data-part="eye-head-label" hidden>Head <select data-part="eye-head"></select></label>
          <div class="pick" role="group" aria-label="How the picture is shown" data-part="views"></div>
        </div>
        <p class="note readout" data-part="readout" aria-live="polite"></p>
        <div class="parts" data-part="parts" aria-hidden="true"></div>
        <div class="legend" data-part="parts-legend"></div>
        <p class="say">Attention is where it read from, not why it answered. <span data-part="on-picture"></span></p>
        <details class="guard"><summary>Formula, and how to read it</summary><div data-part="look-guard"></div></details>
        <details data-part="heat-table"><summary>Numbers as a table</summary><div class="scroll"></div></details>
      </div>
    </section>
    <div class="middle"><section class="words" aria-label="Conversation">
      <h2>Conversation <i class="later">click a word, or ← →</i></h2>
      <div class="strip" data-part="strip" role="listbox" aria-multiselectable="true" aria-label="Words of the conversation" tabindex="0"></div>
      <p class="note" data-part="note"></p>
      <div class="later">
        <p class="note" data-part="strip-note" aria-live="polite" hidden></p>
        <div class="scale" data-part="strip-scale" hidden><span data-part="strip-low"></span><div class="bar" data-part="strip-bar"></div><span data-part="strip-top"></span></div>
        <details data-part="looked-table" hidden><summary>Numbers as a table</summary><div class="scroll"></div></details>
      </div>
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
  const state = { tab: "look", from: 0, to: 0, layer: "all", head: "all", tableLayer: 0, view: "heat", map: "attention", routeMap: "experts", side: "write", picture: 0, token: null, patch: null, eyeLayer: "all", eyeHead: "all", expert: null };
  let run = null; // what `open` makes of a payload
  let finished = null; // the last payload of a run
  let latest = 0; // a slow decode must not overwrite a newer run

  //@include helpers.js
  //@include arrays.js
  //@include numbers.js
  //@include kinds.js
  //@include words.js
  //@include maps.js
  //@include picture.js
  //@include along.js
  //@include experts.js
  //@include panels.js
  //@include files.js
  //@panels
  buildTabs();

  // ---- everything ------------------------------------------------------------------------------------------------------
  function draw() {
    if (!run) return;
    if (run.kind === "run") layOut();
    drawPicture();
    if (run.kind !== "run") return;
    for (const name of ["layer", "head"]) part(name).value = state[name];
    for (const [name, value] of Object.entries({ views: state.view, sides: state.side, maps: chosenMap(), pictures: state.picture }))
      for (const button of part(name).children) button.setAttribute("aria-pressed", button.dataset.value === String(value));
    part("head-bar").style.background = gradient();
    drawStrip();
    drawLooking();
    drawTracks();
    drawHeads();
    drawExperts();
    drawPanels();
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
  const numbers = (n) => [...Array(n).keys()];
  function options(name, values, labels = values) {
    part(name).replaceChildren(...values.map((value, i) => Object.assign(make("option", "", labels[i]), { value })));
  }
  function choices(name, values, pick) {
    part(name).replaceChildren(...values.map(([value, text]) => {
      const button = makeButton(text, () => pick(value));
      button.dataset.value = value;
      return button;
    }));
  }
  function buildControls() {
    const { layers, heads, moe_layers } = run.model;
    options("layer", ["all", ...numbers(layers)]);
    options("head", ["all", ...numbers(heads)]);
    options("table-layer", numbers(moe_layers.length), moe_layers);
    part("head").disabled = run.averaged !== "";
    part("layer").disabled = run.averaged === "layers and heads";
    part("pictures").hidden = run.pictures.length < 2;
    choices("pictures", run.pictures.map((_, i) => [i, ""]), (i) => set({ picture: i, token: null, patch: null }));
    run.images.forEach((image, i) => part("pictures").children[i].append(thumb(image), make("span", "", `picture ${i + 1}`)));
  }
  function foot() {
    const { name, device, dtype, versions } = run.model;
    const parts = [`Weights: ${name}`, `on ${device === "cpu" ? "CPU" : device}${dtype ? `, ${dtype}` : ""}`, ...Object.entries(versions || {}).map(([k, v]) => `${k} ${v}`)];
    if (run.edits?.length) parts.push(`answered under changes: ${run.edits.join("; ")}`);
    say("foot", parts.join(" · "));
  }
  function showProgress() {
    const strip = part("strip");
    strip.replaceChildren();
    const writing = run.answer ? "answer" : run.thought ? "thought" : "";
    for (const name of ["question", "thought", "answer"]) {
      const turn = make("div", `turn ${name}`), box = make("div", `plain${name === writing ? " caret" : ""}${run[name].length > 60 ? " long" : ""}`, run[name]);
      if (name === "thought" && run.steps?.length) box.replaceChildren(...run.steps.map(([text, kind]) => inKind(text, kind)));
      turn.hidden = name !== "question" && !run[name];
      turn.append(make("span", "", name), box);
      if (name === "thought" && run.steps?.length) turn.append(kindLegend(run.steps.map(([, kind]) => kind)));
      strip.append(turn);
    }
  }
  async function show(payload) {
    if (payload?.kind === "result") return received(payload);
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
      Object.assign(state, { layer: "all", head: "all", side: "write", picture: 0, token: null, patch: null, eyeLayer: "all", eyeHead: "all", expert: null });
      state.tableLayer = Math.min(state.tableLayer, run.model.moe_layers.length - 1);
      buildStrip();
      buildControls();
      const first = (role) => run.words.role.findIndex((r, w) => r === role && run.words.at[w] >= run.earlier && rowOf(w) >= 0 && run.words.text[w].trim());
      let chosen = [first("answer"), first("thought"), first("user")].find((w) => w >= 0) ?? 0;
      if (run.start === "looking" && run.pictures.length) { // the word that was read most from the picture
        const share = (w) => onPicture([rowOf(w)], "all", "all"), words = written().filter((w) => rowOf(w) >= 0);
        chosen = words.reduce((best, w) => (share(w) > share(best) ? w : best), chosen);
      }
      Object.assign(state, { from: chosen, to: chosen });
      for (const panel of panels) panel.open?.();
    } else showProgress();
    draw();
    host.dataset.showing = run.kind;
    // on a phone the answer would be written below the fold
    if (started && host.clientWidth < 580) host.scrollIntoView({ behavior: "smooth", block: "start" });
  }

  //@include hands.js

  // ---- the host: its theme, its width ----------------------------------------------------------------------------------
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
