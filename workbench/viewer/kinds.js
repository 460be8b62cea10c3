// What a sentence of a thought is doing, as a colour and a word: the same wherever a thought is shown (colours: think.css).

const KINDS = {
  plan: "says what to do", look: "tells what is seen", compute: "calculates", check: "tests what it has",
  backtrack: "takes something back", conclude: "says what follows", other: "has no cue",
};
function inKind(text, kind, className = "") {
  const made = make("span", `kind ${className}`, text);
  made.dataset.kind = kind;
  return made;
}
function kindLegend(kinds) { // of the kinds that occur
  const made = make("div", "legend kinds");
  for (const kind of Object.keys(KINDS)) if (kinds.includes(kind)) made.append(Object.assign(inKind(kind, kind, "swatch"), { title: KINDS[kind] }));
  return made;
}
const kindOf = (word) => run.segments.find(([a, b]) => a <= word && word <= b)?.[2];
const stepTexts = (payload) => payload.segments.map(([a, b, kind]) => [payload.words.text.slice(a, b + 1).join(""), kind]);
