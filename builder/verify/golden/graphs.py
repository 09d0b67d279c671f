"""The three graphs of a bundle, one after the other, against a golden's samples.

The graphs are those that ship, in sessions that give the residual stream after each layer as well; a graph is given
what the one before it computed, so that the first gate that fails is where a difference began.
"""

from __future__ import annotations

import numpy as np

from builder.checkpoint.parts import DECODER, VISION
from builder.reference.model import Prompt
from builder.targets.clients.pipeline import Inputs
from builder.util.errors import BuildError
from builder.verify.golden.file import Golden, GoldenCase
from builder.verify.graphs import compare
from builder.verify.graphs.sessions import Graphs, Values
from builder.verify.report.gates import Gate, uncomputed
from builder.verify.tolerances import FP32


def graph_gates(
    graphs: Graphs, golden: Golden, case: GoldenCase, inputs: Inputs, limit: float = FP32
) -> tuple[list[Gate], float]:
    """Features, embeddings and logits of a case, as far as the golden has them.

    Args:
        graphs: loaded with `layer_outputs`.
        limit: see `builder.reference.cases.Case`.

    Returns:
        the gates, and the largest absolute difference of a logit: see `builder.verify.graphs.compare.logit_error`.
    """
    prompt = Prompt(inputs.input_ids, inputs.pixel_values, inputs.image_grid_thw, inputs.position_ids)
    known, place = compare.ReferenceCase(case.name, prompt, case, limit), "image features"
    gates: list[Gate] = []
    parts = [np.zeros((0, graphs.hidden), np.float32)] * max(len(case.embeddings), len(case.features), 1)
    try:
        if inputs.pixel_values is not None and inputs.image_grid_thw is not None:
            call: Values = {"pixel_values": inputs.pixel_values, "image_grid_thw": inputs.image_grid_thw}
            ((values,),) = graphs.run(VISION, [[call]])
            parts = compare.features(graphs, values)
            gates += compare.vision_gates(known, graphs, values)
        place = "embeddings"
        if case.embeddings or case.logits:
            main, levels = graphs.embed(inputs.input_ids, parts[0], parts[1:], golden.image_token_id)
            parts = [main, *levels]
        if case.embeddings:
            gates += compare.embedding_gates(known, parts, case.embeddings)
        place = "decoder prefill"
        if case.logits:
            row = compare.spans(inputs.input_ids.shape[1])
            calls = compare.decoder_calls(graphs.packed, parts, inputs.position_ids, row)
            (results,) = graphs.run(DECODER, [calls])
            gates += compare.decoder_gates(known, graphs.packed, row, results)
    except BuildError:
        raise
    except Exception as error:  # each runtime throws errors of its own for what its graphs cannot take
        gates.append(uncomputed(place, case.name, error))
    spread = max((float.fromhex(sample.std) for sample in case.logits), default=0.0)
    return gates, compare.logit_error(gates, limit, spread)
