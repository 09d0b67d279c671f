"""The mutants of the self-test: each way to break a bundle, and where a verification must catch it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from builder.targets.graphs import GRAPHS
from builder.verify.report.gates import Gate
from builder.verify.self_test import mutations
from builder.verify.self_test import quantized_mutations as quantized

WEIGHTS = "weights"
Mutation = Callable[[Path, str], None]


@dataclass(frozen=True)
class Mutant:
    """One way to break a bundle.

    Args:
        name: short and unique.
        what: description of what is broken.
        change: breaks the bundle in a folder; raises InapplicableError if it cannot.
        places: target → the allowed places of its first difference.
        layer: of the first difference; None for any.
        stored: a stored weight is broken, which is caught at `weights` if it is quantized.
    """

    name: str
    what: str
    change: Mutation
    places: Mapping[str, frozenset[str]]
    layer: int | None = None
    stored: bool = False

    @property
    def at(self) -> str:
        """The layer or DeepStack level of the first difference in words, for self_test.json."""
        kind = "level" if "deepstack features" in self.places["genai"] else "layer"
        return "" if self.layer is None else f"{kind} {self.layer}"

    def explains(self, target: str, first: Gate | None) -> bool:
        """Return whether `first` is an expected first difference of this mutant."""
        if first is None:
            return False
        return (self.stored and first.place == WEIGHTS) or (
            first.place in self.places[target] and self.layer in (None, first.layer)
        )


def _both(*places: str) -> dict[str, frozenset[str]]:
    return dict.fromkeys(GRAPHS, frozenset(places))


LAYERS = "decoder layers"
MUTANTS: tuple[Mutant, ...] = (
    Mutant("pixel mean", "the mean of one channel, 1 % off", mutations.mean_changed, _both("pixel values")),
    Mutant("pixel std", "the standard deviation of one channel, 1 % off", mutations.std_changed, _both("pixel values")),
    Mutant("patch size", "patches half as large", mutations.patch_size_changed, _both("pixel values")),
    Mutant("newline lost", "no line break before the answer", mutations.newline_lost, _both("token ids")),
    Mutant(
        "preprocessor",
        "the image preprocessor's pixel values, 1 % off",
        mutations.preprocessor_brighter,
        _both("image preprocessor"),
    ),
    Mutant("vision MLP", "block 1 adds 1 % too much", mutations.vision_mlp_scaled, _both("vision layers"), 1),
    Mutant(
        "features shifted",
        "each image token takes the next one's features",
        mutations.image_features_shifted,
        # If the client merges features, the vision encoder's output is shifted.
        {name: frozenset({"embeddings" if graphs.merges else "image features"}) for name, graphs in GRAPHS.items()},
    ),
    Mutant("last image lost", "its features are 0", mutations.last_image_dropped, _both("image features")),
    Mutant(
        "DeepStack zeroed", "a common error of export recipes", mutations.deepstack_zeroed, _both("deepstack features")
    ),
    Mutant(
        "DeepStack swapped",
        "levels 0 and 1",
        mutations.deepstack_levels_swapped,
        _both("deepstack features"),
        0,
    ),
    Mutant("attention mask", "off by one token", mutations.attention_mask_off_by_one, _both(LAYERS), 0),
    Mutant("causal mask", "a query sees one token ahead", mutations.causal_mask_off_by_one, _both(LAYERS), 0),
    Mutant("rotary axes", "height and width swapped", mutations.rotary_axes_swapped, _both(LAYERS), 0),
    Mutant(
        "MRoPE sections",
        "contiguous instead of interleaved",
        mutations.mrope_sections_permuted,
        _both(LAYERS),
        0,
    ),
    Mutant("rotary theta", "1 % off", mutations.rotary_theta_changed, _both(LAYERS), 0),
    Mutant("norm epsilon", "ten times as large", mutations.norm_epsilon_changed, _both(LAYERS), 0),
    Mutant("MLP scaled", "layer 3 adds 1 % too much", mutations.mlp_scaled, _both(LAYERS), 3),
    Mutant(
        "layers swapped",
        "down projections of layers 1 and 2",
        mutations.layers_swapped,
        _both(LAYERS),
        1,
        stored=True,
    ),
    Mutant(
        "weight transposed",
        "output projection of layer 1",
        mutations.weight_transposed,
        _both(LAYERS),
        1,
        stored=True,
    ),
    Mutant("scales shifted", "by one block, in layer 1", quantized.scales_shifted, _both(WEIGHTS), stored=True),
    Mutant("zero points", "one code off, in layer 1", quantized.zero_points_shifted, _both(WEIGHTS), stored=True),
    Mutant("nibbles swapped", "in layer 1", quantized.nibbles_swapped, _both(WEIGHTS), stored=True),
    Mutant(
        "int8 activations",
        "zero point one code off, in vision block 1",
        quantized.int8_zero_point_shifted,
        _both("vision layers"),
        1,
    ),
    Mutant("image token", "genai_config.json names another", mutations.image_token_unknown, _both("tokens")),
)
