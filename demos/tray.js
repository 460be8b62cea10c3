// The pictures of a question: thumbnails that can be moved and taken away, and a place for more. `arrange` tells Python.
const tray = element.querySelector(".tray"), list = tray.querySelector("ol"), file = tray.querySelector("input");
const place = tray.querySelector("button"), hint = tray.querySelector(".hint"), empty = hint.textContent;
let focus = null; // where the keyboard was: [id, what], found again when the row is drawn anew

function button(id, what, sign, label, off) {
  const made = document.createElement("button");
  Object.assign(made, { type: "button", textContent: sign, title: label, disabled: off });
  made.setAttribute("aria-label", label);
  made.dataset.what = `${id} ${what}`;
  made.onclick = () => {
    focus = [id, what];
    trigger("arrange", what === "remove" ? { what, id } : { what: "move", id, by: what === "left" ? -1 : 1 });
  };
  return made;
}
function show() {
  const pictures = props.value?.pictures || [];
  list.replaceChildren(...pictures.map(({ id, src }, i) => {
    const item = document.createElement("li"), image = document.createElement("img"), tools = document.createElement("span");
    Object.assign(image, { src, alt: `Picture ${i + 1} of ${pictures.length}` });
    if (pictures.length > 1) tools.append(button(id, "left", "‹", `Move picture ${i + 1} to the left`, i === 0));
    tools.append(button(id, "remove", "×", `Remove picture ${i + 1}`, false));
    if (pictures.length > 1) tools.append(button(id, "right", "›", `Move picture ${i + 1} to the right`, i === pictures.length - 1));
    item.append(image, tools);
    return item;
  }));
  list.hidden = !pictures.length;
  list.classList.toggle("one", pictures.length === 1);
  hint.textContent = pictures.length ? "Add pictures: drop, paste or click" : empty;
  tray.classList.remove("busy");
  place.disabled = false;
  if (focus) {
    const same = list.querySelector(`[data-what="${focus.join(" ")}"]`);
    (same && !same.disabled ? same : list.querySelector(`[data-what="${focus[0]} remove"]`) || place).focus();
    focus = null;
  }
}
async function add(files) {
  if (!files.length || place.disabled) return;
  place.disabled = true;
  tray.classList.add("busy");
  hint.textContent = `Uploading ${files.length === 1 ? files[0].name || "a picture" : `${files.length} pictures`}…`;
  const done = [], failed = [];
  for (const one of files) {
    const name = one.name || "the pasted picture";
    try { done.push({ path: (await upload(one)).path, name }); } catch { failed.push(name); }
  }
  trigger("arrange", { what: "add", files: done, failed });
}
place.onclick = () => file.click();
file.onchange = () => { add([...file.files]); file.value = ""; };
tray.ondragover = (e) => { e.preventDefault(); tray.classList.add("over"); };
tray.ondragleave = () => tray.classList.remove("over");
tray.ondrop = (e) => { e.preventDefault(); tray.classList.remove("over"); add([...e.dataTransfer.files]); };
document.addEventListener("paste", (e) => {
  const files = [...(e.clipboardData?.files || [])];
  if (!files.length || !element.isConnected) return; // text goes where it was meant to go
  e.preventDefault();
  add(files);
});
watch("value", show);
show();
