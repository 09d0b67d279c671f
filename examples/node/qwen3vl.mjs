// Runs an `onnxruntime` bundle from JavaScript, without Python: from token ids and RGB images to tokens.
//
//     node qwen3vl.mjs BUNDLE --ids 4060,4057,12 --image image.png --max-new-tokens 16
//
// The ids are those of a complete prompt, with one image token per image. The tokens are greedy, up to and including the
// stop token, and equal those of pipeline.py in the bundle, which explains each step at greater length.
// Axis names: batch (always 1), seq, past, total, patches, images, tokens, hidden; D is the number of DeepStack layers.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import ort from "onnxruntime-node";
import { PNG } from "pngjs";

const int64 = (values, dims) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), dims);
const float32 = (values, dims) => new ort.Tensor("float32", values, dims);

/** Decodes a PNG to { rgb: Uint8Array [height, width, 3], height, width }; drops the alpha channel, as Pillow does. */
export function decodePng(bytes) {
  const { data, width, height } = PNG.sync.read(bytes);
  const rgb = new Uint8Array(width * height * 3);
  for (let at = 0; at < width * height; at++) rgb.set(data.subarray(4 * at, 4 * at + 3), 3 * at);
  return { rgb, height, width };
}

export class Bundle {
  /** Opens the settings and the four graphs in `folder`. */
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

  /** Encodes an image: features [tokens, hidden] and [D, tokens, hidden] (DeepStack), height and width in tokens. */
  async encodeImage({ rgb, height, width }) {
    if (Math.max(height, width) > 200 * Math.min(height, width)) throw new Error(`${width} x ${height}: one side is too long`);
    const image = new ort.Tensor("uint8", rgb, [height, width, 3]);
    const pixels = await this.preprocessor.run({ image });
    const features = await this.vision.run(pixels); // pixel_values [patches, …], image_grid_thw [1, 3]
    const merge = this.settings.spatial_merge_size;
    const [, rows, columns] = Array.from(pixels.image_grid_thw.data, Number);
    return {
      main: features.pooled_embeds.data,
      deepstack: features.deepstack_features?.data,
      height: rows / merge,
      width: columns / merge,
    };
  }

  /**
   * Computes the decoder's inputs for a prompt: embeds [1, seq, hidden], deepstack [D, 1, seq, hidden],
   * positions [3, 1, seq], and the position `next` of the first generated token.
   */
  async prepare(ids, images = []) {
    const { hidden, deepstack: layers, image_token_id: imageToken } = this.settings;
    const encoded = [];
    for (const image of images) encoded.push(await this.encodeImage(image));
    const counts = encoded.map((features) => features.height * features.width);
    let found = 0;
    const expanded = ids.flatMap((id) => (id === imageToken ? Array(counts[found++]).fill(id) : [id]));
    if (found !== images.length) throw new Error(`${found} image tokens for ${images.length} images`);

    const seq = expanded.length;
    const embeds = await this.embed(expanded);
    const deepstack = new Float32Array(layers * seq * hidden); // 0 at text tokens
    const positions = new Float64Array(3 * seq);
    let next = 0; // the position of the next text token
    for (let at = 0, image = 0; at < seq; ) {
      if (expanded[at] !== imageToken) {
        for (let axis = 0; axis < 3; axis++) positions[axis * seq + at] = next;
        next++, at++;
        continue;
      }
      const { main, deepstack: features, height, width } = encoded[image];
      const count = counts[image++];
      embeds.set(main, at * hidden);
      for (let layer = 0; layer < layers; layer++) {
        const part = features.subarray(layer * count * hidden, (layer + 1) * count * hidden);
        deepstack.set(part, (layer * seq + at) * hidden);
      }
      for (let index = 0; index < count; index++) {
        positions[at + index] = next; // an image has one time step
        positions[seq + at + index] = next + Math.floor(index / width);
        positions[2 * seq + at + index] = next + (index % width);
      }
      next += Math.max(height, width);
      at += count;
    }
    return { seq, embeds, deepstack, positions, next };
  }

  /** Looks up token ids: inputs_embeds [1, seq, hidden]. */
  async embed(ids) {
    const { inputs_embeds: embeds } = await this.embeddings.run({ input_ids: int64(ids, [1, ids.length]) });
    return embeds.data;
  }

  /** Yields at most `most` greedy tokens; the first `least` are never stop tokens. */
  async *generate(ids, images, most, least = 0) {
    const { hidden, deepstack: layers, eos_token_ids: stops, max_length: maxLength } = this.settings;
    let { seq, embeds, deepstack, positions, next } = await this.prepare(ids, images);
    if (seq + most > maxLength) throw new Error(`${seq} + ${most} tokens are more than ${maxLength}`);
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
      if (layers) feed.deepstack_embeds = float32(deepstack, [layers, 1, seq, hidden]);
      const outputs = await this.model.run(feed);
      const vocab = outputs.logits.dims[2];
      const logits = outputs.logits.data.subarray((seq - 1) * vocab); // of the last position
      if (step < least) for (const stop of stops) logits[stop] = -Infinity;
      const token = logits.reduce((best, value, at) => (value > logits[best] ? at : best), 0);
      yield token;
      if (stops.includes(token)) return;
      past = Object.fromEntries(
        Object.keys(past).map((name) => [name, outputs[name.replace("past_key_values", "present")]]),
      );
      seq = 1;
      embeds = await this.embed([token]);
      deepstack = new Float32Array(layers * hidden);
      positions = [next, next, next];
      next++;
    }
  }

  /** Creates the key-value cache before the first token: [1, kv_heads, 0, head_dim] for each key and value. */
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
