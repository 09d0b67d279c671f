"""A `transformersjs` bundle in transformers.js under Node.js, fed by our own exact preprocessing or by the library's.

In: the bundle's folder. Out: greedy tokens, one at a time, from the library's own `generate`. Guaranteed: local files
alone; pixel values go through a file of their own, byte for byte.
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
    """Reads the settings at once, starts Node.js when first asked for tokens."""

    most_images = 1  # of the library's own processor, which takes further ones for frames of one film

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.program = Program(PROGRAMS / "runner.mjs", packages(), folder)

    def load(self) -> None:
        """Has the library load the graphs.

        Raises:
            RuntimeError: it does not.
        """
        for _ in self.program.ask("open"):
            pass

    @property
    def own(self) -> TransformersJs:
        """Its own image processor is verified beside ours."""
        return self

    def tokens(self, inputs: Inputs, max_new_tokens: int, min_new_tokens: int = 0) -> Iterator[int]:
        """Greedy tokens as they come, the stop token included; the first `min_new_tokens` are no stop tokens."""
        with TemporaryDirectory() as passing:
            pixels, grid = None, None
            if inputs.pixel_values is not None and inputs.image_grid_thw is not None:
                path, grid = Path(passing) / PIXELS, inputs.image_grid_thw.tolist()
                path.write_bytes(inputs.pixel_values.astype("<f4", copy=False).tobytes())
                pixels = {"path": str(path), "dims": list(inputs.pixel_values.shape)}
            for told in self.program.ask(
                "generate",
                ids=inputs.input_ids[0].tolist(),
                pixels=pixels,
                grid=grid,
                most=max_new_tokens,
                least=min_new_tokens,
                stop=list(self.settings.eos_token_ids),
            ):
                yield int(told["token"])

    def tokens_of(self, tensors: Any, seq: int, max_new_tokens: int, min_new_tokens: int = 0) -> Iterator[int]:
        """The same for what the library's processor made, which `runtime_inputs` gives as `Inputs`."""
        return self.tokens(tensors, max_new_tokens, min_new_tokens)

    def at_target_size(self, path: Path) -> bool:
        """Whether the library's processor sees the bytes that ours sees: an RGB PNG that needs no resize."""
        from PIL import Image

        with Image.open(path) as raw:
            plain = raw.format == "PNG" and raw.mode == "RGB"
        image = load_image(path)
        return plain and target_size(image.height, image.width, self.vision) == (image.height, image.width)

    def runtime_inputs(self, prompt: str, images: Sequence[Path]) -> tuple[Any, Inputs]:
        """What `AutoProcessor` gives for one image; positions follow from ids and grid."""
        (image,), s = images, self.settings
        with TemporaryDirectory() as passing:
            out = Path(passing) / PIXELS
            text = f"{s.prefix}{s.image}{prompt}{s.suffix}"
            (told,) = self.program.ask("process", text=text, image=str(image), out=str(out))
            pixels: npt.NDArray[Any] = np.fromfile(out, "<f4").reshape(told["dims"])
        ids, grid = np.array([told["ids"]], np.int64), np.array([told["grid"]], np.int64)
        inputs = Inputs(ids, pixels, grid, *position_ids(ids, grid, s))
        return inputs, inputs


def open_transformersjs(folder: Path, trusted: bool) -> TransformersJs:
    """The bundle in `folder`; where it is `trusted`, its graphs are loaded at once."""
    bundle = TransformersJs(folder)
    if trusted:
        bundle.load()  # so that a broken bundle is told from a broken prompt
    return bundle
