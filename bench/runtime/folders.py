"""Build the compared folders: our bundles, and the artifact of onnxruntime-genai's own builder.

Earlier builds are reused.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import onnx

from bench.builds import BUILDER
from bench.comparators import GENAI
from bench.measure import run
from bench.runtime.llama import AbsentError

CONFIG = "genai_config.json"
MULTIPLIES = ("MatMul", "Gemm", "FusedMatMul")  # prefixes of operators that read a complete matrix


def ours(checkpoint: Path, recipe: str, output: Path) -> Path:
    """Build the `genai` folder of `recipe`, without verification, or resume the build in `output`.

    Raises:
        AbsentError: the build fails.
    """
    command = [*BUILDER, "build", checkpoint, "--recipe", recipe, "--until", "configure", "--output", output]
    done = run(command)
    if done.failure is not None:
        raise AbsentError(f"the build failed: {done.failure}")
    return output / "6-configure" / "genai"


def theirs(checkpoint: Path, out: Path) -> Path:
    """Build the text decoder with onnxruntime-genai's builder: int4, ids in, logits out.

    Raises:
        AbsentError: the build fails.
    """
    if (out / CONFIG).is_file():
        return out
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    options = ["-p", "int4", "-e", "cpu", "-c", part / "cache", "--extra_options", "hf_token=false"]
    done = run([sys.executable, *GENAI, "-i", checkpoint, "-o", part, *options], settings={"HF_HUB_OFFLINE": "1"})
    shutil.rmtree(part / "cache", ignore_errors=True)
    if done.failure is not None:
        shutil.rmtree(part, ignore_errors=True)
        raise AbsentError(f"the build failed: {done.failure}")
    return part.rename(out)


def with_threads(folder: Path, out: Path, threads: int) -> Path:
    """Copy `folder` to `out`, with hard links, and set `threads` in each session.

    Raises:
        OSError: `out` is on another disk.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for file in folder.iterdir():
        if file.is_file() and file.name != CONFIG:
            os.link(file, out / file.name)
    config: dict[str, Any] = json.loads((folder / CONFIG).read_bytes())
    for part in config["model"].values():
        if isinstance(part, dict) and "filename" in part:
            part.setdefault("session_options", {})["intra_op_num_threads"] = threads
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return out


def size(folder: Path) -> int:
    """Return the bytes on the disk."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def read_by_a_step(folder: Path) -> int:
    """Return the bytes of weights that a decode step reads: those in the decoder's matmuls, each once."""
    config = json.loads((folder / CONFIG).read_bytes())
    graph = onnx.load(folder / config["model"]["decoder"]["filename"], load_external_data=False).graph
    used = {name for node in graph.node if node.op_type.startswith(MULTIPLIES) for name in node.input}
    return sum(_bytes(tensor) for tensor in graph.initializer if tensor.name in used)


def _bytes(tensor: onnx.TensorProto) -> int:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if "length" in entries:
        return int(entries["length"])
    return onnx.numpy_helper.to_array(tensor).nbytes
