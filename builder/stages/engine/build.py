"""What a stage is, which stages there are, and what they may read.

In: a checkpoint's source, a recipe, an output folder. Out: a `Build`, which is what every `run(build, out)`
gets. Guaranteed: nothing here does any work; `builder.stages.engine.execute` decides what runs.
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
    """One step of the pipeline: a function from frozen inputs to a folder.

    Args:
        name: also the module (`builder.<name>`, unless `module` says otherwise) whose `run(build, out)` does
            the work, writing under `out` only, and returns facts (JSON) for the record. A fact called
            `report` is text that `build` prints.
        inputs: earlier stages, `"source"` (the checkpoint's files), `"config"` (its architecture), `"calibration"` or
            `"heldout"` (the cases beside it).
        fields: of the recipe that it reads.
        packages: distributions whose version can change its result.
        files: patterns of files that it reads rather than imports, see `builder.stages.engine.cache_key.code_digests`.
        runs_bundles: whether it runs the bundles in their runtimes: their versions can change its result, too.
        shared: whether another build's folder of the same key will do: it says nothing of the checkpoint's weights.
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
        """Dotted name of the module that does the work."""
        return self.module or f"builder.stages.{self.name}"

    def run(self, build: Build, out: Path) -> Mapping[str, object]:
        """Do the work; imports the module, and what it needs, only now."""
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
    """All that a stage may read.

    Args:
        source: where the checkpoint comes from, its revision settled.
        recipe: what to build.
        output: folder that takes one folder a stage.
        rehash: compare a local checkpoint by all its bytes, not by size and time.
        memory: bytes that verification may use; None for all that this process may have.
        requested: the user's CHECKPOINT, where it is not `source`: an unpinned hub id, say.
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
        """Where a stage's artifacts lie when it is whole, e.g. `…/3-export`."""
        number = next(n for n, one in enumerate(self.stages, start=1) if one.name == stage)
        return self.output / f"{number}-{stage}"

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint, opened once; one from the hub only after the stage `fetch`.

        A local folder that was moved since it was fetched is the same checkpoint: no path enters a key.

        Raises:
            BuildError: see `builder.checkpoint.load.open_checkpoint`.
        """
        from builder.checkpoint.fingerprint import open_fetched
        from builder.checkpoint.load import open_checkpoint

        folder = self.source.folder
        if folder is None:
            return open_fetched(self.folder("fetch"))
        return replace(open_checkpoint(folder, name=self.source.name), folder=folder.absolute())
