// What mouse, finger and keyboard do.

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
const pixelUnder = (e) => { // of the resized picture
  const g = geometry(), [x, y] = inside(picture, e), scale = picture.clientWidth / g.padded[0];
  return [x / scale + g.offset[0], y / scale + g.offset[1]];
};
picture.onpointermove = (e) => (tool ? tool.move(...pixelUnder(e)) : point(tokenUnder(e)));
picture.onpointerdown = (e) => {
  if (!tool) return point(tokenUnder(e));
  picture.setPointerCapture(e.pointerId);
  tool.down(...pixelUnder(e));
};
picture.onpointerup = (e) => tool?.up(...pixelUnder(e));
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
