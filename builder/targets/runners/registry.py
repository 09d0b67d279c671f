"""How the bundles of each target run on this machine, by the target's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from builder.targets.clients.pipeline import SettingsError
from builder.targets.graphs import GRAPHS
from builder.targets.image_preprocessor import Preprocess, in_onnxruntime
from builder.targets.runners import genai, node, openvino, pipeline, transformersjs
from builder.targets.runners.protocol import NotRun, Runner
from builder.util.errors import BundleError


@dataclass(frozen=True)
class Runtime:
    """How a target's bundles run here; packages of the runtime are imported only by `open` and `preprocessor`.

    Args:
        open: (folder, trusted) → the bundle, opened. Where it is `trusted`, programs inside it may run, and a broken
            bundle fails at once.
        missing: why bundles cannot run on this machine, with the command that helps; None where they can.
        versions: of the runtime, for the report.
        preprocessor: the image preprocessor's file → the graph in the runtime; where the bundle has such a graph.
        tolerance: of a pixel value of it, in units of 1/255; more than 0 where the runtime has no float64.
    """

    open: Callable[[Path, bool], Runner]
    missing: Callable[[], str | None] = lambda: None
    versions: Callable[[], Mapping[str, str]] = dict
    preprocessor: Callable[[Path], Preprocess] = in_onnxruntime
    tolerance: float = 0.0


RUNTIMES: dict[str, Runtime] = {
    "genai": Runtime(genai.open_genai),
    "onnxruntime": Runtime(pipeline.open_pipeline),
    "openvino": Runtime(
        openvino.open_openvino,
        openvino.missing,
        openvino.versions,
        openvino.preprocess_in_openvino,
        tolerance=1.001,  # one level, and the last bits of float32
    ),
    "transformersjs": Runtime(transformersjs.open_transformersjs, node.missing, node.versions),
}


def check_target(folder: Path, target: str) -> None:
    """
    Raises:
        BundleError: no target has that name.
    """
    if target not in GRAPHS:
        raise BundleError(f"{folder} is for the target {target!r}", expected=" or ".join(GRAPHS), found=target)


def open_runner(folder: Path, target: str) -> Runner:
    """The bundle in `folder`, opened in the runtime of `target`; no program inside it is run.

    Where the runtime is missing on this machine, the `Runner` makes inputs and says why it gives no tokens.

    Raises:
        BundleError: an unknown target, or settings that the runtime cannot use.
    """
    check_target(folder, target)
    try:
        why = RUNTIMES[target].missing()
        return NotRun(folder, why) if why else RUNTIMES[target].open(folder, False)
    except SettingsError as error:
        raise BundleError(f"the settings in {folder} cannot be used", found=str(error)) from error
