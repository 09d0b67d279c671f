"""From a prompt and image files to text with plain onnxruntime sessions: the reference for other languages.

In: a folder with vision_encoder.onnx, embeddings.onnx, model.onnx, tokenizer.json, vision_processor.json and
pipeline.json; a text; image files. Out: token ids and text, as they come.
Guaranteed: pixel values, token ids and position ids are bit for bit transformers' own; decoding is greedy.
Stands alone: a copy lies in each bundle that it can run, `python pipeline.py --prompt TEXT --image FILE`.
Axis names: batch (always 1 here), seq, past, total, patches, images, tokens, hidden; D DeepStack layers.
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

MOST_PIXELS = 89_478_485  # of an image's file; Pillow's own figure: from there on it warns of decompression bombs
# Of settings: an image is made at least min_pixels large, and at least one square of patch_size * merge_size.
MOST_LEAST, MOST_SIZE = 2**26, 256
# Pillow opens more than these, some through other programs (EPS).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
# The decoder gives logits of every position; in chunks, a long prompt needs no [seq, vocab] array.
PREFILL = 512


class SettingsError(ValueError):
    """vision_processor.json or pipeline.json is not what this file can carry out."""


class ImageError(ValueError):
    """A file that is no image, or an image that the model cannot take."""


class TextError(ValueError):
    """A prompt that the model cannot take."""


# --- settings ---


@dataclass(frozen=True)
class ImageSettings:
    """What vision_processor.json says; `min_pixels` and `max_pixels` bound height * width after resizing.

    A pixel becomes (pixel / divisor - mean) / std.
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
    """What pipeline.json says. A user turn is prefix, `image` once an image, the text, suffix.

    `deepstack` is D; `max_length` counts the tokens of prompt and answer together.
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
    """vision_processor.json, in onnxruntime-extensions' format.

    Raises:
        SettingsError: it says anything that `preprocess` does not carry out.
    """
    try:
        operations = [transform["operation"] for transform in _read(path)["processor"]["transforms"]]
        found = [(operation["type"], operation.get("attrs", {})) for operation in operations]
        values = {key: value for _, step in found for key, value in step.items()}
        values["divisor"] = found[4][1]["std"][0]
        settings = _filled(ImageSettings, {key: values[key] for key in ImageSettings.__annotations__}, path)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise SettingsError(f"{path} is no full list of image transforms: {error!r}") from error
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
    for want, have in zip_longest(expected, found):
        if want != have:
            raise SettingsError(f"{path}: expected the step {want}, found {have}")
    if (
        len(settings.mean) != 3
        or len(settings.std) != 3
        or 0 in (*settings.std, settings.divisor)
        or not all(map(math.isfinite, (*settings.mean, *settings.std, settings.divisor)))
        or min(astuple(settings)[:5]) < 1
        or max(astuple(settings)[2:5]) > MOST_SIZE
        or settings.min_pixels > MOST_LEAST
    ):
        raise SettingsError(f"{path}: mean and std are no three numbers, or a size is out of bounds: {settings}")
    return settings


def read_settings(path: Path) -> Settings:
    """pipeline.json.

    Raises:
        SettingsError: a key missing, unknown or of another type.
    """
    document = _read(path)
    try:
        settings = _filled(Settings, {**document.pop("prompt"), **document}, path)
    except (KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"{path} does not say how a prompt is written: {error!r}") from error
    if not 1 <= settings.spatial_merge_size <= MOST_SIZE or settings.deepstack < 0 or settings.max_length < 1:
        raise SettingsError(f"{path}: a size is out of bounds: {settings}")
    if settings.image.count(settings.image_token) != 1 or not settings.image_token or not settings.video_token:
        raise SettingsError(f"{path}: an image is not written with one {settings.image_token!r}: {settings.image!r}")
    return settings


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error


def _filled(kind: type[T], values: Mapping[str, Any], path: Path) -> T:
    fields = kind.__annotations__
    if values.keys() != fields.keys():
        raise SettingsError(f"{path}: expected the keys {sorted(fields)}, found {sorted(values)}")
    fixed = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    for key, value in fixed.items():
        outer, _, inner = fields[key].removesuffix(", ...]").partition("[")
        items = value if outer == "tuple" and isinstance(value, tuple) else ()
        if type(value).__name__ != outer or any(type(item).__name__ != inner for item in items):
            raise SettingsError(f"{path}: {key} must be of type {fields[key]}, not {value!r}")
    return kind(**fixed)


# --- from a file to pixel values ---


def load_image(path: Path) -> Image.Image:
    """The image in `path`, upright, mode RGB: what transformers.image_utils.load_image makes of it.

    Raises:
        ImageError: no image, damaged, of no format in FORMATS, or of more than MOST_PIXELS (a small file can
            claim any number).
    """
    try:
        if not path.is_file():
            raise ImageError("No such file, or none that can be read as one")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(path)
        with opened as image:
            if image.format not in FORMATS:
                raise ImageError(f"it is {image.format}, not one of {', '.join(FORMATS)}")
            if image.width * image.height > MOST_PIXELS:
                raise ImageError(f"it has {image.width} x {image.height} pixels, more than {MOST_PIXELS}")
            ImageOps.exif_transpose(image, in_place=True)
            return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise anything at all on a damaged file
        raise ImageError(f"{path} cannot be read as an image: {error}") from error


def target_size(height: int, width: int, settings: ImageSettings) -> tuple[int, int]:
    """(height, width) that an image is resized to: Qwen2-VL's "smart resize".

    Each side becomes the nearest multiple of patch_size * merge_size (a half goes to the even one). If that
    is out of bounds, both sides are scaled by one factor to the bound, and rounded to its inner side.

    Raises:
        ImageError: one side is more than 200 times the other, which upstream refuses as well.
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
    """RGB images, one or more → pixel_values [patches, 3 * temporal * patch * patch], grids [images, 3].

    A grid is (time, height, width) in patches. A square of merge_size * merge_size patches is in one piece.
    """
    # A byte has 256 values: rescale and normalize are a table. Float32 throughout: upstream multiplies by 1/255
    # in float64 and rounds, which gives this quotient for every byte.
    levels = np.arange(256, dtype=np.float32) / np.float32(settings.divisor)
    mean, std = np.array(settings.mean, np.float32), np.array(settings.std, np.float32)
    table = (levels[:, None] - mean) / std  # [256, 3]
    patch, frames, merge = settings.patch_size, settings.temporal_patch_size, settings.merge_size
    rows, grids = [], []
    for image in images:
        height, width = target_size(image.height, image.width, settings)
        resized = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
        pixels = table[resized, np.arange(3)]  # [height, width, 3]
        down, across = height // patch, width // patch
        squares = pixels.reshape(down // merge, merge, patch, across // merge, merge, patch, 3)
        squares = squares.transpose(0, 3, 1, 4, 6, 2, 5)  # [down, across, merge, merge, 3, patch, patch]
        still = np.repeat(squares[:, :, :, :, :, None], frames, axis=5)  # an image is `frames` equal frames
        rows.append(still.reshape(down * across, 3 * frames * patch * patch))
        grids.append((1, down, across))
    return np.concatenate(rows), np.array(grids, np.int64)


# --- from a text to token ids and positions ---


@dataclass(frozen=True)
class Inputs:
    """One prompt, ready for the graphs. Behind it, a token's position is its index + rope_delta."""

    input_ids: Ints  # [1, seq]
    pixel_values: Floats | None  # [patches, 3 * temporal * patch * patch]
    image_grid_thw: Ints | None  # [images, 3]
    position_ids: Ints  # [3, 1, seq]
    rope_delta: int


def load_tokenizer(path: Path) -> Tokenizer:
    """tokenizer.json as a chat needs it: nothing is cut off or filled up."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode(text: str, grids: Ints, tokenizer: Tokenizer, settings: Settings) -> Ints:
    """Token ids [1, seq] of one user turn: images with these grids [images, 3], then the text.

    Raises:
        TextError: the text holds an image or a video token, or cannot be written as UTF-8.
    """
    for token in (settings.image_token, settings.video_token):
        if token in text:
            raise TextError(f"the text holds {token}, which stands for features of an image or a film")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(f"the text is not Unicode: {error}") from error
    counts = grids.prod(axis=1) // settings.spatial_merge_size**2
    images = [settings.image.replace(settings.image_token, settings.image_token * int(n)) for n in counts]
    turn = settings.prefix + "".join(images) + text + settings.suffix
    return np.array([tokenizer.encode(turn, add_special_tokens=False).ids], np.int64)


def position_ids(input_ids: Ints, grids: Ints, settings: Settings) -> tuple[Ints, int]:
    """Positions [3, 1, seq] (time, height, width) of input_ids [1, seq], and the rope delta.

    A text token moves all three on by one. Within an image each axis counts from where the image begins;
    the image as a whole moves them on by its longer side. Upstream: `Qwen3VLModel.get_rope_index`.
    """
    merged = grids // [1, settings.spatial_merge_size, settings.spatial_merge_size]  # [images, 3]
    ends = np.concatenate([[0], merged.prod(axis=1).cumsum()])  # [1 + images] image tokens up to each end
    moves = np.concatenate([[0], merged[:, 1:].max(axis=1).cumsum()])  # the same for positions
    is_image = input_ids[0] == settings.image_token_id  # [seq]
    if is_image.sum() != ends[-1]:
        raise TextError(f"{is_image.sum()} image tokens, but the images have {ends[-1]}")
    before = is_image.cumsum() - is_image  # [seq] image tokens before each token
    image = np.searchsorted(ends[1:], before, side="right")  # [seq] images that are over
    start = (~is_image).cumsum() - ~is_image + moves[image]
    _, height, width = np.vstack([merged, [1, 1, 1]])[image].T  # the last row is for text behind them all
    nth = before - ends[image]
    inside = np.stack([nth // (height * width), nth // width % height, nth % width])  # [3, seq]
    positions = start + np.where(is_image, inside, 0)
    return positions[:, None].astype(np.int64), int(positions.max()) + 1 - input_ids.shape[1]


def prepare(
    text: str, images: Sequence[Path], tokenizer: Tokenizer, settings: Settings, vision: ImageSettings
) -> Inputs:
    """Everything that the graphs take. Raises what `load_image`, `target_size` and `encode` raise."""
    no_grids = np.zeros((0, 3), np.int64)
    pixels, grids = preprocess([load_image(path) for path in images], vision) if images else (None, no_grids)
    input_ids = encode(text, grids, tokenizer, settings)
    return Inputs(input_ids, pixels, grids if images else None, *position_ids(input_ids, grids, settings))


def stream(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of the tokens as they come; the pieces together are `tokenizer.decode` of all of them.

    What ends inside a character is held back until the character is whole: it can be spread over tokens.
    """
    held: list[int] = []
    for token in tokens:
        held.append(token)
        piece = tokenizer.decode(held)
        if not piece.endswith("\ufffd"):
            yield piece
            held = []
    yield tokenizer.decode(held)


# --- from inputs to tokens ---


@dataclass(frozen=True)
class Pipeline:
    """The three sessions and what goes with them."""

    settings: Settings
    vision: ImageSettings
    tokenizer: Tokenizer
    vision_encoder: Any
    embeddings: Any
    model: Any

    @classmethod
    def load(cls, folder: Path, session: Callable[[Path], Any] | None = None) -> Pipeline:
        """Opens a bundle. Raises what `read_settings` and `read_image_settings` raise.

        Args:
            session: opens a graph, with `get_inputs` and `run` as an onnxruntime session has them; that itself if None.
        """
        settings = read_settings(folder / "pipeline.json")
        vision = read_image_settings(folder / "vision_processor.json")
        if settings.spatial_merge_size != vision.merge_size:
            raise SettingsError("pipeline.json and vision_processor.json differ in the merge size")
        graphs = [folder / f"{name}.onnx" for name in ("vision_encoder", "embeddings", "model")]
        sessions = [(session or _session)(graph) for graph in graphs]
        declared = {port.name: port.shape for port in sessions[2].get_inputs()}
        levels = declared.get("deepstack_embeds", [0])[0]
        if (levels, declared["inputs_embeds"][-1]) != (settings.deepstack, settings.hidden):
            raise SettingsError("pipeline.json and model.onnx differ in deepstack or hidden")
        return cls(settings, vision, load_tokenizer(folder / "tokenizer.json"), *sessions)

    def prepare(self, text: str, images: Sequence[Path] = ()) -> Inputs:
        """See the function of that name."""
        return prepare(text, images, self.tokenizer, self.settings, self.vision)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of generated tokens, without special tokens."""
        return "".join(stream(self.tokenizer, tokens))

    def generate(self, inputs: Inputs, max_new_tokens: int, min_new_tokens: int = 0) -> Iterator[int]:
        """Greedy tokens as they come, the stop token that ends them included.

        The first min_new_tokens are no stop tokens: their logits are -inf, as upstream's min_new_tokens does.

        Raises:
            TextError: prompt and answer could be longer than max_length.
        """
        seq, eos = inputs.input_ids.shape[1], list(self.settings.eos_token_ids)
        if seq + max_new_tokens > self.settings.max_length:
            raise TextError(f"{seq} + {max_new_tokens} tokens are more than {self.settings.max_length}")
        embeds, deepstack = self.embed(inputs)
        positions, past = inputs.position_ids, self.empty_past()
        for step in range(max_new_tokens):
            for start in range(0, embeds.shape[1], PREFILL):
                part = slice(start, start + PREFILL)
                pieces = (embeds[:, part], deepstack[:, :, part], positions[:, :, part])
                logits, past = self.decode(*pieces, past)
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
        """inputs_embeds [1, seq, hidden] and deepstack_embeds [D, 1, seq, hidden], which is zero at text."""
        (embeds,) = self.embeddings.run(["inputs_embeds"], {"input_ids": inputs.input_ids})
        deepstack = np.zeros((self.settings.deepstack, *embeds.shape[:2], self.settings.hidden), np.float32)
        if inputs.pixel_values is not None:
            feed = {"pixel_values": inputs.pixel_values, "image_grid_thw": inputs.image_grid_thw}
            pooled, *levels = self.vision_encoder.run(None, feed)  # [tokens, hidden], [D, tokens, hidden]
            is_image = inputs.input_ids == self.settings.image_token_id  # [1, seq]
            embeds[is_image] = pooled
            if levels:
                deepstack[:, is_image] = levels[0]
        return embeds, deepstack

    def decode(
        self, embeds: Floats, deepstack: Floats, positions: Ints, past: Mapping[str, Floats]
    ) -> tuple[Floats, dict[str, Floats]]:
        """The last position's logits [vocab]; the next past, [1, kv_heads, total, head_dim] each."""
        total = embeds.shape[1] + next(iter(past.values())).shape[2]
        feed = {"inputs_embeds": embeds, "position_ids": positions, **past}
        feed["attention_mask"] = np.ones((1, total), np.int64)
        if self.settings.deepstack:
            feed["deepstack_embeds"] = deepstack
        presents = [name.replace("past_key_values", "present") for name in past]
        logits, *values = self.model.run(["logits", *presents], feed)
        return logits[0, -1], dict(zip(past, values, strict=True))

    def empty_past(self) -> dict[str, Floats]:
        """past_key_values.N.key and .value, each [1, kv_heads, 0, head_dim]."""
        ports = [port for port in self.model.get_inputs() if port.name.startswith("past_key_values.")]
        return {port.name: np.zeros((1, port.shape[1], 0, port.shape[3]), np.float32) for port in ports}


def _session(graph: Path) -> Any:
    import onnxruntime  # the functions above are of use without it

    return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is asked."""
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--image", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")


def answer(parser: argparse.ArgumentParser, given: argparse.Namespace, load: Callable[[Path], Pipeline]) -> None:
    """Prints the answer of the bundle that this file lies in."""
    try:
        pipeline = load(Path(__file__).resolve().parent)
        tokens = pipeline.generate(pipeline.prepare(given.prompt, given.image), given.max_new_tokens)
        for piece in stream(pipeline.tokenizer, tokens):
            print(piece, end="", flush=True)
        print()
    except (SettingsError, ImageError, TextError) as error:
        parser.error(str(error))


def main() -> None:
    """The command line of the copy that lies in a bundle."""
    parser = argparse.ArgumentParser(description="Ask the model in this folder.")
    add_arguments(parser)
    answer(parser, parser.parse_args(), Pipeline.load)


if __name__ == "__main__":
    main()
