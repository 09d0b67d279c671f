"""In: the file names of a checkpoint, in a folder or in a hub repository. Out: those that a build needs.

Guaranteed: a checkpoint of pickles, an adapter, and a demand for remote code are refused before a weight is
fetched.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NoReturn

from builder.checkpoint.safetensors import INDEX
from builder.util.errors import CheckpointError, UnsafeError, UnsupportedError

CONFIG, TOKENIZER, TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"
# transformers 5 nests the image settings in the second file, where they win.
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
GENERATION = "generation_config.json"
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")
OPTIONAL = (
    GENERATION, PREPROCESSOR, PROCESSOR, TOKENIZER_CONFIG, *CHAT_TEMPLATES, INDEX,
    "video_preprocessor_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
# What a checkpoint says of its license; the card tells it in its metadata. In any case of letters.
CARD = "readme.md"
LICENSES = ("license", "license.txt", "license.md", "licence", "licence.txt", "licence.md", "use_policy.md")
NOTICES = ("notice", "notice.txt", "notice.md", *LICENSES)
MAY_NAME_CODE = (CONFIG, PREPROCESSOR, PROCESSOR, TOKENIZER_CONFIG, "video_preprocessor_config.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def refuse_names(names: Collection[str], where: str) -> None:
    """What the file names alone (of a folder, or of a hub repository) say against exporting.

    Raises:
        CheckpointError: a file missing that every checkpoint has.
        UnsupportedError: an adapter.
        UnsafeError: pickle weights only.
    """
    adapter = sorted(name for name in names if name.startswith(("adapter_config.", "adapter_model.")))
    if adapter:
        raise UnsupportedError(
            f"{where} holds an unmerged adapter",
            expected="a whole checkpoint",
            found=", ".join(adapter),
            next="merge it first: PeftModel.from_pretrained(…).merge_and_unload().save_pretrained(FOLDER)",
        )
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles and not any(name.endswith(".safetensors") or name == INDEX for name in names):
        raise UnsafeError(
            f"{where} holds pickle weights only, which can run code when they are read",
            expected="safetensors files",
            found=", ".join(pickles),
            next="save the model again with save_pretrained(), where you trust it",
        )
    for file in (CONFIG, TOKENIZER):
        if file not in names:
            _missing(file, where)
    if PREPROCESSOR not in names and PROCESSOR not in names:
        _missing(PREPROCESSOR, where)


def refuse_remote_code(content: Mapping[str, Any], file: str) -> None:
    """Raises:
    UnsafeError: a config that wants Python files of the checkpoint to be run.
    """
    for part in (content, *(value for value in content.values() if isinstance(value, dict))):
        if part.get("auto_map"):
            raise UnsafeError(
                f"{file} demands that code from the checkpoint be run (auto_map)",
                expected="a model that transformers has itself",
                found=part["auto_map"],
                next="remove auto_map if the model is a stock Qwen3-VL",
            )


def needed_files(names: Collection[str], shards: Iterable[str]) -> tuple[str, ...]:
    """What a build reads of a checkpoint that holds `names` and whose weights are in `shards`; sorted."""
    return tuple(sorted({CONFIG, TOKENIZER, *shards, *(name for name in OPTIONAL if name in names)}))


def notice_files(names: Iterable[str]) -> tuple[str, ...]:
    """The files among `names` that say under which terms a checkpoint may be used; its card is one; sorted."""
    return tuple(sorted(name for name in names if name.casefold() in (CARD, *NOTICES)))


def _missing(file: str, where: str) -> NoReturn:
    raise CheckpointError(
        f"{file} is missing from {where}",
        expected=f"a checkpoint folder with {file}",
        found="no such file",
        next="name the folder that save_pretrained() wrote, or copy the file from the original checkpoint",
    )
