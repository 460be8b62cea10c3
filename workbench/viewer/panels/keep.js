// Keep: files of this run, opening one, and the runs of this visit.

addPanel({
  name: "keep",
  label: "Keep",
  explain: "Take this run with you: as a file that the workbench opens again, as one HTML file for anybody, or as figures and numbers. A run that was kept is shown without the model.",
  guard: "A run file holds the pictures, the words, each layer's experts with their scores, and how much attention went where (<code>Run.load</code> reads it). It holds no weights: what needs the model needs the same weights again, and the line at the foot says which.",
  skeleton: `<h3>This run</h3><div class="row">
      <button class="acts" data-part="keep-run" type="button">Run file</button>
      <button class="acts" data-part="keep-html" type="button">Viewer, one HTML file</button>
      <button class="acts" data-part="keep-zip" type="button">Figures and numbers (ZIP)</button>
      <button data-part="keep-words" type="button">Words as CSV</button>
      <button class="acts" data-part="keep-stop" type="button" hidden>Stop</button></div>
    <p class="note" data-part="keep-note" aria-live="polite"></p>
    <div class="acts"><h3>Open a run</h3><div class="row"><button data-part="keep-open" type="button">Choose a run file…</button></div>
    <input type="file" data-part="keep-file" accept=".run,.safetensors" aria-label="Run file" hidden>
    <p class="note" data-part="keep-opened" aria-live="polite">A file from this page, from <code>kimi-vl run</code> or from <code>Run.save</code>.</p>
    <h3>Runs of this visit</h3><div class="scroll" data-part="keep-list"></div></div>`,
  open() {
    say("keep-note", "");
    if (state.tab === "keep") listKept();
    else kept.listed = null;
  },
  draw() {
    if (canAct && kept.listed !== run.id) listKept();
  },
});
const kept = { listed: null };
function keeping(name, button, type, stop = null) {
  part(button).onclick = (e) => acting(e.target, part("keep-note"), name, { id: run.id }, (told, done) => {
    if (done && told.data) download(told.name, bytes(told.data), type);
  }, stop);
}
keeping("run_file", "keep-run", "application/octet-stream");
keeping("viewer_file", "keep-html", "text/html");
keeping("figures", "keep-zip", "application/zip", part("keep-stop"));
stops("keep-stop");
part("keep-words").onclick = () => {
  const cell = (text) => `"${`${text ?? ""}`.replaceAll('"', '""')}"`;
  const head = ["position", "word", "role", "probability", "entropy_nats", ...run.role_names.map((name) => `attention ${name}`)];
  const lines = run.words.at.map((at, w) => {
    const row = rowOf(w, "read"), mass = row < 0 ? run.role_names.map(() => "") : [...mean(run.mass, [row], "all", "all")].map((v) => v.toFixed(5));
    const sure = run.words.logprob[w] === null ? "" : Math.exp(run.words.logprob[w]).toFixed(5);
    return [at, run.words.text[w], run.words.role[w], sure, run.words.entropy[w] ?? "", ...mass].map(cell).join(",");
  });
  download("kimi-vl-words.csv", [`# weights: ${run.model.name}`, head.map(cell).join(","), ...lines].join("\n") + "\n", "text/csv");
};
choosesFile("keep-open", "keep-file", (file) => openFile(file, part("keep-open"), part("keep-opened"), show));
function listKept() {
  kept.listed = run.id;
  act("runs", {}, ({ data }) => {
    if (!data?.runs) return;
    const rows = data.runs.map((one) => [one.id, short(one.question, 60), short(one.answer, 40), one.weights, one.edits.join("; ") || "none", ""]);
    const made = table(["run", "question", "answer", "weights", "edits", ""], rows, (i) => (data.runs[i].id === run.id ? "now" : ""));
    [...made.tBodies[0].rows].forEach((row, i) => {
      const { id } = data.runs[i], button = makeButton(id === run.id ? "shown" : "Show", () => acting(button, part("keep-opened"), "show_run", { id }, handed(show)));
      button.disabled = id === run.id;
      button.setAttribute("aria-label", `Show run ${id}`);
      row.cells[5].replaceChildren(button);
    });
    part("keep-list").replaceChildren(made);
  });
}
