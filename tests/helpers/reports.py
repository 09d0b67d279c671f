"""Reports to render, without a model: passing, failing, partial and hostile."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from builder.checkpoint.config import Vision
from builder.reference.cases import shipped_cases
from builder.verify.report.context import Context, MeasuredStage, Table
from builder.verify.report.exhibits import Exhibit, collecting, show_answers, show_case, show_logits, show_pixels
from builder.verify.report.gates import Gate, Report

VISION = Vision(
    depth=2,
    hidden=8,
    heads=2,
    intermediate=16,
    patch_size=4,
    temporal_patch_size=2,
    merge_size=2,
    in_channels=3,
    positions=16,
    out_hidden=8,
    deepstack=(0,),
)
GRID = np.array([[1, 4, 6]])
CONTEXT = Context(
    facts=(("checkpoint", "miniature"), ("manifest.json", "sha256 " + "ab" * 32)),
    tables=(Table("Built with", ("package", "version"), (("torch", "2.13.0"),)),),
    stages=(MeasuredStage("export", 12.5, 500_000_000), MeasuredStage("verify", 30.0, None)),
    self_test=(Table("mutants", ("name", "caught"), (("DeepStack zeroed", "yes"),)),),
)
HOLDS = (
    Gate("pixel values", "one image", 0, 0),
    Gate("token ids", "one image", 0, 0),
    *(Gate("vision layers", f"one image, layer {n}", 2e-6 * (n + 1), 1e-4, layer=n) for n in range(3)),
    Gate("image features", "one image", 9e-6, 1e-4),
    Gate("embeddings", "one image, main", 0, 1e-4),
    *(Gate("decoder layers", f"one image, tokens 0–77, layer {n}", 3e-6, 1e-4, layer=n) for n in range(4)),
    Gate("decoder prefill", "one image, tokens 0–77", 8e-6, 1e-4),
    Gate("tokens", "one image, 64 tokens", 0, 0),
    Gate("tokens", "near ties", 0, 1),
)
FAILS = (
    Gate("tokens", "one image, 64 tokens", 60, 0, "one image: token 4 is 17, PyTorch 3 with a lead of 2.00e+00"),
    Gate("decoder prefill", "one image, tokens 0–77", 0.3, 1e-4, "3.0e-01 of a standard deviation at [0, 3]"),
    Gate("decoder layers", "one image, tokens 0–77, layer 1", 0.02, 1e-4, "2.0e-02 of a deviation at [5, 1]", 1),
    Gate("decoder step", "one image, tokens 82–83", float("nan"), 1e-4, "not finite"),
    Gate("held-out accuracy", "4 held-out answers", float("inf"), 0, "RuntimeError: no such node"),
)
FACTS = {"versions": {"torch": "2.13.0", "onnxruntime": "1.32.0"}, "task": {"PyTorch": "3/4", "ONNX": "3/4"}}
# Markup of HTML, of Markdown, of XML, of terminals; a mention, an address, a change of direction, a lone surrogate.
HARM = (
    "</title></style><script>alert(1)</script><img src=https://example.org/x onerror=alert(1)>"
    "\"' | `code` **bold** [link](https://example.org) @someone #1 "
    "]]> \x00\x07\x1b[31m \u202egnp.exe \ud800 {{ 7*7 }}\n# heading"
)


def passing() -> Report:
    return Report("genai", "miniature", HOLDS, FACTS, exhibits=exhibits())


def failing() -> Report:
    broken = {(gate.place, gate.case) for gate in FAILS}
    kept = tuple(gate for gate in HOLDS if (gate.place, gate.case) not in broken)
    return Report("genai", "miniature", (*FAILS, *kept), FACTS, exhibits=exhibits(wrong=True))


def in_slices() -> Report:
    return Report("onnxruntime", "2B", HOLDS[:-2], {}, {"tokens": "needs 17.8 GB of memory, there are 8.0 GB"})


def harmful() -> Report:
    """Every text that a checkpoint, a bundle or a case can name."""
    gates = (Gate("token ids", HARM, 3, 0, HARM), Gate("decoder prefill", HARM + ", layer 3", 1e-6, 1e-4, HARM, 3))
    (shown, *_) = exhibits()
    (image,) = shown.images
    pixels = tuple(type(shown)(HARM, shown.values, 5, 0.5, shown.difference, shown.sides) for shown in image.pixels)
    exhibit = Exhibit(HARM, "task", HARM, (type(image)(HARM, "", pixels),), HARM, (HARM, HARM + "!"))
    case = Exhibit(HARM, "case", HARM, (type(image)(HARM, image.thumbnail, pixels),), None, (HARM, HARM))
    facts = {"versions": {HARM: HARM}, "task": {HARM: HARM}}
    return Report(HARM, HARM, gates, facts, {"tokens": HARM}, (exhibit, case))


def harmful_context() -> Context:
    rows = Table(HARM, (HARM, "sha256"), ((HARM, HARM),))
    return Context(((HARM, HARM),), (rows,), (MeasuredStage("verify", 1.0, 2),), (rows,))


def exhibits(wrong: bool = False) -> tuple[Exhibit, ...]:
    """Exhibits as a verification collects them, from invented numbers."""
    rng = np.random.default_rng(5)
    want = rng.standard_normal((24, 3 * 2 * 16), np.float32)
    got = want.copy()
    got[7, 3] += 0.5 * wrong
    logits = 4 * rng.standard_normal((1, 20, 300)).astype(np.float32)
    with collecting(VISION) as collected:
        (case,) = [case for case in shipped_cases() if case.name == "one image"]
        show_case(case.name, case.prompt, case.images)
        show_pixels("preprocessing of the bundle", got, want, GRID, GRID)
        show_logits(case.name, (0, 20), logits + np.float32(1e-5) * rng.standard_normal(logits.shape), logits)
        show_answers("a dog" if wrong else "a cat", "a cat")
        return collected()


def image_of(uri: str) -> np.ndarray:
    """The pixels of a data URI."""
    import base64
    import io

    content = base64.b64decode(uri.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


def drawn(path: Path, size: tuple[int, int]) -> Path:
    Image.new("RGB", size, (200, 30, 30)).save(path)
    return path
