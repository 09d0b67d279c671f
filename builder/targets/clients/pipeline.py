"""Generate text from a prompt and image files with plain ONNX Runtime sessions: the reference for other languages.

Every `onnxruntime` bundle contains a copy, which needs nothing else from the builder:

    python pipeline.py --prompt TEXT --image FILE

Guarantees: pixel values, token ids and position ids are bit-identical to those of transformers; decoding is greedy.

Axis names: batch (always 1 here), seq, past, total (past + seq), patches, images, tokens (image tokens after merging),
hidden; D is the number of DeepStack layers.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tokenizers import Tokenizer

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
T = TypeVar("T")

MAX_PIXELS = 89_478_485  # per image file: the size from which Pillow warns of a decompression bomb
# Bounds on the settings: every image is resized to at least min_pixels and at least one square of
# patch_size * merge_size, so that large values would make any image expensive.
MAX_MIN_PIXELS, MAX_PATCH = 2**26, 256
# Pillow opens more formats than these, some of them by starting other programs (EPS).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
# Tokens per decoder call. The decoder returns logits for every position; chunks avoid a [seq, vocab] array.
PREFILL_CHUNK = 512


class SettingsError(ValueError):
    """vision_processor.json or pipeline.json is invalid, or requires a step that is not implemented here."""


class ImageError(ValueError):
    """A file is not an image, or the model cannot process the image."""


class TextError(ValueError):
    """The model cannot process the prompt."""


# --- settings ---


@dataclass(frozen=True)
class ImageSettings:
    """The contents of vision_processor.json.

    Args:
        min_pixels, max_pixels: bounds on height * width after resizing.
        patch_size: side of a square patch, in pixels.
        temporal_patch_size: frames per patch.
        merge_size: side, in patches, of the square of patches that becomes one image token.
        divisor, mean, std: a pixel is normalized to (pixel / divisor - mean) / std; mean and std are per channel (RGB).
    """

    min_pixels: int
    max_pixels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    divisor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Settings:
    """The contents of pipeline.json.

    A user turn is `prefix`, one `image` per image, the text, `suffix`.

    Args:
        image: text for an image; contains `image_token` once, which is repeated for each feature of the image.
        max_length: limit on the number of prompt and generated tokens together.
        deepstack: D.
        hidden: hidden size of the decoder.
    """

    prefix: str
    image: str
    suffix: str
    image_token: str
    image_token_id: int
    video_token: str
    spatial_merge_size: int
    eos_token_ids: tuple[int, ...]
    max_length: int
    deepstack: int
    hidden: int


def read_image_settings(path: Path) -> ImageSettings:
    """Read vision_processor.json, which is in the format of onnxruntime-extensions.

    Raises:
        SettingsError: the file is invalid, or its transforms are not exactly those that `preprocess` implements.
    """
    try:
        operations = [transform["operation"] for transform in _read(path)["processor"]["transforms"]]
        steps = [(operation["type"], operation.get("attrs", {})) for operation in operations]
        values = {key: value for _, attributes in steps for key, value in attributes.items()}
        values["divisor"] = steps[4][1]["std"][0]
        settings = _checked(ImageSettings, {key: values[key] for key in ImageSettings.__annotations__}, path)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise SettingsError(f"{path} is not a complete list of image transforms: {error!r}") from error
    sizes = {"patch_size": settings.patch_size, "merge_size": settings.merge_size}
    resize = {
        "interpolation": "CUBIC",
        "smart_resize": 1,
        **{key: values.get(key) for key in ("width", "height")},
    }
    expected: list[tuple[str, dict[str, Any]]] = [
        ("DecodeImage", {"color_space": "RGB"}),
        ("ConvertRGB", {}),
        ("Resize", resize | {"min_pixels": settings.min_pixels, "max_pixels": settings.max_pixels} | sizes),
        ("Rescale", {"rescale_factor": 1.0}),
        ("Normalize", {"mean": [0.0] * 3, "std": [settings.divisor] * 3}),
        ("Normalize", {"mean": [*settings.mean], "std": [*settings.std], "qwen3_vl": 1}),
        ("PatchImage", {"temporal_patch_size": settings.temporal_patch_size} | sizes),
    ]
    for expected_step, step in zip_longest(expected, steps):
        if step != expected_step:
            raise SettingsError(f"{path}: expected the step {expected_step}, found {step}")
    if (
        len(settings.mean) != 3
        or len(settings.std) != 3
        or 0 in (*settings.std, settings.divisor)
        or not all(map(math.isfinite, (*settings.mean, *settings.std, settings.divisor)))
        or min(astuple(settings)[:5]) < 1
        or max(astuple(settings)[2:5]) > MAX_PATCH
        or settings.min_pixels > MAX_MIN_PIXELS
    ):
        raise SettingsError(f"{path}: mean and std are not three valid numbers, or a size is out of bounds: {settings}")
    return settings


def read_settings(path: Path) -> Settings:
    """Read pipeline.json.

    Raises:
        SettingsError: a key is missing or unknown, or its value has the wrong type or is out of bounds.
    """
    document = _read(path)
    try:
        settings = _checked(Settings, {**document.pop("prompt"), **document}, path)
    except (KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"{path} does not define the prompt format: {error!r}") from error
    if not 1 <= settings.spatial_merge_size <= MAX_PATCH or settings.deepstack < 0 or settings.max_length < 1:
        raise SettingsError(f"{path}: a size is out of bounds: {settings}")
    if settings.image.count(settings.image_token) != 1 or not settings.image_token or not settings.video_token:
        raise SettingsError(f"{path}: `image` must contain {settings.image_token!r} once, found {settings.image!r}")
    return settings


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error


def _checked(kind: type[T], values: Mapping[str, Any], path: Path) -> T:
    fields = kind.__annotations__
    if values.keys() != fields.keys():
        raise SettingsError(f"{path}: expected the keys {sorted(fields)}, found {sorted(values)}")
    frozen = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    for key, value in frozen.items():
        outer, _, inner = fields[key].removesuffix(", ...]").partition("[")
        items = value if outer == "tuple" and isinstance(value, tuple) else ()
        if type(value).__name__ != outer or any(type(item).__name__ != inner for item in items):
            raise SettingsError(f"{path}: {key} must be of type {fields[key]}, not {value!r}")
    return kind(**frozen)


# --- image files to pixel values ---


def load_image(path: Path) -> Image.Image:
    """Read an image, apply its EXIF orientation and convert it to RGB, as transformers.image_utils.load_image does.

    Raises:
        ImageError: the file is not an image, is damaged, is not in one of FORMATS, or has more than MAX_PIXELS (which
            even a small file can declare).
    """
    try:
        if not path.is_file():
            raise ImageError("No such file, or it is not a regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(path)
        with opened as image:
            if image.format not in FORMATS:
                raise ImageError(f"it is {image.format}, not one of {', '.join(FORMATS)}")
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            ImageOps.exif_transpose(image, in_place=True)
            return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # on damaged files, Pillow's decoders raise exceptions of any type
        raise ImageError(f"{path} cannot be read as an image: {error}") from error


def target_size(height: int, width: int, settings: ImageSettings) -> tuple[int, int]:
    """Compute the (height, width) to which an image is resized: `smart_resize` of Qwen2-VL in transformers.

    Each side is rounded to the nearest multiple of patch_size * merge_size (halves to even). If the area is then out of
    bounds, the original sides are scaled by one factor, and rounded down to max_pixels or up to min_pixels.

    Raises:
        ImageError: one side is more than 200 times the other; upstream raises here too.
    """
    unit = settings.patch_size * settings.merge_size
    if max(height, width) > 200 * min(height, width):
        raise ImageError(f"{width} x {height} pixels: one side is more than 200 times the other")
    rows, columns = round(height / unit), round(width / unit)
    if rows * columns * unit**2 > settings.max_pixels:
        shrink = math.sqrt(height * width / settings.max_pixels)
        rows, columns = (max(1, math.floor(side / shrink / unit)) for side in (height, width))
    elif rows * columns * unit**2 < settings.min_pixels:
        grow = math.sqrt(settings.min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / unit) for side in (height, width))
    return rows * unit, columns * unit


def preprocess(images: Sequence[Image.Image], settings: ImageSettings) -> tuple[Floats, Ints]:
    """Resize, normalize and split images into patches.

    Args:
        images: one or more, in mode RGB.

    Returns:
        pixel_values [patches, 3 * temporal * patch * patch], float32, in which the merge_size * merge_size patches of
        one image token are consecutive; and grids [images, 3], int64: (time, height, width) in patches.
    """
    # A byte has 256 values, so rescaling and normalization are one table. Upstream multiplies by 1/255 in float64 and
    # rounds to float32, which equals this float32 quotient for every byte.
    rescaled = np.arange(256, dtype=np.float32) / np.float32(settings.divisor)
    mean, std = np.array(settings.mean, np.float32), np.array(settings.std, np.float32)
    table = (rescaled[:, None] - mean) / std  # [256, 3]
    patch, frames, merge = settings.patch_size, settings.temporal_patch_size, settings.merge_size
    rows, grids = [], []
    for image in images:
        height, width = target_size(image.height, image.width, settings)
        resized = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
        pixels = table[resized, np.arange(3)]  # [height, width, 3]
        grid_h, grid_w = height // patch, width // patch
        patches = pixels.reshape(grid_h // merge, merge, patch, grid_w // merge, merge, patch, 3)
        # → [grid_h / merge, grid_w / merge, merge, merge, 3, patch, patch]
        patches = patches.transpose(0, 3, 1, 4, 6, 2, 5)
        video = np.repeat(patches[:, :, :, :, :, None], frames, axis=5)  # an image is `frames` identical frames
        rows.append(video.reshape(grid_h * grid_w, 3 * frames * patch * patch))
        grids.append((1, grid_h, grid_w))
    return np.concatenate(rows), np.array(grids, np.int64)


# --- text to token ids and positions ---


@dataclass(frozen=True)
class Inputs:
    """The graphs' inputs for one prompt. A generated token's position is its index + rope_delta."""

    input_ids: Ints  # [1, seq]
    pixel_values: Floats | None  # [patches, 3 * temporal * patch * patch]
    image_grid_thw: Ints | None  # [images, 3]
    position_ids: Ints  # [3, 1, seq]
    rope_delta: int


def load_tokenizer(path: Path) -> Tokenizer:
    """Load tokenizer.json with truncation and padding disabled."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode(text: str, grids: Ints, tokenizer: Tokenizer, settings: Settings) -> Ints:
    """Tokenize one user turn: images with these grids [images, 3], then the text.

    Returns:
        Token ids [1, seq], with one image token for each image feature.

    Raises:
        TextError: the text contains an image or video token, or cannot be encoded as UTF-8.
    """
    for token in (settings.image_token, settings.video_token):
        if token in text:
            raise TextError(f"the text contains {token}, which is a placeholder for features of an image or a video")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(f"the text is not Unicode: {error}") from error
    counts = grids.prod(axis=1) // settings.spatial_merge_size**2
    images = [settings.image.replace(settings.image_token, settings.image_token * int(n)) for n in counts]
    turn = settings.prefix + "".join(images) + text + settings.suffix
    return np.array([tokenizer.encode(turn, add_special_tokens=False).ids], np.int64)


