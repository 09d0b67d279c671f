"""Define the stages of the pipeline, what each may read, and `Build`, which every `run(build, out)` receives.

`builder.stages.engine.execute` decides which stages run.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from builder.targets.recipe import Recipe

if TYPE_CHECKING:
    from builder.checkpoint.load import Checkpoint
    from builder.checkpoint.source import Source


@dataclass(frozen=True)
class Stage:
    """A step of the pipeline: a function from frozen inputs to a folder.

    Args:
        name: also names the module `builder.stages.<name>` (unless `module` is given), whose `run(build, out)` writes
            under `out` only and returns facts (JSON) for the record. `build` prints the fact `report`.
        inputs: earlier stages, `"source"` (the checkpoint's files), `"config"` (its architecture), `"calibration"` or
            `"heldout"` (the cases next to it).
        fields: recipe fields that it reads.
        packages: distributions whose version can change its result.
        files: patterns of files that it reads and does not import, see `builder.stages.engine.cache_key.code_digests`.
        runs_bundles: whether it runs bundles, so that the versions of their runtimes can change its result.
        shared: whether another build's folder with the same key can be linked, as it does not depend on weights.
    """

    name: str
    inputs: tuple[str, ...]
    fields: tuple[str, ...]
    packages: tuple[str, ...]
    files: tuple[str, ...] = ()
    module: str = ""
    runs_bundles: bool = False
    shared: bool = False

    @property
    def module_name(self) -> str:
        """Dotted name of the module with `run`."""
        return self.module or f"builder.stages.{self.name}"

    def run(self, build: Build, out: Path) -> Mapping[str, object]:
        """Import the module, which can be slow, and run it."""
        facts: Mapping[str, object] = importlib.import_module(self.module_name).run(build, out)
        return facts


_ONNX = ("onnx", "onnx-ir")
_RUNNING = ("torch", "transformers", "onnxruntime", "onnxruntime-genai", "tokenizers", "pillow", "numpy")
_UPSTREAM = ("transformers/models/qwen3_vl/*.py", "transformers/vision_utils.py", "transformers/modeling_rope_utils.py")
_DIGESTS = "patches/*.toml"
_NODE = ("builder/targets/runners/js/*",)
_PAGES = ("builder/verify/report/*.j2", "builder/verify/report/*.css")

# fmt: off
STAGES: tuple[Stage, ...] = (
    Stage("fetch", ("source",), (), ()),
    Stage("patch", (), ("targets",), ("transformers", "torch"), (_DIGESTS, *_UPSTREAM), shared=True),
    Stage("export", ("config", "patch"), ("targets",),
          ("torch", "transformers", *_ONNX, "onnxscript"), (_DIGESTS,), shared=True),
    Stage("optimize", ("export",), ("targets",), (*_ONNX, "onnxscript"), shared=True),
    Stage("quantize", ("optimize", "fetch", "calibration"), ("targets", "precision", "rules"),
          (*_ONNX, "onnxscript", "numpy", "ml-dtypes", "torch", "transformers", "tokenizers", "pillow"),
          ("builder/suite/**/*", "builder/miniature/calibration/*")),
    Stage("configure", ("quantize", "fetch"), ("targets", "precision", "rules", "provider", "max_length"),
          ("jinja2", "tokenizers", *_ONNX, "numpy"), ("builder/targets/clients/pipeline.py",
          "builder/targets/clients/demo/*", *_NODE)),
    Stage("verify", ("configure", "fetch", "heldout"), ("targets", "precision", "rules", "provider", "limits"),
          (*_RUNNING, "jinja2"), ("builder/suite/**/*", "builder/miniature/heldout/*", *_PAGES, *_NODE),
          runs_bundles=True),
    Stage("bundle", ("quantize", "configure", "verify", "fetch", "patch"),
          ("name", "targets", "precision", "rules", "provider", "limits", "max_length"),
          ("qwen3vl-onnx", "jinja2", "huggingface_hub", "pyyaml"), (*_PAGES, *_NODE)),
)
# fmt: on


@dataclass(frozen=True)
class Build:
    """Everything that a stage may read.

    Args:
        source: where the checkpoint comes from, with its revision resolved.
        recipe: what to build.
        output: folder for the stages' folders.
        rehash: whether a local checkpoint is compared by all its bytes instead of by size and time.
        memory: bytes that verification may use; None for this process's limit.
        requested: the user's CHECKPOINT where it differs from `source`, such as an unpinned hub id.
        stages: the pipeline, in order.
    """

    source: Source
    recipe: Recipe
    output: Path
    rehash: bool = False
    memory: int | None = None
    requested: str = ""
    stages: tuple[Stage, ...] = STAGES

    def folder(self, stage: str) -> Path:
        """Return the folder of a complete stage, e.g. `…/3-export`."""
        number = next(n for n, each in enumerate(self.stages, start=1) if each.name == stage)
        return self.output / f"{number}-{stage}"

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint, opened once; if it is from the hub, available after the stage `fetch`.

        A local folder may have moved since `fetch`: no path is part of a key.

        Raises:
            BuildError: see `builder.checkpoint.load.open_checkpoint`.
        """
        from builder.checkpoint.fingerprint import open_fetched
        from builder.checkpoint.load import open_checkpoint

        folder = self.source.folder
        if folder is None:
            return open_fetched(self.folder("fetch"))
        return replace(open_checkpoint(folder, name=self.source.name), folder=folder.absolute())
