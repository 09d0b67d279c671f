// A bundle for `onnxruntime`, asked from JavaScript: from token ids and an image's RGB bytes to tokens, without Python.
//
//     node qwen3vl.mjs BUNDLE --ids 4060,4057,12 --image image.png --max-new-tokens 16
//
// In: the bundle's folder; a prompt's token ids, which hold the image token once an image; PNG files, or any decoder's
// RGB bytes. Out: greedy tokens as they come, the stop token that ends them included.
// Guaranteed: token for token what pipeline.py in the bundle gives, which is the longer explanation of each step.
// Axis names: batch (always 1), seq, past, total, patches, images, tokens, hidden; D DeepStack layers.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import ort from "onnxruntime-node";
import { PNG } from "pngjs";

const int64 = (values, dims) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), dims);
const float32 = (values, dims) => new ort.Tensor("float32", values, dims);

/** A PNG's bytes → { rgb: Uint8Array [height, width, 3], height, width }. The alpha channel is dropped, as Pillow does. */
export function decodePng(bytes) {
  const { data, width, height } = PNG.sync.read(bytes);
  const rgb = new Uint8Array(width * height * 3);
  for (let at = 0; at < width * height; at++) rgb.set(data.subarray(4 * at, 4 * at + 3), 3 * at);
  return { rgb, height, width };
}

export class Bundle {
  /** Opens the four graphs in `folder`. */
  static async load(folder) {
    const bundle = new Bundle();
    bundle.settings = JSON.parse(readFileSync(join(folder, "pipeline.json"), "utf8"));
    const open = (name) => ort.InferenceSession.create(join(folder, `${name}.onnx`));
    bundle.preprocessor = await open("image_preprocessor");
    bundle.vision = await open("vision_encoder");
    bundle.embeddings = await open("embeddings");
    bundle.model = await open("model");
    return bundle;
  }

  /** An image → its features: main [tokens, hidden], DeepStack [D, tokens, hidden]; and its grid in tokens. */
  async see({ rgb, height, width }) {
    if (Math.max(height, width) > 200 * Math.min(height, width)) throw new Error(`${width} x ${height}: too long`);
    const image = new ort.Tensor("uint8", rgb, [height, width, 3]);
    const pixels = await this.preprocessor.run({ image });
    const found = await this.vision.run(pixels); // pixel_values [patches, …], image_grid_thw [1, 3]
    const merge = this.settings.spatial_merge_size;
    const [, down, across] = Array.from(pixels.image_grid_thw.data, Number);
    return {
      main: found.pooled_embeds.data,
      levels: found.deepstack_features?.data,
      height: down / merge,
      width: across / merge,
    };
  }

  /**
   * Everything that the decoder takes of a prompt: inputs_embeds [1, seq, hidden], deepstack_embeds [D, 1, seq, hidden],
   * position_ids [3, 1, seq], and the position behind them. `ids` hold the image token once an image.
   */
  async prepare(ids, images = []) {
    const { hidden, deepstack, image_token_id: imageToken } = this.settings;
    const seen = [];
    for (const image of images) seen.push(await this.see(image));
    const tokens = seen.map((one) => one.height * one.width);
    let nth = 0;
    const spread = ids.flatMap((id) => (id === imageToken ? Array(tokens[nth++]).fill(id) : [id]));
    if (nth !== images.length) throw new Error(`${nth} image tokens for ${images.length} images`);

    const seq = spread.length;
    const embeds = await this.embed(spread);
    const levels = new Float32Array(deepstack * seq * hidden); // 0 at text
    const positions = new Float64Array(3 * seq);
    let next = 0; // the position of the next text token
    for (let at = 0, image = 0; at < seq; ) {
      if (spread[at] !== imageToken) {
        for (let axis = 0; axis < 3; axis++) positions[axis * seq + at] = next;
        next++, at++;
        continue;
      }
      const { main, levels: own, height, width } = seen[image];
      const count = tokens[image++];
      embeds.set(main, at * hidden);
      for (let level = 0; level < deepstack; level++) {
        const part = own.subarray(level * count * hidden, (level + 1) * count * hidden);
        levels.set(part, (level * seq + at) * hidden);
      }
      for (let inside = 0; inside < count; inside++) {
        positions[at + inside] = next; // time stands still
        positions[seq + at + inside] = next + Math.floor(inside / width);
        positions[2 * seq + at + inside] = next + (inside % width);
      }
      next += Math.max(height, width);
      at += count;
    }
    return { seq, embeds, levels, positions, next };
  }

  /** inputs_embeds [1, seq, hidden] of token ids. */
  async embed(ids) {
    const { inputs_embeds: found } = await this.embeddings.run({ input_ids: int64(ids, [1, ids.length]) });
    return found.data;
  }

  /** Greedy tokens as they come. The first `least` are no stop tokens. */
  async *generate(ids, images, most, least = 0) {
    const { hidden, deepstack, eos_token_ids: stops, max_length: longest } = this.settings;
    let { seq, embeds, levels, positions, next } = await this.prepare(ids, images);
    if (seq + most > longest) throw new Error(`${seq} + ${most} tokens are more than ${longest}`);
    let past = this.emptyPast();
    let total = 0;
    for (let step = 0; step < most; step++) {
      total += seq;
      const feed = {
        ...past,
        inputs_embeds: float32(embeds, [1, seq, hidden]),
        attention_mask: int64(Array(total).fill(1), [1, total]),
        position_ids: int64(positions, [3, 1, seq]),
      };
      if (deepstack) feed.deepstack_embeds = float32(levels, [deepstack, 1, seq, hidden]);
      const found = await this.model.run(feed);
      const vocab = found.logits.dims[2];
      const logits = found.logits.data.subarray((seq - 1) * vocab); // the last position's
      if (step < least) for (const stop of stops) logits[stop] = -Infinity;
      const token = logits.reduce((best, value, at) => (value > logits[best] ? at : best), 0);
      yield token;
      if (stops.includes(token)) return;
      past = Object.fromEntries(Object.keys(past).map((name) => [name, found[name.replace("past_key_values", "present")]]));
      seq = 1;
      embeds = await this.embed([token]);
      levels = new Float32Array(deepstack * hidden);
      positions = [next, next, next];
      next++;
    }
  }

  /** past_key_values.N.key and .value, each [1, kv_heads, 0, head_dim]. */
  emptyPast() {
    const ports = this.model.inputMetadata.filter((port) => port.name.startsWith("past_key_values."));
    return Object.fromEntries(
      ports.map(({ name, shape }) => [name, float32(new Float32Array(0), [1, shape[1], 0, shape[3]])]),
    );
  }
}

async function main() {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      ids: { type: "string" },
      image: { type: "string", multiple: true, default: [] },
      "max-new-tokens": { type: "string", default: "256" },
    },
  });
  if (positionals.length !== 1 || !values.ids) {
    console.error("usage: node qwen3vl.mjs BUNDLE --ids ID,ID,… [--image FILE.png]… [--max-new-tokens N]");
    process.exit(2);
  }
  const bundle = await Bundle.load(positionals[0]);
  const images = values.image.map((file) => decodePng(readFileSync(file)));
  const tokens = bundle.generate(values.ids.split(",").map(Number), images, Number(values["max-new-tokens"]));
  for await (const token of tokens) console.log(token);
}

if (process.argv[1] === fileURLToPath(import.meta.url)) await main();
