"""Run `genai` bundles in stock onnxruntime-genai, with our exact preprocessing or the runtime's.

Each prompt gets a new generator: in this runtime (0.18), a padded batch or a second turn with an image on the same
generator gives silently wrong results.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from builder.checkpoint.parts import VISION
from builder.targets.clients.pipeline import Inputs, load_image, position_ids, target_size
from builder.targets.runners.protocol import SettingsRunner
from builder.util.errors import BundleError, MissingPackageError
from builder.util.json_files import read_json


class GenaiBundle(SettingsRunner):
    """A `Runner` that reads the settings at once and loads the model on first use."""

    most_images: int | None = None

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        try:
            import onnxruntime_genai
        except ModuleNotFoundError as error:
            raise MissingPackageError(
                "running a genai bundle needs onnxruntime-genai", next="pip install onnxruntime-genai"
            ) from error
        self.og = onnxruntime_genai

    @cached_property
    def model(self) -> Any:
        """The runtime's model.

        Raises:
            BundleError: the runtime cannot load the folder.
        """
        try:
            return self.og.Model(str(self.folder))
        except Exception as error:  # the runtime raises plain RuntimeErrors
            raise BundleError(
                f"onnxruntime-genai does not load {self.folder}", found=str(error).splitlines()[0]
            ) from error

    @cached_property
    def pixel_type(self) -> Any:
        """The dtype of `pixel_values`; the runtime casts only the outputs of its own processor."""
        import onnx

        graph = onnx.load(self.folder / f"{VISION}.onnx", load_external_data=False).graph
        (port,) = [port for port in graph.input if port.name == "pixel_values"]
        return onnx.helper.tensor_dtype_to_np_dtype(port.type.tensor_type.elem_type)

    @property
    def own(self) -> GenaiBundle:
        """The runtime's image processor, which is verified in addition to ours."""
        return self

    @property
    def most_tokens(self) -> int:
        """The checkpoint's context length: prompt and generated tokens together."""
        return int(self._config["context_length"])

    @property
    def padding(self) -> int | None:  # type: ignore[override]
        """The token that the runtime masks at any position of a prompt."""
        return int(self._config["pad_token_id"])

    @property
    def _config(self) -> Mapping[str, Any]:
        config: Mapping[str, Any] = read_json(self.folder / "genai_config.json")["model"]
        return config

    def tokens(self, inputs: Inputs, max_new_tokens: int, min_new_tokens: int = 0) -> Iterator[int]:
        """Generate greedy tokens up to and including a stop token, which is never among the first `min_new_tokens`."""
        return self.tokens_of(self._named_tensors(inputs), inputs.input_ids.shape[1], max_new_tokens, min_new_tokens)

    def tokens_of(self, tensors: Any, seq: int, max_new_tokens: int, min_new_tokens: int = 0) -> Iterator[int]:
        """Generate tokens from the runtime's NamedTensors of a prompt of `seq` tokens."""
        params = self.og.GeneratorParams(self.model)
        params.set_search_options(
            do_sample=False,
            repetition_penalty=1.0,
            max_length=seq + max_new_tokens,
            min_length=seq + min_new_tokens,
        )
        generator = self.og.Generator(self.model, params)
        generator.set_inputs(tensors)
        while not generator.is_done():
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    def _named_tensors(self, inputs: Inputs) -> Any:
        """Convert our inputs to the form that the runtime's processor returns."""
        tensors = self.og.NamedTensors()
        tensors["input_ids"] = inputs.input_ids.astype(np.int32)
        count = int((inputs.input_ids == self.settings.image_token_id).sum())
        tensors["num_image_tokens"] = np.array([count], np.int64)
        if inputs.pixel_values is not None and inputs.image_grid_thw is not None:
            tensors["pixel_values"] = inputs.pixel_values.astype(self.pixel_type, copy=False)
            tensors["image_grid_thw"] = inputs.image_grid_thw
        return tensors

    def at_target_size(self, path: Path) -> bool:
        """Return whether the runtime's processor gets the same pixels as ours: an RGB PNG that needs no resizing."""
        from PIL import Image

        with Image.open(path) as raw:
            plain = raw.format == "PNG" and raw.mode == "RGB"
        image = load_image(path)
        return plain and target_size(image.height, image.width, self.vision) == (image.height, image.width)

    def runtime_inputs(self, prompt: str, images: Sequence[Path]) -> tuple[Any, Inputs]:
        """Return the output of `create_multimodal_processor()`, unchanged and as `Inputs` with computed positions."""
        s = self.settings
        text = f"{s.prefix}{s.image * len(images)}{prompt}{s.suffix}"
        loaded = self.og.Images.open(*(str(path) for path in images))
        tensors = self.model.create_multimodal_processor()(text, images=loaded)
        ids, pixels, grid = (tensors[name].as_numpy() for name in ("input_ids", "pixel_values", "image_grid_thw"))
        # numpy has two 64-bit integer types: the runtime returns one and accepts the other
        ids, grid = np.array(ids.tolist(), np.int64), np.array(grid.reshape(-1, 3).tolist(), np.int64)
        padded = pixels.reshape(len(images), -1, pixels.shape[-1])  # images are padded with zeros to equal sizes
        rows = np.concatenate([image[: shape.prod()] for image, shape in zip(padded, grid, strict=True)])
        return tensors, Inputs(ids, rows, grid, *position_ids(ids, grid, s))


def open_genai(folder: Path, trusted: bool) -> GenaiBundle:
    """Open a bundle, and load its graphs at once if it is `trusted`."""
    bundle = GenaiBundle(folder)
    if trusted:
        _ = bundle.model  # reports a broken bundle before the first prompt
    return bundle
