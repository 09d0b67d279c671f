"""Run a bundle's own graphs in plain ONNX Runtime, with the decoder's logits at every token.

Arithmetic and weights are the bundle's; fp16 ports are read and written as fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from builder.bundle.layout import graph_files
from builder.checkpoint.parts import DECODER
from builder.graph.ports import RESIDUAL, ROLES
from builder.reference.model import Prompt
from builder.targets.graphs import GRAPHS
from builder.util.onnx_session import does_not_load, open_session
from builder.verify.graphs.fp32_copy import decoder_with_all_logits
from builder.verify.graphs.sessions import Array, Graphs, decoder_call

TYPES = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(int64)": np.int64}


class FloatSession:
    """Wraps a session so that its float ports are float32 for the caller."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._types = {port.name: TYPES[port.type] for port in session.get_inputs()}

    def get_inputs(self) -> Any:
        return self._session.get_inputs()

    def get_outputs(self) -> Any:
        return self._session.get_outputs()

    def run(self, outputs: Sequence[str] | None, feed: dict[str, Array]) -> list[Array]:
        """Run like an onnxruntime session; all outputs if `outputs` is None."""
        cast = {name: value.astype(self._types[name], copy=False) for name, value in feed.items()}
        return [
            value.astype(np.float32) if value.dtype == np.float16 else value
            for value in self._session.run(outputs, cast)
        ]


def shipped_graphs(folder: Path, target: str, hidden: int) -> Graphs:
    """Open the three graphs on the CPU.

    Raises:
        BundleError: ONNX Runtime cannot load a graph.
    """
    files, sessions = graph_files(folder), []
    for name in ROLES:
        path = files[name]
        model = decoder_with_all_logits(path) if name == DECODER else path
        try:
            # Severity 3: onnxruntime warns about the constants of removed nodes.
            session = open_session(model, path.parent, log_severity_level=3)
        except Exception as error:
            expected = "a graph of a precision that the CPU provider supports"
            raise does_not_load(path, error, expected=expected) from error
        sessions.append(FloatSession(session))
    vision, embeddings, decoder = sessions
    return Graphs(vision, embeddings, decoder, GRAPHS[target].packed, hidden)


def teacher_forced(
    graphs: Graphs, prompt: Prompt, answer: Sequence[int], image_token_id: int
) -> tuple[Array, list[Array]]:
    """Run the three graphs once on a prompt followed by a given answer.

    Returns:
        logits [seq, vocab]; the residual stream after each decoder layer, [seq, H] each.
    """
    ids = np.concatenate([prompt.input_ids, np.asarray(answer, np.int64)[None]], axis=1)
    further = prompt.position_ids[:, :, -1:] + 1 + np.arange(len(answer), dtype=np.int64)
    positions = np.concatenate([prompt.position_ids, further], axis=2)
    width = graphs.hidden
    main, levels = np.zeros((0, width), np.float32), [np.zeros((0, width), np.float32)] * _levels(graphs)
    if prompt.pixel_values is not None and prompt.image_grid_thw is not None:
        main, levels = graphs.vision(prompt.pixel_values, prompt.image_grid_thw)
    embeds, spread = graphs.embed(ids, main, levels, image_token_id)
    call = decoder_call(graphs.packed, [embeds, *spread], positions, np.ones((1, ids.shape[1]), np.int64))
    ((values,),) = graphs.run(DECODER, [[call]])
    streams = sorted((name for name in values if name.startswith(f"{RESIDUAL}.")), key=_layer)
    return values["logits"][0], [values[name][0] for name in streams]


def _levels(graphs: Graphs) -> int:
    shapes = {port.name: port.shape for port in graphs.model.get_inputs()}
    if graphs.packed:
        return int(shapes["inputs_embeds"][2]) // graphs.hidden - 1
    return int(shapes.get("deepstack_embeds", [0])[0])


def _layer(name: str) -> int:
    return int(name.rpartition(".")[2])
