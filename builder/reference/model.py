"""Run the checkpoint in unpatched PyTorch, on the CPU in fp32: the reference for every artifact.

Guarantees: uses nothing from builder/graph/modules.py, patches/ or builder/targets/clients/pipeline.py;
`trust_remote_code` is off.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from builder.checkpoint.load import Checkpoint
from builder.util.errors import MissingPackageError

Array = npt.NDArray[Any]
ANY_SIZE = 2**40  # pixels


@dataclass(frozen=True)
class Prompt:
    """Inputs of a prompt, from upstream's processor.

    Args:
        input_ids: [1, seq] int64.
        pixel_values: [patches, channels·temporal·patch²] float32, or None without images.
        image_grid_thw: [images, 3] int64, or None.
        position_ids: [3, 1, seq] int64.
    """

    input_ids: Array
    pixel_values: Array | None
    image_grid_thw: Array | None
    position_ids: Array


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, and the lead at each: the largest logit minus the second largest."""

    tokens: tuple[int, ...]
    margins: tuple[float, ...]


@dataclass(frozen=True)
class Trace:
    """Intermediate values of a forward pass, fp32.

    Args:
        vision: [patches, vision hidden] after each vision block; empty without images.
        features: [tokens, H]: the main features, then each DeepStack level; empty without images.
        decoder: [1, seq, H] after each decoder layer and its DeepStack addition: the input of the next layer, or of
            the final norm.
        logits: [positions, vocab].
    """

    vision: tuple[Array, ...]
    features: tuple[Array, ...]
    decoder: tuple[Array, ...]
    logits: Array


