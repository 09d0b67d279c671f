"""A `genai` bundle in stock onnxruntime-genai, fed by our own exact preprocessing or by the runtime's.

In: the bundle's folder. Out: greedy tokens, one at a time.
Guaranteed: one generator a conversation and one prompt a generator: a padded batch, or a second image turn on one
generator, is silently wrong in this runtime (0.18), so neither can be asked for here.
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
    """Reads the settings at once, loads the model when first asked for tokens."""

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
            BundleError: the runtime does not accept the folder.
        """
        try:
            return self.og.Model(str(self.folder))
        except Exception as error:  # the runtime throws bare RuntimeErrors of its own
            raise BundleError(
                f"onnxruntime-genai does not load {self.folder}", found=str(error).splitlines()[0]
            ) from error

    @cached_property
    def pixel_type(self) -> Any:
        """numpy's type of what the vision encoder is given; the runtime casts only what its own processor makes."""
        import onnx

        graph = onnx.load(self.folder / f"{VISION}.onnx", load_external_data=False).graph
        (port,) = [port for port in graph.input if port.name == "pixel_values"]
        return onnx.helper.tensor_dtype_to_np_dtype(port.type.tensor_type.elem_type)

    @property
    def own(self) -> GenaiBundle:
        """Its own image processor is verified beside ours."""
        return self

    @property
    def most_tokens(self) -> int:
        """Of prompt and answer together, that the checkpoint was made for."""
        return int(self._config["context_length"])

    @property
    def padding(self) -> int | None:  # type: ignore[override]
        """The runtime masks this token wherever it stands: the answer would be to another question."""
        return int(self._config["pad_token_id"])

    @property
    def _config(self) -> Mapping[str, Any]:
        config: Mapping[str, Any] = read_json(self.folder / "genai_config.json")["model"]
        return config

    def tokens(self, inputs: Inputs, max_new_tokens: int, min_new_tokens: int = 0) -> Iterator[int]:
        """Greedy tokens as they come, the stop token included; the first `min_new_tokens` are no stop tokens."""
        return self.tokens_of(self._named_tensors(inputs), inputs.input_ids.shape[1], max_new_tokens, min_new_tokens)

    def tokens_of(self, tensors: Any, seq: int, max_new_tokens: int, min_new_tokens: int = 0) -> Iterator[int]:
        """The same for the runtime's own NamedTensors of a prompt of `seq` tokens."""
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
        """What the runtime's own processor gives, made from our inputs."""
        tensors = self.og.NamedTensors()
        tensors["input_ids"] = inputs.input_ids.astype(np.int32)
        count = int((inputs.input_ids == self.settings.image_token_id).sum())
        tensors["num_image_tokens"] = np.array([count], np.int64)
        if inputs.pixel_values is not None and inputs.image_grid_thw is not None:
            tensors["pixel_values"] = inputs.pixel_values.astype(self.pixel_type, copy=False)
            tensors["image_grid_thw"] = inputs.image_grid_thw
        return tensors

    def at_target_size(self, path: Path) -> bool:
        """Whether the runtime's processor sees the bytes that ours sees: an RGB PNG that needs no resize."""
        from PIL import Image

        with Image.open(path) as raw:
            plain = raw.format == "PNG" and raw.mode == "RGB"
        image = load_image(path)
        return plain and target_size(image.height, image.width, self.vision) == (image.height, image.width)

    def runtime_inputs(self, prompt: str, images: Sequence[Path]) -> tuple[Any, Inputs]:
        """What `create_multimodal_processor()` gives, as it is and as `Inputs` (positions follow from ids and grid)."""
        s = self.settings
        text = f"{s.prefix}{s.image * len(images)}{prompt}{s.suffix}"
        loaded = self.og.Images.open(*(str(path) for path in images))
        tensors = self.model.create_multimodal_processor()(text, images=loaded)
        ids, pixels, grid = (tensors[name].as_numpy() for name in ("input_ids", "pixel_values", "image_grid_thw"))
        # numpy has two types of 64-bit integers, of which the runtime hands out one and takes the other
        ids, grid = np.array(ids.tolist(), np.int64), np.array(grid.reshape(-1, 3).tolist(), np.int64)
        padded = pixels.reshape(len(images), -1, pixels.shape[-1])  # images of different sizes, zeros behind each
        rows = np.concatenate([image[: one.prod()] for image, one in zip(padded, grid, strict=True)])
        return tensors, Inputs(ids, rows, grid, *position_ids(ids, grid, s))


def open_genai(folder: Path, trusted: bool) -> GenaiBundle:
    """The bundle in `folder`; where it is `trusted`, its graphs are loaded at once."""
    bundle = GenaiBundle(folder)
    if trusted:
        _ = bundle.model  # so that a broken bundle is told from a broken prompt
    return bundle
