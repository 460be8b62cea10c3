// Tabs: "Look" is the three columns; every other tab is a panel, shown beside picture and words. All of them follow the one
// selection. A panel is added by a file in panels/:
//   addPanel({ name, label, explain, guard, skeleton, keeps, open, draw })
// explain: two sentences. guard: the formula and how (not) to read it, a click away. skeleton: HTML whose data-part names
// begin with the panel's. open(): a new run is there. draw(): the selection changed, or the tab was opened.
// keeps: names of sections of the three columns that stay ("inside").
// What needs the model is asked of the host: act(name, args, receive); a file opened from disk has no host to ask.

const panels = [];
const overlays = []; // (draw, geometry, scale) => void, painted over the picture in this order
let tool = null; // { down(x, y), move(x, y), up(x, y) } in pixels of the resized picture, while a panel has the mouse
const canAct = Boolean(hands?.act);
frame.classList.toggle("still", !canAct);

function addPanel(panel) {
  const section = make("section", "panel");
  section.dataset.panel = panel.name;
  section.id = `panel-${panel.name}`;
  section.setAttribute("role", "tabpanel");
  section.setAttribute("aria-label", panel.label);
  section.innerHTML = `<h2>${panel.label}</h2><p class="explain">${panel.explain}
    <details class="guard"><summary>Formula, and how to read it</summary><div>${panel.guard}</div></details>
    <p class="note offline">Parts of this need the model: open the page (make demo) to use them.</p>${panel.skeleton}`;
  root.querySelector(".cols").append(section);
  panels.push(panel);
}
function buildTabs() {
  const tabs = [["look", "Look"], ...panels.map((panel) => [panel.name, panel.label])];
  part("tabs").replaceChildren(...tabs.map(([name, label]) => {
    const tab = makeButton(label, () => set({ tab: name }));
    tab.dataset.tab = name;
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-controls", name === "look" ? "panel-look" : `panel-${name}`);
    return tab;
  }));
  part("tabs").onkeydown = (e) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
    if (!step) return;
    e.preventDefault();
    const at = (tabs.findIndex(([name]) => name === state.tab) + step + tabs.length) % tabs.length;
    set({ tab: tabs[at][0] });
    part("tabs").children[at].focus();
  };
}
function layOut() { // before anything is drawn: canvases take the room they find
  for (const tab of part("tabs").children) {
    const on = tab.dataset.tab === state.tab;
    tab.setAttribute("aria-selected", on);
    tab.tabIndex = on ? 0 : -1;
  }
  root.querySelector(".cols").dataset.tab = state.tab === "look" ? "look" : "panel";
  const open = panels.find((panel) => panel.name === state.tab);
  const inside = root.querySelector(".inside"), kept = Boolean(open?.keeps?.includes("inside"));
  const home = kept ? root.getElementById(`panel-${open.name}`) : root.querySelector(".cols");
  inside.classList.toggle("kept", kept);
  // in the panel itself, so that no longer column beside it moves it under the pointer
  if (inside.parentElement !== home) (kept ? home : root.querySelector(".middle"))[kept ? "append" : "after"](inside);
  for (const section of root.querySelectorAll(".panel")) section.hidden = section.dataset.panel !== state.tab;
}
function drawPanels() {
  panels.find((panel) => panel.name === state.tab)?.draw?.();
}

// ---- asking the host
let asked = 0;
const awaited = new Map(); // id -> receive
// receive({ data, done, error }): data as the act yields it, `done` with the last, `error` one sentence instead of data.
function act(name, args, receive, about = run.id) {
  const id = ++asked;
  awaited.set(id, receive);
  hands.act({ id, name, run: about, args });
  return id;
}
function received(result) {
  awaited.get(result.id)?.(result);
  if (result.done || result.error) awaited.delete(result.id);
}
// What stands beside a button that asked; `end` when it is over.
const standing = ({ data, done, error }, end = "") => error || (done ? end : data?.note || "Working…");
// A button that asks: it is off while it waits, says so, and what went wrong stands beside it. `stop`: shown meanwhile.
function acting(button, note, name, args, show, stop = null) {
  const busy = (on) => { button.disabled = on; if (stop) stop.hidden = !on; };
  busy(true);
  note.textContent = "Working…";
  act(name, args, (result) => {
    if (result.data) show(result.data, result.done);
    note.textContent = standing(result);
    if (result.done || result.error) busy(false);
  });
}
// Ends what was asked, whose own last result says what came of it: to this itself there is no answer to wait for.
const stops = (name) => (part(name).onclick = () => hands.act({ id: 0, name: "stop", run: run.id, args: {} }));