def position_ids(input_ids: Ints, grids: Ints, settings: Settings) -> tuple[Ints, int]:
    """Compute the three-dimensional positions of a prompt: `Qwen3VLModel.get_rope_index` in transformers.

    A text token advances all three axes by one. Within an image, each axis counts from the image's start position; the
    complete image then advances all three by its longer side in tokens.

    Returns:
        Positions [3, 1, seq] (time, height, width) of input_ids [1, seq], and the rope delta.

    Raises:
        TextError: the number of image tokens does not match the grids [images, 3].
    """
    merged = grids // [1, settings.spatial_merge_size, settings.spatial_merge_size]  # [images, 3] in tokens
    # Both [1 + images], with the total last: image tokens before each image, and the positions that those advance by.
    tokens_before = np.concatenate([[0], merged.prod(axis=1).cumsum()])
    advance_before = np.concatenate([[0], merged[:, 1:].max(axis=1).cumsum()])
    is_image = input_ids[0] == settings.image_token_id  # [seq]
    if is_image.sum() != tokens_before[-1]:
        raise TextError(f"{is_image.sum()} image tokens, but the images have {tokens_before[-1]}")
    before = is_image.cumsum() - is_image  # [seq] image tokens before each token
    image = np.searchsorted(tokens_before[1:], before, side="right")  # [seq] complete images before each token
    start = (~is_image).cumsum() - ~is_image + advance_before[image]  # [seq] of a text token, or of the token's image
    _, height, width = np.vstack([merged, [1, 1, 1]])[image].T  # [seq]; the last row is for text after all images
    index = before - tokens_before[image]  # [seq] index of an image token within its image
    offsets = np.stack([index // (height * width), index // width % height, index % width])  # [3, seq]
    positions = start + np.where(is_image, offsets, 0)
    return positions[:, None].astype(np.int64), int(positions.max()) + 1 - input_ids.shape[1]


def prepare(
    text: str, images: Sequence[Path], tokenizer: Tokenizer, settings: Settings, vision: ImageSettings
) -> Inputs:
    """Prepare the graphs' inputs for one user turn.

    Raises:
        ImageError: see `load_image` and `target_size`.
        TextError: see `encode`.
    """
    no_grids = np.zeros((0, 3), np.int64)
    pixels, grids = preprocess([load_image(path) for path in images], vision) if images else (None, no_grids)
    input_ids = encode(text, grids, tokenizer, settings)
    return Inputs(input_ids, pixels, grids if images else None, *position_ids(input_ids, grids, settings))


def stream(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Decode tokens as they arrive; the pieces together equal `tokenizer.decode` of all tokens.

    A character can span several tokens: they are buffered until it is complete.
    """
    buffer: list[int] = []
    for token in tokens:
        buffer.append(token)
        piece = tokenizer.decode(buffer)
        if not piece.endswith("\ufffd"):
            yield piece
            buffer = []
    yield tokenizer.decode(buffer)


# --- inputs to tokens ---


@dataclass(frozen=True)
class Pipeline:
    """The sessions of the three graphs, the settings and the tokenizer.

    Example:
        >>> pipeline = Pipeline.load(Path("bundle/onnxruntime"))
        >>> inputs = pipeline.prepare("What is this?", [Path("image.png")])
        >>> pipeline.text(list(pipeline.generate(inputs, max_new_tokens=64)))
    """

    settings: Settings
    vision: ImageSettings
    tokenizer: Tokenizer
    vision_encoder: Any
    embeddings: Any
    model: Any

    @classmethod
    def load(cls, folder: Path, session: Callable[[Path], Any] | None = None) -> Pipeline:
        """Open a bundle.

        Args:
            session: opens a graph and returns an object with the `get_inputs` and `run` of
                `onnxruntime.InferenceSession`, which is the default (on the CPU).

        Raises:
            SettingsError: a settings file is invalid, or contradicts another one or the graphs.
        """
        settings = read_settings(folder / "pipeline.json")
        vision = read_image_settings(folder / "vision_processor.json")
        if settings.spatial_merge_size != vision.merge_size:
            raise SettingsError("pipeline.json and vision_processor.json disagree on the merge size")
        graphs = [folder / f"{name}.onnx" for name in ("vision_encoder", "embeddings", "model")]
        sessions = [(session or _session)(graph) for graph in graphs]
        declared = {port.name: port.shape for port in sessions[2].get_inputs()}
        deepstack = declared.get("deepstack_embeds", [0])[0]
        if (deepstack, declared["inputs_embeds"][-1]) != (settings.deepstack, settings.hidden):
            raise SettingsError("pipeline.json and model.onnx disagree on deepstack or hidden")
        return cls(settings, vision, load_tokenizer(folder / "tokenizer.json"), *sessions)

    def prepare(self, text: str, images: Sequence[Path] = ()) -> Inputs:
        """Prepare the inputs for one user turn; see the function `prepare`."""
        return prepare(text, images, self.tokenizer, self.settings, self.vision)

    def text(self, tokens: Sequence[int]) -> str:
        """Decode generated tokens, without special tokens."""
        return "".join(stream(self.tokenizer, tokens))

    def generate(self, inputs: Inputs, max_new_tokens: int, min_new_tokens: int = 0) -> Iterator[int]:
        """Generate tokens greedily, up to and including the first stop token.

        Args:
            min_new_tokens: the first min_new_tokens are never stop tokens, whose logits are set to -inf there, as
                with the option of this name in transformers.

        Raises:
            TextError: prompt and answer could exceed max_length.
        """
        seq, eos = inputs.input_ids.shape[1], list(self.settings.eos_token_ids)
        if seq + max_new_tokens > self.settings.max_length:
            raise TextError(f"{seq} + {max_new_tokens} tokens are more than {self.settings.max_length}")
        embeds, deepstack = self.embed(inputs)
        positions, past = inputs.position_ids, self.empty_past()
        for step in range(max_new_tokens):
            for start in range(0, embeds.shape[1], PREFILL_CHUNK):
                chunk = slice(start, start + PREFILL_CHUNK)
                logits, past = self.decode(embeds[:, chunk], deepstack[:, :, chunk], positions[:, :, chunk], past)
            if step < min_new_tokens:
                logits[eos] = -np.inf
            token = int(logits.argmax())
            yield token
            if token in eos:
                return
            (embeds,) = self.embeddings.run(["inputs_embeds"], {"input_ids": np.array([[token]], np.int64)})
            deepstack = np.zeros_like(deepstack[:, :, :1])
            positions = np.full((3, 1, 1), seq + step + inputs.rope_delta, np.int64)

    def embed(self, inputs: Inputs) -> tuple[Floats, Floats]:
        """Compute the embeddings of a prompt, with image features in place of image tokens.

        Returns:
            inputs_embeds [1, seq, hidden], and deepstack_embeds [D, 1, seq, hidden], which are zero at text tokens.
        """
        (embeds,) = self.embeddings.run(["inputs_embeds"], {"input_ids": inputs.input_ids})
        deepstack = np.zeros((self.settings.deepstack, *embeds.shape[:2], self.settings.hidden), np.float32)
        if inputs.pixel_values is not None:
            feed = {"pixel_values": inputs.pixel_values, "image_grid_thw": inputs.image_grid_thw}
            pooled, *features = self.vision_encoder.run(None, feed)  # [tokens, hidden]; [D, tokens, hidden] if D > 0
            is_image = inputs.input_ids == self.settings.image_token_id  # [1, seq]
            embeds[is_image] = pooled
            if features:
                deepstack[:, is_image] = features[0]
        return embeds, deepstack

    def decode(
        self, embeds: Floats, deepstack: Floats, positions: Ints, past: Mapping[str, Floats]
    ) -> tuple[Floats, dict[str, Floats]]:
        """Run the decoder once.

        Returns:
            The last position's logits [vocab], and the next `past`: arrays [1, kv_heads, total, head_dim].
        """
        total = embeds.shape[1] + next(iter(past.values())).shape[2]
        feed = {"inputs_embeds": embeds, "position_ids": positions, **past}
        feed["attention_mask"] = np.ones((1, total), np.int64)
        if self.settings.deepstack:
            feed["deepstack_embeds"] = deepstack
        presents = [name.replace("past_key_values", "present") for name in past]
        logits, *values = self.model.run(["logits", *presents], feed)
        return logits[0, -1], dict(zip(past, values, strict=True))

    def empty_past(self) -> dict[str, Floats]:
        """Create the key-value cache before the first token: [1, kv_heads, 0, head_dim] for each key and value."""
        ports = [port for port in self.model.get_inputs() if port.name.startswith("past_key_values.")]
        return {port.name: np.zeros((1, port.shape[1], 0, port.shape[3]), np.float32) for port in ports}


def _session(graph: Path) -> Any:
    import onnxruntime  # only here: the functions above work without it

    return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the prompt, the images and the number of tokens to a command line."""
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--image", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")


def answer(parser: argparse.ArgumentParser, arguments: argparse.Namespace, load: Callable[[Path], Pipeline]) -> None:
    """Print the answer of the bundle that contains this file."""
    try:
        pipeline = load(Path(__file__).resolve().parent)
        inputs = pipeline.prepare(arguments.prompt, arguments.image)
        tokens = pipeline.generate(inputs, arguments.max_new_tokens)
        for piece in stream(pipeline.tokenizer, tokens):
            print(piece, end="", flush=True)
        print()
    except (SettingsError, ImageError, TextError) as error:
        parser.error(str(error))


def main() -> None:
    """Run the command line of the copy in a bundle."""
    parser = argparse.ArgumentParser(description="Ask the model in this folder.")
    add_arguments(parser)
    answer(parser, parser.parse_args(), Pipeline.load)


if __name__ == "__main__":
    main()
