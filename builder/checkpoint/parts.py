"""The three parts of a Qwen3-VL model, each exported as a graph; a graph's role is its part."""

from __future__ import annotations

VISION, EMBEDDINGS, DECODER = "vision_encoder", "embeddings", "model"
