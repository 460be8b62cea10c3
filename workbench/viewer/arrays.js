// A payload's arrays, and its pictures.

async function unpack({ shape, kind, data }) {
  const squeezed = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const stream = new Blob([squeezed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = await new Response(stream).arrayBuffer();
  const raw = kind === "float32" ? new Float32Array(bytes) : kind.endsWith("16") ? new Uint16Array(bytes) : new Uint8Array(bytes);
  const steps = { root8: 256, unit8: 256, unit16: 65536 }[kind];
  if (!steps) return { shape, raw, at: (i) => raw[i] };
  const value = Float32Array.from({ length: steps }, (_, q) => (kind === "root8" ? (q / 255) ** 2 : q / (steps - 1)));
  return { shape, raw, at: (i) => value[raw[i]] };
}
async function open(payload) {
  const names = ["attention", "mass", "chosen", "chosen_early", "chosen_picture", "weights", "scores", "bias"];
  const arrays = await Promise.all(names.map((name) => unpack(payload[name])));
  const opened = { ...payload, ...Object.fromEntries(names.map((name, i) => [name, arrays[i]])), counted: {}, failed: {}, owed: new Map(), neutral: null, eye: null };
  opened.onPicture = payload.role_names.map((name) => name.startsWith("image"));
  return opened;
}
function images(payload) {
  return Promise.all(payload.pictures.map(async ({ src }) => {
    const image = new Image();
    image.src = src;
    await image.decode().catch(() => {});
    return image;
  }));
}
