// The page: hands an image and a question to worker.mjs, shows the answer as it comes.
const PACKAGES = "../../node_modules/"; // beside the bundle's folder
const at = (name) => document.getElementById(name);
const asked = new URLSearchParams(location.search);
const places = {
  library: new URL(
    asked.get("library") ?? `${PACKAGES}@huggingface/transformers/dist/transformers.min.js`,
    import.meta.url,
  ).href,
  // A library from elsewhere knows where its own WebAssembly is.
  wasm: asked.get("wasm") ?? (asked.has("library") ? null : `${PACKAGES}onnxruntime-web/dist/`),
  device: asked.get("device") ?? "wasm",
};
if (places.wasm) places.wasm = new URL(places.wasm, import.meta.url).href;

let worker = null;

function show(text, isError = false) {
  at("status").textContent = text;
  at("status").classList.toggle("error", isError);
}

function busy(yes) {
  document.body.dataset.state = yes ? "busy" : "ready";
  at("ask").disabled = yes;
  at("stop").disabled = !yes;
}

function started() {
  const made = new Worker(new URL("worker.mjs", import.meta.url), { type: "module" });
  made.onmessage = ({ data }) => {
    if (data.status) show(data.status);
    if (data.text) at("answer").textContent += data.text;
    if (data.tokens) {
      at("answer").dataset.tokens = JSON.stringify(data.tokens);
      const rate = (data.tokens.length / data.seconds).toFixed(1);
      show(`Done: ${data.tokens.length} tokens in ${data.seconds.toFixed(1)} s, ${rate} a second.`);
      busy(false);
    }
    if (data.error) ended(data.error);
  };
  made.onerror = (event) => ended(event.message || "the worker did not start");
  made.postMessage({ places });
  return made;
}

// A worker that failed, or was stopped in the middle of an answer, is not used again.
function ended(why) {
  worker?.terminate();
  worker = null;
  show(why, why !== "Stopped.");
  busy(false);
}

at("image").addEventListener("change", () => {
  const [file] = at("image").files;
  if (at("preview").src) URL.revokeObjectURL(at("preview").src);
  at("preview").hidden = !file;
  if (file) at("preview").src = URL.createObjectURL(file);
});

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  at("answer").textContent = "";
  delete at("answer").dataset.tokens;
  busy(true);
  worker ??= started();
  worker.postMessage({
    image: at("image").files[0] ?? null,
    question: at("question").value,
    most: Number(at("most").value),
  });
});

at("stop").addEventListener("click", () => ended("Stopped."));
busy(false);
