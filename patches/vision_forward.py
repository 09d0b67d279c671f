"""`Qwen3VLVisionModel.forward` with the geometry of the grids in tensor arithmetic.

It takes pixel_values [patches, channels·temporal·patch²] and grid_thw [images, 3] int64. There is no loop over images,
and only tensors depend on the values of `grid_thw`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from patches import vision_attention
from patches.operators import layer_mark
from patches.registry import Patch, applied
from patches.text_attention import MODELING
from patches.tiny import assert_close, tiny_model


class VisionFeatures(NamedTuple):
    """Output of the encoder: pooler_output and each of deepstack_features are [tokens, out_hidden]."""

    pooler_output: Tensor
    deepstack_features: list[Tensor]


class Geometry(NamedTuple):
    """Geometry of each patch: row, column, and height and width of its image, all in patches.

    Each is [patches] int64; segments is [2, patches], the half-open range of each patch's segment.
    """

    row: Tensor
    column: Tensor
    height: Tensor
    width: Tensor
    segments: Tensor


def geometry(grid_thw: Tensor, patches: int, merge: int) -> Geometry:
    """Compute the geometry of patches that are ordered by frame, then by merge x merge blocks in raster order."""
    ends = grid_thw.prod(1).cumsum(0)  # (images,)
    index = torch.arange(patches, device=grid_thw.device)
    # The exporter's shape propagation may evaluate a patch after the last image; clamping keeps the gather in range.
    image = (index[:, None] >= ends[None]).sum(1).clamp(max=grid_thw.shape[0] - 1)
    _, height, width = grid_thw.index_select(0, image).unbind(1)
    frame = height * width
    begin = (ends - grid_thw.prod(1)).index_select(0, image)
    within = (index - begin) % frame
    segment_begin = index - within
    blocks = width // merge
    block, inside = within // (merge * merge), within % (merge * merge)
    row = block // blocks * merge + inside // merge
    column = block % blocks * merge + inside % merge
    return Geometry(row, column, height, width, torch.stack((segment_begin, segment_begin + frame)))


def interpolated(table: Tensor, place: Geometry, side: int) -> Tensor:
    """Interpolate the learned side x side position grid at each patch, bilinearly with aligned corners.

    Returns:
        [patches, hidden].
    """
    taps = []
    for index, size in ((place.row, place.height), (place.column, place.width)):
        source = index.float() * (side - 1) / torch.clamp(size - 1, min=1)
        floor = source.floor()
        low = floor.long()
        taps.append(((low, 1 - (source - floor)), ((low + 1).clamp(max=side - 1), source - floor)))
    total = None
    for row, row_weight in taps[0]:
        for column, column_weight in taps[1]:
            term = F.embedding(row * side + column, table) * (row_weight * column_weight)[:, None]
            total = term if total is None else total + term
    assert total is not None
    return total


def _make(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, hidden_states: Tensor, grid_thw: Tensor, **_: Any) -> VisionFeatures:
        place = geometry(grid_thw, hidden_states.shape[0], self.spatial_merge_size)
        projection = self.patch_embed.proj  # the kernel equals the stride, so the convolution is a linear layer
        hidden = F.linear(hidden_states, projection.weight.flatten(1), projection.bias)
        hidden = hidden + interpolated(self.pos_embed.weight, place, self.num_grid_per_side)
        angles = torch.cat(
            [x[:, None].float() * self.rotary_pos_emb.inv_freq for x in (place.row, place.column)], dim=1
        )
        angles = torch.cat((angles, angles), dim=1)  # (patches, head_dim)
        rotary = (angles.cos(), angles.sin())
        deepstack = []
        hidden = layer_mark(hidden)
        for depth, block in enumerate(self.blocks):
            hidden = block(hidden, cu_seqlens=place.segments, position_embeddings=rotary)
            if depth in self.deepstack_visual_indexes:
                level = list(self.deepstack_visual_indexes).index(depth)
                deepstack.append(self.deepstack_merger_list[level](hidden))
            hidden = layer_mark(hidden)
        return VisionFeatures(self.merger(hidden), deepstack)

    return forward


@torch.no_grad()
def check() -> None:
    """Compare with upstream's vision model: one and several images, several frames, a single row of blocks."""
    visual = tiny_model().model.visual
    for grids in (
        [[1, 4, 6]],
        [[1, 2, 2], [1, 6, 4]],
        [[3, 4, 4], [1, 8, 2]],
        [[1, 2, 20], [2, 2, 2], [1, 14, 14]],
    ):
        grid = torch.tensor(grids)
        patches = int(grid.prod(1).sum())
        pixels = torch.randn(patches, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(patches))
        want = visual(pixels, grid)
        with applied([PATCH, vision_attention.PATCH]):
            got = visual(pixels, grid)
        assert_close(f"main features of {grids}", got.pooler_output, want.pooler_output, 2e-5)
        assert len(got.deepstack_features) == len(want.deepstack_features), "number of DeepStack levels"
        for level, (a, b) in enumerate(zip(got.deepstack_features, want.deepstack_features, strict=True)):
            assert_close(f"DeepStack level {level} of {grids}", a, b, 2e-5)


HELPERS = "transformers.vision_utils"
PATCH = Patch(
    name="vision_forward",
    target=f"{MODELING}:Qwen3VLVisionModel.forward",
    why="upstream derives positions and segments with repeat_interleave, tolist and a loop over images",
    remove_when="upstream takes the grid's geometry from tensor arithmetic alone",
    covers=(
        f"{MODELING}:Qwen3VLVisionModel.__init__",
        f"{MODELING}:Qwen3VLVisionPatchEmbed.forward",
        f"{MODELING}:Qwen3VLVisionRotaryEmbedding.forward",
        f"{MODELING}:Qwen3VLVisionRotaryEmbedding.recomposition_frequencies",
        f"{MODELING}:Qwen3VLVisionRotaryEmbedding.compute_axial_rope_parameters",
        f"{MODELING}:Qwen3VLVisionBlock.forward",
        f"{MODELING}:Qwen3VLVisionModel.rot_pos_emb",
        f"{MODELING}:Qwen3VLVisionModel.fast_pos_embed_interpolate",
        f"{HELPERS}:get_vision_position_ids",
        f"{HELPERS}:get_vision_interpolation_indices_and_weights",
        f"{HELPERS}:get_vision_cu_seqlens",
        f"{HELPERS}:get_vision_attention_seqlens",
        f"{HELPERS}:_interpolation_axis_taps_weights",
    ),
    make=_make,
    check=check,
)
