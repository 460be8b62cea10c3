// Lens: what each layer would say next, at the selected word.

addPanel({
  name: "lens",
  label: "Lens",
  explain: "The stream after each layer, read as if it were the last: which word would be said next. It shows from which layer on the answer is settled.",
  guard: "softmax(W<sub>U</sub> norm(x<sub>l</sub>)). Early layers need not speak the last layer's language, so an odd word early on says little.",
  skeleton: `<div class="acts"><button class="go" data-part="lens-go" type="button">Read the layers</button></div>
    <p class="note" data-part="lens-note" aria-live="polite"></p><div class="scroll" data-part="lens-table"></div>`,
  open() {
    part("lens-note").textContent = "";
    part("lens-table").replaceChildren();
  },
});
part("lens-go").onclick = (e) => {
  const position = () => ({ position: selectedRows().at(-1) + run.first_row });
  acting(e.target, part("lens-note"), "lens", position, ({ layers, words, probs }) => {
    if (!words) return;
    const head = ["after layer", "likeliest", "", "2nd", "", "3rd", ""];
    const rows = layers.map((name, l) => [name, ...words[l].slice(0, 3).flatMap((word, k) => [quote(word), percent(probs[l][k])])]);
    part("lens-table").replaceChildren(table(head, rows));
  });
};
