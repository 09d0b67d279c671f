// Sends an image and a question to worker.mjs and shows the answer as it arrives.
const PACKAGES = "../../node_modules/"; // next to the bundle's folder
const at = (name) => document.getElementById(name);
const parameters = new URLSearchParams(location.search);
const places = {
  library: new URL(
    parameters.get("library") ?? `${PACKAGES}@huggingface/transformers/dist/transformers.min.js`,
    import.meta.url,
  ).href,
  // A library from another address finds its own WebAssembly files.
  wasm: parameters.get("wasm") ?? (parameters.has("library") ? null : `${PACKAGES}onnxruntime-web/dist/`),
  device: parameters.get("device") ?? "wasm",
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

function startWorker() {
  const started = new Worker(new URL("worker.mjs", import.meta.url), { type: "module" });
  started.onmessage = ({ data }) => {
    if (data.status) show(data.status);
    if (data.text) at("answer").textContent += data.text;
    if (data.tokens) {
      at("answer").dataset.tokens = JSON.stringify(data.tokens);
      const rate = (data.tokens.length / data.seconds).toFixed(1);
      show(`Done: ${data.tokens.length} tokens in ${data.seconds.toFixed(1)} s, ${rate} a second.`);
      busy(false);
    }
    if (data.error) endWorker(data.error);
  };
  started.onerror = (event) => endWorker(event.message || "the worker did not start");
  started.postMessage({ places });
  return started;
}

// A worker that failed or was stopped during an answer is not reused.
function endWorker(why) {
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
  worker ??= startWorker();
  worker.postMessage({
    image: at("image").files[0] ?? null,
    question: at("question").value,
    most: Number(at("most").value),
  });
});

at("stop").addEventListener("click", () => endWorker("Stopped."));
busy(false);
