// The model: from a picture's file and a question to tokens, with transformers.js on WebAssembly.
// First message: {places: {library, wasm}}. Then {picture: File or null, question, most} for each question.
// Answers: {status}, {text} a piece, and at the end {tokens, seconds} or {error}.
const BUNDLE = ".."; // seen from this file
const MADE_FOR = "@TRANSFORMERS_JS@";
const json = async (name) => (await fetch(new URL(`${BUNDLE}/${name}`, import.meta.url))).json();

let loading = null;

async function load({ library, wasm }) {
  postMessage({ status: "Loading the library …" });
  const lib = await import(library).catch((error) => {
    throw new Error(`transformers.js ${MADE_FOR} is not at ${library} (see below): ${error.message}`);
  });
  const { AutoModel, AutoTokenizer, Qwen3VLForConditionalGeneration, env } = lib;
  env.allowLocalModels = true;
  env.allowRemoteModels = false;
  env.useBrowserCache = false; // the browser's own cache asks whether a file has changed
  env.useWasmCache = false;
  // The build for the CPU alone: image_preprocessor.onnx needs float64, which the library's first choice has not.
  const { wasmPaths } = env.backends.onnx.wasm;
  for (const [kind, url] of Object.entries(wasmPaths)) {
    const [, folder, file] = /^(.*\/)([^/]*)$/.exec(url);
    wasmPaths[kind] = (wasm ?? folder) + file.replace(".asyncify", "");
  }
  postMessage({ status: "Loading the model …" });
  const settings = await json("pipeline.json");
  const tokenizer = await AutoTokenizer.from_pretrained(BUNDLE);
  const model = await Qwen3VLForConditionalGeneration.from_pretrained(BUNDLE, { device: "wasm" });
  const preprocessor = await AutoModel.from_pretrained(BUNDLE, {
    config: { model_type: "custom" },
    model_file_name: "image_preprocessor",
    dtype: "fp32",
    device: "wasm",
  });
  const made = env.version === MADE_FOR ? "" : ` (transformers.js ${env.version}; the page was made for ${MADE_FOR})`;
  postMessage({ status: `Loaded${made}.` });
  return { lib, settings, tokenizer, model, preprocessor };
}

// The picture's bytes as they are in the file: turned by its EXIF orientation, colours not converted.
async function pixels(picture, { Tensor }) {
  const options = { imageOrientation: "from-image", premultiplyAlpha: "none", colorSpaceConversion: "none" };
  const bitmap = await createImageBitmap(picture, options);
  const { width, height } = bitmap;
  if (Math.max(width, height) > 200 * Math.min(width, height)) {
    throw new Error(`A picture of ${width} × ${height} is too narrow: at most 200 to 1.`);
  }
  const canvas = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  canvas.drawImage(bitmap, 0, 0);
  const { data } = canvas.getImageData(0, 0, width, height);
  const rgb = new Uint8Array(width * height * 3);
  for (let from = 0, to = 0; from < data.length; from += 4, to += 3) rgb.set(data.subarray(from, from + 3), to);
  return new Tensor("uint8", rgb, [height, width, 3]);
}

async function answer({ picture, question, most }) {
  const { lib, settings, tokenizer, model, preprocessor } = await loading;
  const { prefix, image, suffix } = settings.prompt;
  // Words that stand for a picture would be counted as one.
  if ([settings.image_token, settings.video_token].some((word) => question.includes(word))) {
    throw new Error(`The question may hold neither ${settings.image_token} nor ${settings.video_token}.`);
  }
  postMessage({ status: picture ? "Looking at the picture …" : "Reading the question …" });
  const seen = picture ? await preprocessor({ image: await pixels(picture, lib) }) : {};
  let shown = "";
  if (picture) {
    const patches = Array.from(seen.image_grid_thw.data, Number).reduce((a, b) => a * b, 1);
    shown = image.replace(settings.image_token, settings.image_token.repeat(patches / settings.spatial_merge_size ** 2));
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
    ...seen,
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
    if (data.places) await (loading = load(data.places));
    else await answer(data);
  } catch (error) {
    postMessage({ error: String(error?.message ?? error) });
  }
};
