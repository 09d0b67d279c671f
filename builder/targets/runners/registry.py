"""Runtimes of each target's bundles on this machine, by the target's name."""

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
    """How a target's bundles run; only `open` and `preprocessor` import packages of the runtime.

    Args:
        open: (folder, trusted) → the opened bundle. If it is `trusted`, programs in it may run, and a broken bundle
            raises an error at once.
        missing: returns why bundles cannot run on this machine, with the command to fix it; None if they can.
        versions: returns the versions of the runtime's packages, for the report.
        preprocessor: opens the image preprocessor graph in the runtime, if the bundle has one.
        tolerance: maximum difference of the graph's pixel values from transformers, in units of 1/255; more than 0 for
            runtimes without float64.
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
        tolerance=1.001,  # one byte value, and float32 rounding
    ),
    "transformersjs": Runtime(transformersjs.open_transformersjs, node.missing, node.versions),
}


def check_target(folder: Path, target: str) -> None:
    """Check the target of a bundle.

    Raises:
        BundleError: there is no target of that name.
    """
    if target not in GRAPHS:
        raise BundleError(f"{folder} is for the target {target!r}", expected=" or ".join(GRAPHS), found=target)


def open_runner(folder: Path, target: str) -> Runner:
    """Open a bundle in the runtime of `target`; no program in it is run.

    If the runtime is missing on this machine, the `Runner` only prepares inputs, and `not_run` has the reason.

    Raises:
        BundleError: the target is unknown, or the settings are invalid.
    """
    check_target(folder, target)
    try:
        why = RUNTIMES[target].missing()
        return NotRun(folder, why) if why else RUNTIMES[target].open(folder, False)
    except SettingsError as error:
        raise BundleError(f"the settings in {folder} cannot be used", found=str(error)) from error
