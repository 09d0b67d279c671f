"""Open a Qwen3-VL checkpoint and check it, without reading its weights.

Guarantees: a checkpoint from `open_checkpoint` is complete (exactly the weights of the architecture, each of the right
shape), safe (no pickles, no remote code, no path outside the folder) and of a kind that can be exported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from builder.checkpoint.config import Text, Vision, read_architecture, token_id
from builder.checkpoint.files import (
    CHAT_TEMPLATES,
    CONFIG,
    GENERATION,
    MAY_NAME_CODE,
    PREPROCESSOR,
    PROCESSOR,
    TOKENIZER,
    TOKENIZER_CONFIG,
    needed_files,
    refuse_names,
    refuse_remote_code,
)
from builder.checkpoint.generation_config import check_generation
from builder.checkpoint.image_settings import read_preprocessor
from builder.checkpoint.safetensors import NUMPY_TYPES, Tensor, index_tensors, map_bytes, weight_files
from builder.checkpoint.tensors import check_tensors, expected_tensors, nearest
from builder.util.errors import CheckpointError, WeightError
from builder.util.json_files import read_json, read_text

__all__ = ["Checkpoint", "Tensor", "Text", "Vision", "expected_tensors", "open_checkpoint"]

# Keys that do not affect the architecture.
NOT_ARCHITECTURE = ("dtype", "torch_dtype", "transformers_version", "_name_or_path")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose weights are still on disk.

    Args:
        folder: with the checkpoint's files.
        name: short, for output folders.
        revision: the hub's commit; None for a local folder.
        config: content of `config.json`.
        tensors: by name, exactly those of `expected_tensors`.
        generation: content of `generation_config.json`, empty if there is none.
        preprocessor: the image settings, see `builder.checkpoint.image_settings`.
        files: every file that a build needs, relative to `folder`, sorted.
        states: each of `files` → size in bytes and modification time in ns, taken before the file was read.
    """

    folder: Path
    name: str
    revision: str | None
    config: Mapping[str, Any]
    text: Text
    vision: Vision
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    tensors: Mapping[str, Tensor]
    generation: Mapping[str, Any]
    preprocessor: Mapping[str, Any]
    files: tuple[str, ...]
    states: Mapping[str, tuple[int, int]]

    def read(self, name: str) -> npt.NDArray[Any]:
        """Map one weight into memory, read-only, in its stored dtype (`ml_dtypes.bfloat16` for BF16).

        Raises:
            WeightError: the checkpoint has no such weight.
        """
        if name not in self.tensors:
            raise WeightError(f"the checkpoint has no weight {name}", expected=nearest(name, self.tensors))
        tensor = self.tensors[name]
        values: npt.NDArray[Any] = map_bytes(self.folder, tensor).view(NUMPY_TYPES[tensor.dtype])
        return values.reshape(tensor.shape)

    @property
    def chat_template(self) -> str:
        """The Jinja source of the chat template, from the first place where transformers finds one.

        Raises:
            CheckpointError: the checkpoint has no readable chat template.
        """
        for file in (*CHAT_TEMPLATES, TOKENIZER_CONFIG):
            if file not in self.files:
                continue
            if file.endswith(".jinja"):
                return read_text(self.folder / file)
            template = read_json(self.folder / file).get("chat_template")
            if isinstance(template, str):
                return template
        raise CheckpointError(
            f"{self.folder} has no chat template",
            expected=", or ".join((*CHAT_TEMPLATES, f'"chat_template" in {TOKENIZER_CONFIG}')),
            next="copy chat_template.jinja from the checkpoint that this one was made from",
        )

    @property
    def config_digest(self) -> str:
        """SHA-256 (hex) of the architecture in `config.json`, which does not include the dtype."""
        canonical = json.dumps(_architecture(self.config), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def open_checkpoint(folder: Path, *, name: str | None = None, revision: str | None = None) -> Checkpoint:
    """Open the checkpoint in `folder`; the only weight that may be read is an `lm_head` that should be tied.

    Args:
        folder: with `config.json` and the other files.
        name: of the checkpoint; the folder's name if None.
        revision: the commit, for a download from the hub.

    Raises:
        CheckpointError: not a checkpoint; a file is missing, truncated or malformed; a dtype or shape is wrong.
        UnsupportedError: an adapter, or a kind that cannot be exported (see `builder.checkpoint.config`).
        UnsafeError: pickle weights, remote code, or a file outside the folder.
        WeightError: a weight is missing or unexpected.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder", expected="a folder with config.json and safetensors files")
    names = frozenset(path.name for path in folder.iterdir())
    refuse_names(names, str(folder))
    states = file_states(folder, names)
    config = read_json(folder / CONFIG)
    for file in MAY_NAME_CODE:
        if file in names:
            refuse_remote_code(read_json(folder / file), file)
    text, vision = read_architecture(config)
    shards = weight_files(folder, names)
    preprocessor = read_preprocessor(*_image_settings(folder, names), vision)
    _check_tokenizer(folder, text)
    states |= file_states(folder, shards)
    files = needed_files(names, shards)
    tensors = index_tensors(folder, shards)
    return Checkpoint(
        folder=folder,
        name=name or folder.resolve().name,
        revision=revision,
        config=config,
        text=text,
        vision=vision,
        image_token_id=token_id(config, "image_token_id", 151655, text.vocab),
        video_token_id=token_id(config, "video_token_id", 151656, text.vocab),
        vision_start_token_id=token_id(config, "vision_start_token_id", 151652, text.vocab),
        vision_end_token_id=token_id(config, "vision_end_token_id", 151653, text.vocab),
        tensors=check_tensors(folder, tensors, config, expected_tensors(config, text, vision)),
        generation=_generation(folder, names, config, text),
        preprocessor=preprocessor,
        files=files,
        states={file: states[file] for file in files if file in states},
    )


def file_states(folder: Path, files: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return the size in bytes and modification time in ns of those of `files` that are files."""
    stats = {file: (folder / file).stat() for file in files if (folder / file).is_file()}
    return {file: (stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()}


def _image_settings(folder: Path, names: Collection[str]) -> tuple[Mapping[str, Any], str]:
    """Return the image settings and the name of their file."""
    if PROCESSOR in names:
        nested = read_json(folder / PROCESSOR).get("image_processor")
        if isinstance(nested, dict):
            return nested, PROCESSOR
    return read_json(folder / PREPROCESSOR), PREPROCESSOR


def _generation(folder: Path, names: Collection[str], config: Mapping[str, Any], text: Text) -> Mapping[str, Any]:
    check_generation(config["text_config"], f"{CONFIG}, text_config", text.vocab)
    return check_generation(read_json(folder / GENERATION), GENERATION, text.vocab) if GENERATION in names else {}


def _check_tokenizer(folder: Path, text: Text) -> None:
    """Refuse tokens that have no row in the embedding matrix."""
    tokenizer = read_json(folder / TOKENIZER)
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    try:
        added = [(token["id"], token["content"]) for token in tokenizer.get("added_tokens") or []]
        ids = [*(vocab or {}).values(), *(number for number, _ in added)]
        largest = max(ids)
        if not all(type(token) is int and token >= 0 for token in ids) or not all(
            type(word) is str for _, word in added
        ):
            raise ValueError("an id is not a number, or a token is not a string")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / TOKENIZER} is not a tokenizer", expected='"vocab" in "model", and "added_tokens"'
        ) from error
    if largest >= text.vocab:
        raise CheckpointError(
            f"{TOKENIZER} has more tokens than the model has embeddings",
            expected=f"ids below vocab_size = {text.vocab}",
            found=largest,
            next="call model.resize_token_embeddings(len(tokenizer)) and save the checkpoint again",
        )


def _architecture(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _architecture(item) for key, item in value.items() if key not in NOT_ARCHITECTURE}
    return [_architecture(item) for item in value] if isinstance(value, list) else value
