// The model: from an image's file and a question to tokens, with transformers.js on WebAssembly or WebGPU.
// First message: {places: {library, wasm, device}}. Then {image: File or null, question, most} for each question.
// Answers: {status}, {text} a piece, and at the end {tokens, seconds} or {error}.
// Where it only looks at images: {look: File, places}, answered by {seen} or {error}.
const BUNDLE = ".."; // seen from this file
const MADE_FOR = "@TRANSFORMERS_JS@";
const json = async (name) => (await fetch(new URL(`${BUNDLE}/${name}`, import.meta.url))).json();

let loading = null;

async function imported({ library, wasm, device }) {
  const lib = await import(library).catch((error) => {
    throw new Error(`transformers.js ${MADE_FOR} is not at ${library} (see below): ${error.message}`);
  });
  const { env } = lib;
  env.allowLocalModels = true;
  env.allowRemoteModels = false;
  env.useBrowserCache = false; // the browser's own cache asks whether a file has changed
  env.useWasmCache = false;
  // The build for the CPU alone: image_preprocessor.onnx needs float64, which that for WebGPU has not.
  const build = (file) => (device === "webgpu" ? file : file.replace(".asyncify", ""));
  const { wasmPaths } = env.backends.onnx.wasm;
  for (const [kind, url] of Object.entries(wasmPaths)) {
    const [, folder, file] = /^(.*\/)([^/]*)$/.exec(url);
    wasmPaths[kind] = (wasm ?? folder) + build(file);
  }
  return lib;
}

// What looks at images here: a file → {pixel_values, image_grid_thw}.
async function eye(lib) {
  const preprocessor = await lib.AutoModel.from_pretrained(BUNDLE, {
    config: { model_type: "custom" },
    model_file_name: "image_preprocessor",
    dtype: "fp32",
    device: "wasm",
  });
  return async (image) => preprocessor({ image: await pixels(image, lib) });
}

// The same in a worker of its own, which has another build of the runtime.
function eyeElsewhere(lib, places) {
  const worker = new Worker(import.meta.url, { type: "module" });
  const tensors = (seen) =>
    Object.fromEntries(Object.entries(seen).map(([name, [type, data, dims]]) => [name, new lib.Tensor(type, data, dims)]));
  return (image) =>
    new Promise((resolve, reject) => {
      worker.onmessage = ({ data }) => {
        if (data.seen) resolve(tensors(data.seen));
        if (data.error) reject(new Error(data.error));
      };
      worker.onerror = (event) => reject(new Error(event.message || "the worker that looks at images did not start"));
      worker.postMessage({ look: image, places: { ...places, device: "wasm" } });
    });
}

async function load(places) {
  const { device } = places;
  if (device !== "wasm" && device !== "webgpu") throw new Error(`device=${device}: there are wasm and webgpu.`);
  if (device === "webgpu" && !(await navigator.gpu?.requestAdapter())) {
    throw new Error("This browser offers no WebGPU here: leave device=webgpu away.");
  }
  postMessage({ status: "Loading the library …" });
  const lib = await imported(places);
  postMessage({ status: "Loading the model …" });
  const settings = await json("pipeline.json");
  const tokenizer = await lib.AutoTokenizer.from_pretrained(BUNDLE);
  const model = await lib.Qwen3VLForConditionalGeneration.from_pretrained(BUNDLE, { device });
  const look = device === "webgpu" ? eyeElsewhere(lib, places) : await eye(lib);
  const { version } = lib.env;
  const made = version === MADE_FOR ? "" : ` (transformers.js ${version}; the page was made for ${MADE_FOR})`;
  postMessage({ status: `Loaded${made}.` });
  return { lib, settings, tokenizer, model, look };
}

async function seen({ look, places }) {
  loading ??= imported(places).then(eye);
  const tensors = Object.entries(await (await loading)(look));
  postMessage({ seen: Object.fromEntries(tensors.map(([name, { type, data, dims }]) => [name, [type, data, dims]])) });
}

// The image's bytes as they are in the file: turned by its EXIF orientation, colours not converted.
async function pixels(image, { Tensor }) {
  const options = { imageOrientation: "from-image", premultiplyAlpha: "none", colorSpaceConversion: "none" };
  const bitmap = await createImageBitmap(image, options);
  const { width, height } = bitmap;
  if (Math.max(width, height) > 200 * Math.min(width, height)) {
    throw new Error(`An image of ${width} × ${height} is too narrow: at most 200 to 1.`);
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
  // Words that stand for an image would be counted as one.
  if ([settings.image_token, settings.video_token].some((word) => question.includes(word))) {
    throw new Error(`The question may hold neither ${settings.image_token} nor ${settings.video_token}.`);
  }
  postMessage({ status: image ? "Looking at the image …" : "Reading the question …" });
  const features = image ? await look(image) : {};
  let shown = "";
  if (image) {
    const patches = Array.from(features.image_grid_thw.data, Number).reduce((a, b) => a * b, 1);
    const tokens = patches / settings.spatial_merge_size ** 2;
    shown = placeholder.replace(settings.image_token, settings.image_token.repeat(tokens));
  }
  const inputs = await tokenizer(`${prefix}${shown}${question}${suffix}`, { add_special_tokens: false });
  if (inputs.input_ids.dims[1] + most > settings.max_length) {
    throw new Error(`Question and answer are more than ${settings.max_length} tokens: ask for a shorter answer.`);
  }
  const tokens = [];
  const streamer = new lib.TextStreamer(tokenizer, {
    skip_prompt: true,
    callback_function: (text) => postMessage({ text }),
    token_callback_function: (given) => tokens.push(...Array.from(given, Number)),
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
    if (data.look) await seen(data);
    else if (data.places) await (loading = load(data.places));
    else await answer(data);
  } catch (error) {
    postMessage({ error: String(error?.message ?? error) });
  }
};
