"""Each way in which a folder is not a checkpoint that can be exported, and its error."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builder.checkpoint.load import open_checkpoint
from builder.util.errors import BuildError, CheckpointError, UnsafeError, UnsupportedError, WeightError
from builder.util.json_files import MAX_BYTES
from tests.helpers.edits import (
    Change,
    both,
    config,
    edit_header,
    edit_json,
    edit_tensors,
    last_offsets,
    remove,
    retype,
    tie_head,
    truncate,
    write,
)

NORM = "model.language_model.norm.weight"
Q_PROJ = "model.language_model.layers.0.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"
FIRST, LAST = "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"


def refused(folder: Path, error: type[BuildError], message: str) -> BuildError:
    with pytest.raises(error) as caught:
        open_checkpoint(folder)
    assert type(caught.value) is error
    assert message in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "is not a folder"),
        (remove("config.json"), "config.json is missing"),
        (write("config.json", b"{"), "config.json is not JSON"),
        (write("config.json", b"\xff\xfe{}"), "config.json is not JSON"),
        (write("config.json", b"[" * 100_000), "config.json is not JSON"),
        (write("config.json", b"[]"), "not a JSON object"),
        (both(write("config.json"), lambda f: os.truncate(f / "config.json", MAX_BYTES + 1)), "too large"),
        (write("generation_config.json", b"no"), "generation_config.json is not JSON"),
        (remove("tokenizer.json"), "tokenizer.json is missing"),
        (write("tokenizer.json"), "tokenizer.json is not a tokenizer"),
        (remove("preprocessor_config.json"), "preprocessor_config.json is missing"),
        (remove("*.safetensors*"), "no weights"),
        (remove(INDEX), "no weights"),
        (write("model.safetensors"), "two sets of weights"),
        (remove(FIRST), f"{FIRST} is missing"),
        (write(INDEX), 'no "weight_map"'),
    ],
)
def test_folders_without_a_complete_checkpoint(sharded: Path, change: Change, message: str) -> None:
    change(sharded)
    assert refused(sharded, CheckpointError, message).exit_code == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (config(model_type="qwen2_vl"), "qwen2_vl"),
        (config(model_type="qwen3_vl_moe"), "mixture-of-experts"),
        (config(text__num_experts=8), "mixture-of-experts"),
        (config(architectures=["Qwen3VLForSequenceClassification"]), "another head"),
        (config(architectures=1), "another head"),
        (config(quantization_config={"quant_method": "fp8"}), "fp8"),
        (config(text__quantization_config={"quant_method": "awq"}), "awq"),
        (config(rope__rope_type="dynamic"), "dynamic"),
        (config(rope__rope_type="longrope"), "longrope"),
        (config(text__rope_scaling={"type": "su"}), "su"),
        (config(rope__full_attention={"rope_type": "default"}), "by layer type"),
        (config(rope__partial_rotary_factor=0.5), "partial"),
        (config(vision__rope_parameters={"rope_type": "yarn"}), "vision rope type"),
        (write("adapter_config.json"), "merge_and_unload"),
        (both(remove("config.json"), write("adapter_model.safetensors")), "merge_and_unload"),
        (edit_header(FIRST, retype("F8_E4M3")), "F8_E4M3"),
        (edit_header(FIRST, retype("I8")), "quantized"),
        (edit_json("preprocessor_config.json", lambda c: c.update(do_normalize=False)), "do_normalize"),
        (edit_json("preprocessor_config.json", lambda c: c.update(image_processor_type="X")), "X cannot"),
    ],
)
def test_kinds_that_cannot_be_exported(sharded: Path, change: Change, message: str) -> None:
    change(sharded)
    assert refused(sharded, UnsupportedError, message).exit_code == 11


def index_names(file: str) -> Change:
    return edit_json(INDEX, lambda content: content["weight_map"].update({NORM: file}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (both(remove("*.safetensors*"), write("pytorch_model-00001-of-00002.bin")), "pickle"),
        (both(remove("*.safetensors*"), write("weights.pt")), "weights.pt"),
        (config(auto_map={"AutoModel": "mine.Model"}), "mine.Model"),
        (config(text__auto_map={"AutoModel": "mine.Model"}), "auto_map"),
        (
            edit_json("tokenizer_config.json", lambda c: c.update(auto_map={"a": "b"})),
            "tokenizer_config.json",
        ),
        (
            edit_json("preprocessor_config.json", lambda c: c.update(auto_map={"a": "b"})),
            "preprocessor_config",
        ),
        (index_names("../outside.safetensors"), "outside"),
        (index_names("deep/../../outside.safetensors"), "outside"),
        (index_names("/etc/outside.safetensors"), "outside"),
        (index_names("..\\outside.safetensors"), "outside"),
        (index_names("C:outside.safetensors"), "outside"),
        (index_names("pytorch_model.bin"), "not safetensors"),
    ],
)
def test_what_is_not_safe(sharded: Path, change: Change, message: str) -> None:
    change(sharded)
    assert refused(sharded, UnsafeError, message).exit_code == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncate(LAST, 0.5), "truncated"),
        (truncate(LAST, 0.01), "truncated"),
        (truncate(LAST, 0), "truncated"),
        (write(LAST, b"\xff" * 100), "truncated"),
        (write(LAST, struct.pack("<Q", 4) + b"nope"), "not JSON"),
        (write(LAST, struct.pack("<Q", 14) + b'{"a":1,"a":{}}'), "given twice"),
        (write(LAST, struct.pack("<Q", 8) + b'{"a":{}}'), "the header's entry for a is malformed"),
        (edit_header(LAST, lambda h: None, tail=b"more"), "bytes that belong to no tensor"),
        (edit_header(LAST, last_offsets(0, 2)), "wrong number of bytes"),
        (edit_header(LAST, last_offsets(2, 2)), "truncated"),
        (edit_header(LAST, last_offsets(-2, -2)), "overlaps"),
        (edit_header(LAST, last_offsets(2, 2), tail=b"more"), "hole"),
        (edit_header(LAST, last_offsets(10**12, 10**12)), "truncated"),
        (index_names(FIRST), f"in {FIRST}"),
        (
            edit_json(INDEX, lambda c: c["weight_map"].update({"model.x": LAST})),
            "model.x, which no file holds",
        ),
        (
            edit_tensors(LAST, lambda t: t.update({Q_PROJ: t["model.visual.merger.norm.bias"]})),
            "in two files",
        ),
        (edit_tensors(LAST, lambda t: t.update({name: t[name].astype("f8") for name in t})), "F64"),
        (config(dtype="float16"), "the dtype of"),
        (config(dtype="int8"), "unknown dtype"),
    ],
)
def test_files_that_are_wrong(sharded: Path, change: Change, message: str) -> None:
    change(sharded)
    refused(sharded, CheckpointError, message)


def reshape(tensors: dict[str, Any]) -> None:
    tensors[Q_PROJ] = tensors[Q_PROJ].T.copy()


def rename(old: str, new: str) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def test_shape_that_the_config_contradicts(single: Path) -> None:
    edit_tensors("model.safetensors", reshape)(single)
    error = refused(single, CheckpointError, Q_PROJ)
    assert error.what.startswith("model.safetensors")
    assert (error.expected, error.found) == ([96, 80], [80, 96])


def test_dtype_that_the_config_contradicts(single: Path) -> None:
    edit_tensors("model.safetensors", lambda t: t.update({NORM: t[NORM].astype(np.float32)}))(single)
    error = refused(single, CheckpointError, f"model.safetensors: the dtype of {NORM}")
    assert error.found == "F32"


def test_weight_that_is_missing(single: Path) -> None:
    edit_tensors("model.safetensors", rename(NORM, "model.language_model.norm.wieght"))(single)
    error = refused(single, WeightError, f"{NORM} is missing")
    assert error.exit_code == 16
    assert error.found == "model.language_model.norm.wieght"


def test_weight_that_is_unexpected(single: Path) -> None:
    edit_tensors("model.safetensors", lambda t: t.update({"model.language_model.norm.bias": t[NORM]}))(single)
    error = refused(single, WeightError, "model.language_model.norm.bias is in model.safetensors but not")
    assert error.expected == NORM


def test_missing_head_of_an_untied_model(single: Path) -> None:
    config(tie_word_embeddings=False)(single)
    assert "tie_word_embeddings" in str(refused(single, WeightError, "lm_head.weight is missing").next)


def test_head_that_differs_although_the_config_ties_it(single: Path) -> None:
    def one_less(embeddings: Any) -> Any:
        embeddings[-1, -1] += 1
        return embeddings

    tie_head(one_less)(single)
    refused(single, CheckpointError, "lm_head.weight differs from")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (config(text_config=None), "no text_config"),
        (config(text__num_hidden_layers=10**9), "num_hidden_layers is not a count"),
        (config(dtype=["float16"]), "unknown dtype"),
        (edit_json("tokenizer.json", lambda c: c.update(added_tokens=[1])), "tokenizer.json is not a tokenizer"),
        (config(text__num_hidden_layers=0), "num_hidden_layers is not a count"),
        (config(text__hidden_size="80"), "hidden_size is not a count"),
        (config(text__vocab_size=True), "vocab_size is not a count"),
        (config(text__rms_norm_eps=-1.0), "rms_norm_eps"),
        (config(tie_word_embeddings="yes"), "tie_word_embeddings"),
        (config(text__num_key_value_heads=2), "multiple of kv heads"),
        (config(text__head_dim=33), "even head_dim"),
        (config(rope__mrope_section=[6, 5, 6]), "mrope_section"),
        (config(rope__mrope_section=[8, 8]), "mrope_section"),
        (config(rope__factor=None), "factor is not a positive number"),
        (config(vision__num_heads=5), "num_heads"),
        (config(vision__num_heads=24), "axial"),
        (config(vision__num_position_embeddings=63), "square"),
        (config(vision__out_hidden_size=81), "out_hidden_size"),
        (config(vision__patch_size=[16, 16]), "patch_size is not a count"),
        (config(vision__deepstack_visual_indexes=[1, 1]), "distinct"),
        (config(vision__deepstack_visual_indexes=[2]), "0 to 1"),
        (config(vision__deepstack_visual_indexes=[-1]), "0 to 1"),
        (config(vision__depth=9, vision__deepstack_visual_indexes=[1, 2, 3, 4]), "more DeepStack features"),
        (config(image_token_id=4096), "image_token_id is not a token"),
        (config(vision__patch_size=14), "patch_size contradicts"),
        (config(vision__spatial_merge_size=4), "merge_size contradicts"),
        (config(vision__temporal_patch_size=1), "temporal_patch_size contradicts"),
        (edit_json("preprocessor_config.json", lambda c: c.pop("merge_size")), "merge_size contradicts"),
        (edit_json("preprocessor_config.json", lambda c: c.update(image_std=[0.5, 0.5])), "image_std"),
        (edit_json("preprocessor_config.json", lambda c: c.pop("size")), "the least and most pixels"),
        (config(text__vocab_size=4000), "more tokens than the model has embeddings"),
    ],
)
def test_configs_that_contradict_themselves(single: Path, change: Change, message: str) -> None:
    change(single)
    refused(single, CheckpointError, message)
