"""Run `transformersjs` bundles in transformers.js under Node.js, with our exact preprocessing or the library's.

Only local files are used; pixel values are passed as a binary file, unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from builder.targets.clients.pipeline import Inputs, load_image, position_ids, target_size
from builder.targets.runners.node import PROGRAMS, Program, packages
from builder.targets.runners.protocol import SettingsRunner

PIXELS = "pixels.f32"


class TransformersJs(SettingsRunner):
    """A `Runner` that reads the settings at once and starts Node.js on first use."""

    most_images = 1  # the library's processor treats several images as frames of one video

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.program = Program(PROGRAMS / "runner.mjs", packages(), folder)

    def load(self) -> None:
        """Load the graphs.

        Raises:
            RuntimeError: the library cannot load them.
        """
        for _ in self.program.request("open"):
            pass

    @property
    def own(self) -> TransformersJs:
        """The library's image processor, which is verified in addition to ours."""
        return self

    def tokens(self, inputs: Inputs, max_new_tokens: int, min_new_tokens: int = 0) -> Iterator[int]:
        """Generate greedy tokens up to and including a stop token, which is never among the first `min_new_tokens`."""
        with TemporaryDirectory() as folder:
            pixels, grid = None, None
            if inputs.pixel_values is not None and inputs.image_grid_thw is not None:
                path, grid = Path(folder) / PIXELS, inputs.image_grid_thw.tolist()
                path.write_bytes(inputs.pixel_values.astype("<f4", copy=False).tobytes())
                pixels = {"path": str(path), "dims": list(inputs.pixel_values.shape)}
            for response in self.program.request(
                "generate",
                ids=inputs.input_ids[0].tolist(),
                pixels=pixels,
                grid=grid,
                most=max_new_tokens,
                least=min_new_tokens,
                stop=list(self.settings.eos_token_ids),
            ):
                yield int(response["token"])

    def tokens_of(self, tensors: Any, seq: int, max_new_tokens: int, min_new_tokens: int = 0) -> Iterator[int]:
        """Generate tokens from the output of `runtime_inputs`."""
        return self.tokens(tensors, max_new_tokens, min_new_tokens)

    def at_target_size(self, path: Path) -> bool:
        """Return whether the library's processor gets the same pixels as ours: an RGB PNG that needs no resizing."""
        from PIL import Image

        with Image.open(path) as raw:
            plain = raw.format == "PNG" and raw.mode == "RGB"
        image = load_image(path)
        return plain and target_size(image.height, image.width, self.vision) == (image.height, image.width)

    def runtime_inputs(self, prompt: str, images: Sequence[Path]) -> tuple[Any, Inputs]:
        """Return the output of `AutoProcessor` for one image, with computed positions."""
        (image,), s = images, self.settings
        with TemporaryDirectory() as folder:
            out = Path(folder) / PIXELS
            text = f"{s.prefix}{s.image}{prompt}{s.suffix}"
            (response,) = self.program.request("process", text=text, image=str(image), out=str(out))
            pixels: npt.NDArray[Any] = np.fromfile(out, "<f4").reshape(response["dims"])
        ids, grid = np.array([response["ids"]], np.int64), np.array([response["grid"]], np.int64)
        inputs = Inputs(ids, pixels, grid, *position_ids(ids, grid, s))
        return inputs, inputs


def open_transformersjs(folder: Path, trusted: bool) -> TransformersJs:
    """Open a bundle, and load its graphs at once if it is `trusted`."""
    bundle = TransformersJs(folder)
    if trusted:
        bundle.load()  # reports a broken bundle before the first prompt
    return bundle
