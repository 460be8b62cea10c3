// Files that leave the viewer and come back to it.

const short = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
function download(name, data, type) {
  const link = Object.assign(make("a"), { href: URL.createObjectURL(new Blob([data], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
function choosesFile(button, input, take) { // a button that opens a hidden field for files; both by name
  part(button).onclick = () => part(input).click();
  part(input).onchange = (e) => {
    const [file] = e.target.files;
    e.target.value = ""; // so that the same file can be chosen again
    if (file) take(file);
  };
}
async function uploaded(file, note) { // its path, "" where it failed
  try { return (await hands.upload(file)).path; } catch { note.textContent = `${file.name} could not be uploaded; it may be larger than 32 MB.`; }
  return "";
}
const handed = (receive) => (told, done) => { if (done && told.payload) receive(told.payload); }; // for `acting`
// A run file goes to Python and comes back as a payload; a viewer file has its payload inside and needs nobody.
async function openFile(file, button, note, receive) {
  if (/\.html?$/.test(file.name)) {
    const found = new DOMParser().parseFromString(await file.text(), "text/html").getElementById("run");
    let payload = null;
    try { payload = JSON.parse(found.textContent); } catch { /* told below */ }
    if (payload?.kind === "run" && payload.version === run.version) receive(payload);
    else note.textContent = `${file.name} holds no run that this viewer reads; choose a viewer file that was kept with this version.`;
    return;
  }
  if (!hands?.upload) {
    note.textContent = "A run file needs the page (make demo); here, choose a viewer file (HTML).";
    return;
  }
  button.disabled = true;
  note.textContent = "Uploading…";
  const path = await uploaded(file, note);
  button.disabled = false;
  if (path) acting(button, note, "open_run", { path, name: file.name }, handed(receive));
}
