"""Tables of what a lossy bundle loses, measured by builder/verify/quality.py and builder/bundle/dequantize.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from builder.verify.report.context import Table
from builder.verify.report.gates import Report

WORST = 12  # weights listed
ERRORS = ("relative", "worst_row")


def loss_tables(report: Report) -> list[Table]:
    """Return tables of quality, drift per layer, and the weights with the largest errors; none for an exact bundle."""
    tables = []
    quality = report.facts.get("quality")
    if isinstance(quality, dict):
        tables.append(Table("Against PyTorch in fp32", ("figure", "value"), tuple(_quality(quality))))
        rows = tuple((f"layer {layer}", f"{drift:.2%}") for layer, drift in enumerate(quality.get("drift", [])))
        tables.append(Table("Drift of the residual stream", ("after", "relative to its norm"), rows))
    weights = report.facts.get("weights")
    if isinstance(weights, list) and weights:
        worst = sorted(weights, key=lambda weight: -weight["relative"])[:WORST]
        columns = ("matrix", "bits per weight", "relative error", "worst row")
        cells = tuple((x["tensor"], f"{x['bits']:g}", *(f"{x[key]:.3%}" for key in ERRORS)) for x in worst)
        tables.append(Table(f"Weights: the {len(cells)} largest errors of {len(weights)}", columns, cells))
    magnitudes = report.facts.get("largest magnitudes")
    if isinstance(magnitudes, list) and magnitudes:
        columns = ("layer", "largest magnitude", "produced by", "computed in")
        cells = tuple(
            (
                f"{x['graph']} {x['layer']}",
                f"{x['magnitude']:.1f}",
                x["module"] or "the layer itself",
                "fp32" if x["wide"] else "fp16",
            )
            for x in magnitudes
        )
        tables.append(Table("Activations and the fp16 range (65,504)", columns, cells))
    return tables


def _quality(quality: Mapping[str, Any]) -> list[tuple[str, str]]:
    positions, text = quality["positions"], quality["perplexity"]
    rows = [
        ("positions compared", f"{positions['positions']:,}"),
        ("KL divergence, mean", f"{positions['kl mean']:.2e} nats"),
        ("KL divergence, 99th percentile", f"{positions['kl p99']:.2e} nats"),
        ("KL divergence, largest", f"{positions['kl max']:.2e} nats"),
        ("same top-1 token", f"{positions['same top-1']:.2%}"),
        (
            f"perplexity on {text['text']}, {text['tokens']} tokens",
            f"{text['bundle'] / text['PyTorch']:.4f} of PyTorch's",
        ),
        ("PyTorch's largest lead over a generated token", f"{quality['largest lead']:.2f} logits"),
    ]
    task = quality.get("task")
    if task:
        rows.append(("correct held-out answers", f"{task['ONNX']}, PyTorch {task['PyTorch']}; {task['lost']} lost"))
    return rows
