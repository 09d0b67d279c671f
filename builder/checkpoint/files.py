"""Choose the files of a checkpoint that a build needs, and refuse unsafe checkpoints before weights are fetched."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NoReturn

from builder.checkpoint.safetensors import INDEX
from builder.util.errors import CheckpointError, UnsafeError, UnsupportedError

CONFIG, TOKENIZER, TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"
# transformers 5 nests the image settings in the second file, which takes precedence.
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
GENERATION = "generation_config.json"
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")
OPTIONAL = (
    GENERATION, PREPROCESSOR, PROCESSOR, TOKENIZER_CONFIG, *CHAT_TEMPLATES, INDEX,
    "video_preprocessor_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
# Files about the license, which the model card names in its metadata. Compared without regard to case.
CARD = "readme.md"
LICENSES = ("license", "license.txt", "license.md", "licence", "licence.txt", "licence.md", "use_policy.md")
NOTICES = ("notice", "notice.txt", "notice.md", *LICENSES)
MAY_NAME_CODE = (CONFIG, PREPROCESSOR, PROCESSOR, TOKENIZER_CONFIG, "video_preprocessor_config.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def refuse_names(names: Collection[str], where: str) -> None:
    """Refuse a folder or hub repository by its file names alone.

    Raises:
        CheckpointError: a file that every checkpoint has is missing.
        UnsupportedError: an adapter.
        UnsafeError: pickle weights only.
    """
    adapter = sorted(name for name in names if name.startswith(("adapter_config.", "adapter_model.")))
    if adapter:
        raise UnsupportedError(
            f"{where} holds an unmerged adapter",
            expected="a complete checkpoint",
            found=", ".join(adapter),
            next="merge it first: PeftModel.from_pretrained(…).merge_and_unload().save_pretrained(FOLDER)",
        )
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles and not any(name.endswith(".safetensors") or name == INDEX for name in names):
        raise UnsafeError(
            f"{where} holds only pickle weights, which can run code when they are read",
            expected="safetensors files",
            found=", ".join(pickles),
            next="if you trust the model, load it and save it again with save_pretrained()",
        )
    for file in (CONFIG, TOKENIZER):
        if file not in names:
            _missing(file, where)
    if PREPROCESSOR not in names and PROCESSOR not in names:
        _missing(PREPROCESSOR, where)


def refuse_remote_code(content: Mapping[str, Any], file: str) -> None:
    """Refuse a config that requires Python files of the checkpoint to be run.

    Raises:
        UnsafeError: `auto_map` is set.
    """
    for part in (content, *(value for value in content.values() if isinstance(value, dict))):
        if part.get("auto_map"):
            raise UnsafeError(
                f"{file} requires that code from the checkpoint be run (auto_map)",
                expected="a model that is part of transformers",
                found=part["auto_map"],
                next="remove auto_map if the model is a stock Qwen3-VL",
            )


def needed_files(names: Collection[str], shards: Iterable[str]) -> tuple[str, ...]:
    """Return the files that a build reads of a checkpoint with the files `names` and the weights `shards`, sorted."""
    return tuple(sorted({CONFIG, TOKENIZER, *shards, *(name for name in OPTIONAL if name in names)}))


def notice_files(names: Iterable[str]) -> tuple[str, ...]:
    """Return the files among `names` that state the terms of use, the model card included, sorted."""
    return tuple(sorted(name for name in names if name.casefold() in (CARD, *NOTICES)))


def _missing(file: str, where: str) -> NoReturn:
    raise CheckpointError(
        f"{file} is missing from {where}",
        expected=f"a checkpoint folder with {file}",
        found="no such file",
        next="name the folder that save_pretrained() wrote, or copy the file from the original checkpoint",
    )
