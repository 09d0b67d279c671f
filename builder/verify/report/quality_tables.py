"""What a bundle that is not exact loses, as tables for a report.

In: the facts of a verification. Out: tables; none where the bundle is exact. Guaranteed: every figure is one that was
measured (builder/verify/quality.py, builder/bundle/dequantize.py); nothing is rounded to look better than it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from builder.verify.report.context import Table
from builder.verify.report.gates import Report

WORST = 12  # weights that are listed
ERRORS = ("relative", "worst_row")


def loss_tables(report: Report) -> list[Table]:
    """Quality, drift a layer, and the matrices that are furthest from the checkpoint's."""
    found = []
    quality = report.facts.get("quality")
    if isinstance(quality, dict):
        found.append(Table("Against PyTorch in fp32", ("figure", "value"), tuple(_quality(quality))))
        rows = tuple((f"layer {layer}", f"{drift:.2%}") for layer, drift in enumerate(quality.get("drift", [])))
        found.append(Table("Drift of the residual stream", ("behind", "of its norm"), rows))
    weights = report.facts.get("weights")
    if isinstance(weights, list) and weights:
        worst = sorted(weights, key=lambda one: -one["relative"])[:WORST]
        columns = ("matrix", "bits a weight", "relative error", "worst row")
        cells = tuple((one["tensor"], f"{one['bits']:g}", *(f"{one[key]:.3%}" for key in ERRORS)) for one in worst)
        found.append(Table(f"Weights: the {len(cells)} furthest off of {len(weights)}", columns, cells))
    magnitudes = report.facts.get("largest magnitudes")
    if isinstance(magnitudes, list) and magnitudes:
        columns = ("layer", "largest magnitude", "made by", "computed in")
        cells = tuple(
            (
                f"{one['graph']} {one['layer']}",
                f"{one['magnitude']:.1f}",
                one["module"] or "the layer itself",
                "fp32" if one["wide"] else "fp16",
            )
            for one in magnitudes
        )
        found.append(Table("Activations beside fp16's range (65,504)", columns, cells))
    return found


def _quality(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    positions, text = found["positions"], found["perplexity"]
    rows = [
        ("positions compared", f"{positions['positions']:,}"),
        ("KL divergence, mean", f"{positions['kl mean']:.2e} nats"),
        ("KL divergence, 99th percentile", f"{positions['kl p99']:.2e} nats"),
        ("KL divergence, largest", f"{positions['kl max']:.2e} nats"),
        ("same likeliest token", f"{positions['same top-1']:.2%}"),
        (
            f"perplexity on {text['text']}, {text['tokens']} tokens",
            f"{text['bundle'] / text['PyTorch']:.4f} of PyTorch's",
        ),
        ("PyTorch's largest lead over a generated token", f"{found['largest lead']:.2f} logits"),
    ]
    task = found.get("task")
    if task:
        rows.append(("held-out answers right", f"{task['ONNX']}, PyTorch {task['PyTorch']}; {task['lost']} lost"))
    return rows
