// Small helpers: elements, text, colours, canvases, tables.

function make(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}
function makeButton(text, press, className = "") {
  return Object.assign(make("button", className, text), { type: "button", onclick: press });
}
const say = (name, text) => (part(name).textContent = text);
const percent = (v) => (v >= 0.0995 ? `${Math.round(100 * v)}%` : v >= 0.0005 || v === 0 ? `${+(100 * v).toFixed(1)}%` : "<0.1%");
const legible = (text) => text.trim() || "␣"; // a word of blanks can be seen
const quote = (text) => `“${legible(text)}”`;
const fixed = (v) => v.toFixed(2).replace("-", "−");
const signed = (v) => (v < 0 ? "" : "+") + fixed(v);
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
// The table of a `details`; rows() is asked only while it is open.
const fillTable = (name, head, rows) => part(name).open && part(name).querySelector(".scroll").replaceChildren(table(head, rows()));