class Reference:
    """Upstream's model, tokenizer and PIL image processor of one checkpoint.

    Args:
        checkpoint: its weights are loaded on first use.
        streamed: hold one layer in memory at a time (builder/reference/streaming.py), reading all weights for every
            token.
    """

    def __init__(self, checkpoint: Checkpoint, streamed: bool = False) -> None:
        self.checkpoint, self.streamed = checkpoint, streamed
        self.image_token_id = checkpoint.image_token_id
        try:
            import torch
            import transformers
        except ModuleNotFoundError as error:
            raise MissingPackageError(
                f"comparing with PyTorch requires {error.name}", next='pip install "qwen3vl-onnx[build]"'
            ) from error
        logging: Any = transformers.utils.logging
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        self.torch, self.transformers = torch, transformers

    @cached_property
    def model(self) -> Any:
        """Qwen3VLForConditionalGeneration in fp32, upstream's default attention."""
        if self.streamed:
            from builder.reference.streaming import streamed_model

            return streamed_model(self.checkpoint)
        kind: Any = self.transformers.Qwen3VLForConditionalGeneration
        return kind.from_pretrained(self.checkpoint.folder, dtype=self.torch.float32, use_safetensors=True).eval()

    @cached_property
    def tokenizer(self) -> Any:
        return self.transformers.AutoTokenizer.from_pretrained(self.checkpoint.folder)

    @cached_property
    def image_processor(self) -> Any:
        """The PIL processor, which does not need torchvision."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        return Qwen2VLImageProcessorPil.from_pretrained(self.checkpoint.folder)

    def prepare(self, prompt: str, images: Sequence[Path], *, lifted: bool = False) -> Prompt:
        """Prepare inputs as upstream does: chat template, images, token ids, position ids.

        Args:
            lifted: ignore the checkpoint's limit of pixels.
        """
        from transformers.image_utils import load_image

        pixels = grid = None
        if images:
            least = self.checkpoint.preprocessor["size"]["shortest_edge"]
            size = {"size": {"shortest_edge": least, "longest_edge": ANY_SIZE}} if lifted else {}
            loaded = [load_image(str(path)) for path in images]
            features = self.image_processor(images=loaded, return_tensors="np", **size)
            pixels, grid = features["pixel_values"], features["image_grid_thw"]
        return self.with_pixels(prompt, len(images), pixels, grid)

    def with_pixels(self, prompt: str, images: int, pixels: Array | None, grid: Array | None) -> Prompt:
        """Prepare inputs with given pixel values."""
        content = [{"type": "image"}] * images + [{"type": "text", "text": prompt}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        pieces = text.split(token)
        for index in range(images):
            assert grid is not None
            count = int(grid[index].prod()) // self.checkpoint.vision.merge_size**2
            pieces[index] += token * count
        ids = np.asarray(self.tokenizer("".join(pieces))["input_ids"], np.int64)[None]
        return Prompt(ids, pixels, grid, self._positions(ids, grid))

    def _positions(self, ids: Array, grid: Array | None) -> Array:
        torch = self.torch
        positions, _ = self.model.model.get_rope_index(
            torch.from_numpy(ids),
            mm_token_type_ids=torch.from_numpy((ids == self.image_token_id).astype(np.int32)),
            image_grid_thw=None if grid is None else torch.from_numpy(grid),
            attention_mask=torch.ones(ids.shape, dtype=torch.int64),
        )
        result: Array = positions.numpy()
        return result

    def vision(self, pixels: Array, grid: Array) -> tuple[Array, list[Array]]:
        """Return main features [tokens, H] and D DeepStack levels [tokens, H]."""
        torch = self.torch
        with torch.no_grad():
            out = self.model.model.visual(torch.from_numpy(pixels), torch.from_numpy(grid))
        return out.pooler_output.numpy(), [level.numpy() for level in out.deepstack_features]

    def embed(self, ids: Array) -> Array:
        """Embed ids [batch, seq] int64 as [batch, seq, H]."""
        with self.torch.no_grad():
            result: Array = self.model.get_input_embeddings()(self.torch.from_numpy(ids)).numpy()
        return result

    def logits(self, prompt: Prompt, answer: Sequence[int]) -> Array:
        """Return logits [seq + len(answer), vocab] of a forward pass over the prompt and the given answer."""
        return self._forward(prompt, answer, None)

    def hidden_states(self, prompt: Prompt, answer: Sequence[int] = (), keep: int | None = None) -> Trace:
        """Run the same forward pass and return its intermediate values.

        Args:
            keep: number of last positions with logits (1 or more); None for all.
        """
        vision: list[Array] = []
        features: list[Array] = []
        decoder: list[Array] = []
        visual, text = self.model.model.visual, self.model.model.language_model
        with ExitStack() as hooks:
            for block in visual.blocks:
                hook = block.register_forward_hook(lambda _block, _args, out: vision.append(out.numpy()))
                hooks.enter_context(hook)
            hook = visual.register_forward_hook(
                lambda _visual, _args, out: features.extend(
                    level.numpy() for level in (out.pooler_output, *out.deepstack_features)
                )
            )
            hooks.enter_context(hook)
            for module in (*list(text.layers)[1:], text.norm):
                hook = module.register_forward_pre_hook(lambda _module, args: decoder.append(args[0].numpy()))
                hooks.enter_context(hook)
            logits = self._forward(prompt, answer, keep)
        return Trace(tuple(vision), tuple(features), tuple(decoder), logits)

    def _forward(self, prompt: Prompt, answer: Sequence[int], keep: int | None) -> Array:
        ids = np.concatenate([prompt.input_ids, np.asarray(answer, np.int64)[None]], axis=1)
        with self.torch.no_grad():
            # Upstream takes 0 as all.
            out = self.model(use_cache=False, logits_to_keep=keep or 0, **self._inputs(ids, prompt))
        result: Array = out.logits[0].numpy()
        return result

    def text_logits(self, embeds: Array, positions: Array) -> Array:
        """Return logits [batch, seq, vocab] of embeds [batch, seq, H] at positions [3, batch, seq], full mask."""
        torch = self.torch
        with torch.no_grad():
            hidden = self.model.model.language_model(
                inputs_embeds=torch.from_numpy(embeds),
                position_ids=torch.from_numpy(positions),
                use_cache=False,
            ).last_hidden_state
            result: Array = self.model.lm_head(hidden).numpy()
        return result

    def generate(self, prompt: Prompt, max_new_tokens: int, min_new_tokens: int = 0) -> Answer:
        """Run `generate()` greedily."""
        torch = self.torch
        self.model.model.rope_deltas = None
        with torch.no_grad():
            out = self.model.generate(
                **self._inputs(prompt.input_ids, prompt),
                do_sample=False,
                temperature=None,
                top_k=None,
                top_p=None,
                repetition_penalty=1.0,
                max_new_tokens=max_new_tokens,
                min_new_tokens=min_new_tokens,
                return_dict_in_generate=True,
                output_scores=True,
            )
        best = torch.stack(out.scores)[:, 0].topk(2, dim=-1).values
        tokens = out.sequences[0, prompt.input_ids.shape[1] :]
        return Answer(tuple(tokens.tolist()), tuple((best[:, 0] - best[:, 1]).tolist()))

    def text(self, tokens: Sequence[int]) -> str:
        """Decode without special tokens."""
        result: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return result

    def _inputs(self, ids: Array, prompt: Prompt) -> dict[str, Any]:
        torch = self.torch
        inputs = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.ones(ids.shape, dtype=torch.int64),
        }
        inputs["mm_token_type_ids"] = torch.from_numpy((ids == self.image_token_id).astype(np.int32))
        if prompt.pixel_values is not None and prompt.image_grid_thw is not None:
            inputs["pixel_values"] = torch.from_numpy(prompt.pixel_values)
            inputs["image_grid_thw"] = torch.from_numpy(prompt.image_grid_thw)
        return inputs
