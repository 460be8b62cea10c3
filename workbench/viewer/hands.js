// What mouse, finger and keyboard do.

choices("views", [["heat", "heat"], ["spotlight", "spotlight"], ["picture", "picture"]], (view) => set({ view }));
const offered = ["attention", ...(canAct ? ["relative", "relevancy", "eye"] : []), "experts"];
choices("maps", offered.map((name) => [name, MAPS[name].label]), (name) => {
  preview.cell = null;
  set({ [state.tab === "route" ? "routeMap" : "map"]: name, expert: null });
});
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
part("eye-layer").onchange = (e) => set({ eyeLayer: number(e.target.value) });
part("eye-head").onchange = (e) => set({ eyeHead: number(e.target.value) });
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
part("strip").ondblclick = (e) => { // a word of several pieces
  const tok = e.target.closest(".tok");
  if (!tok || rowOf(+tok.dataset.word) < 0) return;
  const [from, to] = wordAround(+tok.dataset.word);
  set({ from, to });
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
const glance = () => { drawPicture(); drawLooking(); drawStrip(); }; // pointing at things redraws no more than this
const point = (token) => { if (token !== preview.token) { preview.token = token; glance(); } };
// A click keeps the patch, the same again lets it go; the token it lies in is what words look at.
const keepPatch = (token, patch) => {
  const again = token === null || (state.token === token && (state.patch === patch || chosenMap() !== "eye"));
  preview.token = preview.cell = null;
  set(again ? { token: null, patch: null } : { token, patch, expert: null });
};
const pixelUnder = (e) => { // of the resized picture
  const g = geometry(), [x, y] = inside(picture, e), scale = picture.clientWidth / g.padded[0];
  return [x / scale + g.offset[0], y / scale + g.offset[1]];
};
picture.onpointermove = (e) => (tool ? tool.move(...pixelUnder(e)) : point(tokenUnder(e)));
picture.onpointerdown = (e) => {
  const token = tokenUnder(e);
  if (!tool && token === null) return;
  if (!tool) {
    const g = geometry(), [x, y] = inside(picture, e), side = picture.clientWidth / g.grid[1];
    return keepPatch(token, Math.floor(y / side) * g.grid[1] + Math.floor(x / side));
  }
  picture.setPointerCapture(e.pointerId);
  tool.down(...pixelUnder(e));
};
picture.onpointerup = (e) => tool?.up(...pixelUnder(e));
picture.onpointerleave = () => run?.kind === "run" && point(null);
picture.onkeydown = (e) => {
  const g = run?.kind === "run" && run.pictures.length && geometry();
  const step = g && { ArrowRight: 1, ArrowLeft: -1, ArrowDown: g.across, ArrowUp: -g.across }[e.key];
  if (g && e.key === "Escape") keepPatch(null);
  if (!step) return;
  e.preventDefault();
  const token = state.token === null ? 0 : Math.max(0, Math.min(g.tokens - 1, state.token + step));
  set({ token, patch: patchesOf(token)[0], expert: null });
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
function chooseExpert(l, e) { // the same again lets it go
  const again = `${state.expert}` === `${[l, e]}`;
  preview.cell = null;
  set({ tableLayer: l, expert: again ? null : [l, e], token: null, patch: null });
}
experts.onpointermove = (e) => {
  const cell = run?.kind === "run" ? cellUnder(e) : null;
  if (`${cell}` !== `${preview.cell}`) { preview.cell = cell; drawExperts(); glance(); }
};
experts.onpointerleave = () => { if (run?.kind === "run" && preview.cell) { preview.cell = null; drawExperts(); glance(); } };
experts.onclick = (e) => { const cell = cellUnder(e); if (cell) chooseExpert(...cell); };
experts.onkeydown = (e) => { // up and down choose a layer, left and right an expert
  const down = { ArrowDown: 1, ArrowUp: -1 }[e.key], right = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
  if (e.key === "Escape" && state.expert) set({ expert: null });
  if (!down && !right) return;
  e.preventDefault();
  const { moe_layers, experts: count } = run.model, tableLayer = Math.max(0, Math.min(moe_layers.length - 1, state.tableLayer + (down || 0)));
  const expert = right ? Math.max(0, Math.min(count - 1, (state.expert?.[1] ?? -1) + right)) : state.expert?.[1];
  set({ tableLayer, ...(expert === undefined ? {} : { expert: [tableLayer, expert], token: null, patch: null }) });
};
