// Runs a bundle in transformers.js: `node runner.mjs PACKAGES BUNDLE`, where PACKAGES contains node_modules.
// Reads requests from stdin, a line of JSON each, and writes lines of JSON to stdout; the last for a request has "end".
// Fetches nothing, and writes only the file that a request names.
import { readFile, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join, resolve } from "node:path";
import { createInterface } from "node:readline";

const [packages, bundle] = process.argv.slice(2).map((path) => resolve(path));
// stdout is for responses only.
const respond = (line) => process.stdout.write(`${JSON.stringify(line)}\n`);
console.log = console.info = console.debug = console.warn = console.error;

const library = createRequire(join(packages, "any.cjs"))("@huggingface/transformers");
const { AutoProcessor, BaseStreamer, Qwen3VLForConditionalGeneration, RawImage, Tensor, env } = library;
env.allowRemoteModels = false;
env.useFSCache = false; // the bundle's files are read in place

let model, processor;

class Tokens extends BaseStreamer {
  prompt = true;

  put(rows) {
    if (!this.prompt) respond({ token: Number(rows[0].at(-1)) });
    this.prompt = false;
  }

  end() {}
}

const int64 = (values, dims) => new Tensor("int64", BigInt64Array.from(values.flat().map(BigInt)), dims);

async function floats(path) {
  const bytes = await readFile(path);
  return new Float32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4);
}

const actions = {
  // Loads the graphs, so that a broken bundle is reported before the first prompt.
  async open() {
    model ??= await Qwen3VLForConditionalGeneration.from_pretrained(bundle);
  },

  // {ids: [seq], pixels?: {path, dims}, grid?: [[t, h, w], …], most, least, stop: [id, …]} → {token} for each token.
  async generate({ ids, pixels, grid, most, least, stop }) {
    await actions.open();
    const inputs = {
      input_ids: int64(ids, [1, ids.length]),
      attention_mask: int64(ids.map(() => 1), [1, ids.length]),
    };
    if (pixels) {
      inputs.pixel_values = new Tensor("float32", await floats(pixels.path), pixels.dims);
      inputs.image_grid_thw = int64(grid, [grid.length, 3]);
    }
    await model.generate({
      ...inputs,
      max_new_tokens: most,
      min_new_tokens: least,
      eos_token_id: stop,
      do_sample: false,
      repetition_penalty: 1,
      streamer: new Tokens(),
    });
  },

  // {text, image, out} → {ids, grid, dims}, from the library's own processor; writes pixel values to the file `out`.
  async process({ text, image, out }) {
    processor ??= await AutoProcessor.from_pretrained(bundle);
    const inputs = await processor(text, await RawImage.read(image));
    const { data } = inputs.pixel_values;
    await writeFile(out, Buffer.from(data.buffer, data.byteOffset, data.byteLength));
    const [ids, grid] = [inputs.input_ids, inputs.image_grid_thw].map((tensor) => Array.from(tensor.data, Number));
    respond({ ids, grid, dims: inputs.pixel_values.dims });
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const { action, ...request } = JSON.parse(line);
  try {
    await actions[action](request);
    respond({ end: true });
  } catch (error) {
    respond({ end: true, error: String(error?.message ?? error) });
  }
}
