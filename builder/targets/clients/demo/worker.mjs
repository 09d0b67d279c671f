// Runs the model with transformers.js on WebAssembly or WebGPU: from an image file and a question to tokens.
// Messages in: first {places: {library, wasm, device}}, then {image: File or null, question, most} for each question.
// Messages out: {status}, {text} for each piece of the answer, finally {tokens, seconds} or {error}.
// A worker that only preprocesses images receives {look: File, places} and returns {seen} or {error}.
const BUNDLE = ".."; // relative to this file
const MADE_FOR = "@TRANSFORMERS_JS@";
const json = async (name) => (await fetch(new URL(`${BUNDLE}/${name}`, import.meta.url))).json();

let loading = null;

async function importLibrary({ library, wasm, device }) {
  const lib = await import(library).catch((error) => {
    throw new Error(`transformers.js ${MADE_FOR} is not at ${library} (see below): ${error.message}`);
  });
  const { env } = lib;
  env.allowLocalModels = true;
  env.allowRemoteModels = false;
  env.useBrowserCache = false; // the browser's HTTP cache checks whether a file has changed
  env.useWasmCache = false;
  // image_preprocessor.onnx needs float64, which only the CPU build of onnxruntime-web supports.
  const build = (file) => (device === "webgpu" ? file : file.replace(".asyncify", ""));
  const { wasmPaths } = env.backends.onnx.wasm;
  for (const [kind, url] of Object.entries(wasmPaths)) {
    const [, folder, file] = /^(.*\/)([^/]*)$/.exec(url);
    wasmPaths[kind] = (wasm ?? folder) + build(file);
  }
  return lib;
}

// Returns the image preprocessor, image file → {pixel_values, image_grid_thw}, in this worker.
async function preprocessor(lib) {
  const graph = await lib.AutoModel.from_pretrained(BUNDLE, {
    config: { model_type: "custom" },
    model_file_name: "image_preprocessor",
    dtype: "fp32",
    device: "wasm",
  });
  return async (image) => graph({ image: await pixels(image, lib) });
}

// The same in a separate worker, which loads the CPU build of the runtime.
function preprocessorInWorker(lib, places) {
  const worker = new Worker(import.meta.url, { type: "module" });
  const tensors = (seen) =>
    Object.fromEntries(Object.entries(seen).map(([name, [type, data, dims]]) => [name, new lib.Tensor(type, data, dims)]));
  return (image) =>
    new Promise((resolve, reject) => {
      worker.onmessage = ({ data }) => {
        if (data.seen) resolve(tensors(data.seen));
        if (data.error) reject(new Error(data.error));
      };
      worker.onerror = (event) => reject(new Error(event.message || "the image preprocessor's worker did not start"));
      worker.postMessage({ look: image, places: { ...places, device: "wasm" } });
    });
}

async function load(places) {
  const { device } = places;
  if (device !== "wasm" && device !== "webgpu") throw new Error(`device=${device}: the devices are wasm and webgpu.`);
  if (device === "webgpu" && !(await navigator.gpu?.requestAdapter())) {
    throw new Error("This browser offers no WebGPU here: remove device=webgpu from the address.");
  }
  postMessage({ status: "Loading the library …" });
  const lib = await importLibrary(places);
  postMessage({ status: "Loading the model …" });
  const settings = await json("pipeline.json");
  const tokenizer = await lib.AutoTokenizer.from_pretrained(BUNDLE);
  const model = await lib.Qwen3VLForConditionalGeneration.from_pretrained(BUNDLE, { device });
  const look = device === "webgpu" ? preprocessorInWorker(lib, places) : await preprocessor(lib);
  const { version } = lib.env;
  const note = version === MADE_FOR ? "" : ` (transformers.js ${version}; this page was written for ${MADE_FOR})`;
  postMessage({ status: `Loaded${note}.` });
  return { lib, settings, tokenizer, model, look };
}

async function preprocess({ look, places }) {
  loading ??= importLibrary(places).then(preprocessor);
  const tensors = Object.entries(await (await loading)(look));
  postMessage({ seen: Object.fromEntries(tensors.map(([name, { type, data, dims }]) => [name, [type, data, dims]])) });
}

// Decodes an image to RGB bytes: rotated by its EXIF orientation, colors as in the file.
async function pixels(image, { Tensor }) {
  const options = { imageOrientation: "from-image", premultiplyAlpha: "none", colorSpaceConversion: "none" };
  const bitmap = await createImageBitmap(image, options);
  const { width, height } = bitmap;
  if (Math.max(width, height) > 200 * Math.min(width, height)) {
    throw new Error(`An image of ${width} × ${height} is too narrow: the longer side may be at most 200 times the other.`);
  }
  const canvas = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  canvas.drawImage(bitmap, 0, 0);
  const { data } = canvas.getImageData(0, 0, width, height);
  const rgb = new Uint8Array(width * height * 3);
  for (let from = 0, to = 0; from < data.length; from += 4, to += 3) rgb.set(data.subarray(from, from + 3), to);
  return new Tensor("uint8", rgb, [height, width, 3]);
}

async function answer({ image, question, most }) {
  const { lib, settings, tokenizer, model, look } = await loading;
  const { prefix, image: placeholder, suffix } = settings.prompt;
  // These placeholders would be counted as image features.
  if ([settings.image_token, settings.video_token].some((token) => question.includes(token))) {
    throw new Error(`The question may contain neither ${settings.image_token} nor ${settings.video_token}.`);
  }
  postMessage({ status: image ? "Processing the image …" : "Reading the question …" });
  const features = image ? await look(image) : {};
  let imageText = "";
  if (image) {
    const patches = Array.from(features.image_grid_thw.data, Number).reduce((a, b) => a * b, 1);
    const count = patches / settings.spatial_merge_size ** 2;
    imageText = placeholder.replace(settings.image_token, settings.image_token.repeat(count));
  }
  const inputs = await tokenizer(`${prefix}${imageText}${question}${suffix}`, { add_special_tokens: false });
  if (inputs.input_ids.dims[1] + most > settings.max_length) {
    throw new Error(`Question and answer are more than ${settings.max_length} tokens: ask for a shorter answer.`);
  }
  const tokens = [];
  const streamer = new lib.TextStreamer(tokenizer, {
    skip_prompt: true,
    callback_function: (text) => postMessage({ text }),
    token_callback_function: (ids) => tokens.push(...Array.from(ids, Number)),
  });
  const start = performance.now();
  await model.generate({
    ...inputs,
    ...features,
    max_new_tokens: most,
    eos_token_id: settings.eos_token_ids,
    do_sample: false,
    repetition_penalty: 1,
    streamer,
  });
  postMessage({ tokens, seconds: (performance.now() - start) / 1000 });
}

onmessage = async ({ data }) => {
  try {
    if (data.look) await preprocess(data);
    else if (data.places) await (loading = load(data.places));
    else await answer(data);
  } catch (error) {
    postMessage({ error: String(error?.message ?? error) });
  }
};
