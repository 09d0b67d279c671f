"""Render the runtime bench as Markdown.

A document names its machine and packages; sections of earlier runs are kept only if those are the same.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from bench.runtime import claims
from bench.runtime.claims import shown
from bench.runtime.contestants import Contestant
from bench.runtime.figures import (
    COLD,
    DECODE,
    DISTURBED,
    IMAGE_PEAK,
    IMAGES,
    LOAD,
    PROMPTS,
    READ,
    STEPS,
    TEXT_PEAK,
    VISION_PEAK,
    Outcome,
    answer,
    prefill,
    vision,
)
from bench.table import PACKAGES, UNKNOWN, row_table

EXPLAINED = f"""\
Written by `make bench-runtime`. Contestants run in turn, round after round; figures are medians over the rounds, peaks
are maxima. Each figure comes from its own process; peak RSS is that of the process, including mapped files; MB are 10⁶
bytes. Weights are random, dimensions real; all contestants get the same tokens as prompts.

- *load*: time until the model is ready. For llama.cpp: time of its process without the test.
- *first answer*: time to the first token after a prompt of {PROMPTS[0]} tokens, right after loading.
- *prefill*: tokens of the prompt divided by the seconds to the first token, for a model that has answered before.
- *decode*: tokens per second, over {STEPS} tokens after a prompt of {PROMPTS[0]} (PyTorch: 8 tokens).
- *of the limit*: the decode rate relative to what memory bandwidth allows: bytes read per second by all threads at
  once, divided by the bytes of weights in the matmuls of a step.
- *default threads*: nothing is set. *threads set*: `intra_op_num_threads` in `genai_config.json`.
- *encoder*: the vision encoder alone. *answer*: from pixel values and token ids to the first token, complete bundle.

## llama.cpp
Measured if `--llama DIR`, or the variable `LLAMA_CPP`, names a folder made as follows (needs a C++ compiler, cmake and
ninja):

```
mkdir DIR && cd DIR
pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36 && tar xf llama_cpp_python-*.tar.gz
ln -s llama_cpp_python-*/vendor/llama.cpp source
cmake -S source -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF \\
  -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
cmake --build build --target llama-bench llama-quantize
pip install --no-deps --target python sentencepiece    # its converter imports it
```"""
TEXT_HEAD = ("load", "first answer", *(f"prefill {tokens:,}" for tokens in PROMPTS), "decode", "of the limit")
TEXT_FIGURES = (LOAD, COLD, *map(prefill, PROMPTS), DECODE)


@dataclass(frozen=True)
class Result:
    """A run at one size.

    Args:
        ours: recipes, by the names of their contestants.
    """

    size: str
    threads: int
    rounds: int
    ours: tuple[str, ...]
    contestants: tuple[Contestant, ...]
    outcomes: Mapping[str, Outcome]


def section(result: Result) -> str:
    """Render `## size` with the tables of text, images and claims."""
    fastest = bandwidth(result.outcomes.values())
    parts = [f"## {result.size}", _about(result, fastest)]
    measured = [(each, result.outcomes.get(each.name, Outcome())) for each in result.contestants]
    parts.append(_text_table(measured, fastest and fastest[1]))
    parts.append(_image_table(measured))
    for recipe in result.ours:
        parts.append(row_table(claims.rows(recipe, result.outcomes, result.threads)).replace("ours", recipe, 1))
    if notes := [f"- {each.name}: {note}" for each, outcome in measured if (note := _note(each, outcome))]:
        parts.append("\n".join(notes))
    return "\n\n".join(parts)


def bandwidth(outcomes: Iterable[Outcome]) -> tuple[str, float] | None:
    """Return the kernel that read memory fastest, and its bytes per second."""
    rates = {
        name.removeprefix(READ): rate
        for outcome in outcomes
        for name in outcome.runs
        if name.startswith(READ) and (rate := outcome.typical(name)) is not None
    }
    return max(rates.items(), key=lambda item: item[1], default=None)


def document(sections: Mapping[str, str], file: Path) -> str:
    """Render the head and all sections: the given ones, and those in `file` from the same machine and packages."""
    kept: dict[str, str] = {}
    head = _head()
    if file.is_file() and (old := file.read_text(encoding="utf-8")).startswith(head):
        for part in re.split(r"^(?=## )", old.removeprefix(head), flags=re.MULTILINE)[1:]:
            kept[part.splitlines()[0].removeprefix("## ")] = part.rstrip("\n")
    return head + "\n" + "\n\n".join({**kept, **sections}.values()) + "\n"


def _about(result: Result, fastest: tuple[str, float] | None) -> str:
    worst = max((outcome.others for outcome in result.outcomes.values()), default=0.0)
    text = f"All on {result.threads} threads; {result.rounds} rounds."
    if fastest is not None:
        text += f" Memory bandwidth: {fastest[1] / 1e9:.1f} GB/s ({fastest[0]})."
    if worst > DISTURBED:
        text += f" **Disturbed**: other processes used up to {worst:.1f} cores."
    return text


def _text_table(measured: Sequence[tuple[Contestant, Outcome]], fastest: float | None) -> str:
    lines = [_line("text", *TEXT_HEAD, "peak RSS", "on disk"), "|---|" + "--:|" * (len(TEXT_HEAD) + 2)]
    for contestant, outcome in measured:
        if not _is_machine(outcome):
            cells = [shown(name, outcome.typical(name)) for name in TEXT_FIGURES]
            rate, peak = outcome.typical(DECODE), outcome.typical(TEXT_PEAK)
            limit = f"{rate * contestant.step / fastest:.0%}" if rate and contestant.step and fastest else UNKNOWN
            disk = f"{contestant.nbytes / 1e6:,.0f} MB" if contestant.nbytes else UNKNOWN
            lines.append(_line(contestant.name, *cells, limit, shown(TEXT_PEAK, peak), disk))
    return "\n".join(lines)


def _image_table(measured: Sequence[tuple[Contestant, Outcome]]) -> str:
    names = [name(image) for name in (vision, answer) for image in IMAGES]
    heads = [f"{what} {image}" for what in ("encoder", "answer") for image in IMAGES]
    lines = [_line("images", *heads, "encoder's peak RSS", "peak RSS"), "|---|" + "--:|" * (len(names) + 2)]
    for contestant, outcome in measured:
        values = [shown(name, outcome.typical(name)) for name in (*names, VISION_PEAK, IMAGE_PEAK)]
        if any(value != UNKNOWN for value in values):
            lines.append(_line(contestant.name, *values))
    return "\n".join(lines)


def _is_machine(outcome: Outcome) -> bool:
    return any(name.startswith(READ) for name in outcome.runs)


def _note(contestant: Contestant, outcome: Outcome) -> str:
    parts = [contestant.absent] if contestant.absent else list(outcome.failures)
    return "; ".join([*parts, *(["one round"] if contestant.once and outcome.runs else [])])


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _head() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    machine = (
        f"{os.cpu_count()} CPUs ({_vectors()}), {memory:.0f} GiB of memory, {platform.system()} {platform.machine()}"
    )
    return f"# How fast an artifact is\n\n{machine}, Python {platform.python_version()}; {packages}.\n\n{EXPLAINED}\n"


def _vectors() -> str:
    """Return the vector instructions by which kernels are chosen."""
    try:
        flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())  # type: ignore[index]
    except (OSError, TypeError):
        return "vector instructions unknown"
    known = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
    return ", ".join(name for name in known if name in flags) or "no AVX2"
