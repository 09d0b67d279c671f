"""Write a bundle's README.md, the model card that the hub shows.

The text depends only on the manifest and the license. It has no measurements, which depend on the machine; it links to
`evidence/report.md`. Names from the checkpoint are escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from builder.checkpoint.license import License
from builder.targets.notes import NOTES, Notes
from builder.util.text import clean, cut

CARD = "README.md"
TOOL = "qwen3vl-onnx"
TASK = "image-text-to-text"
NAME = 120  # characters


SHARED = (
    "Prompt and answer together are limited to {max_length} tokens by the bundle's settings.",
    "Images only; video is not supported.",
)
DEFAULT = Notes("onnx", ("onnxruntime",), (), ())


def notes(target: str) -> Notes:
    """Notes of the target's runtime; defaults where the runtime is unknown."""
    return NOTES.get(target, DEFAULT)


def limits(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """Limitations that a user must know, one sentence each."""
    shared = (limit.format(max_length=manifest["recipe"]["max_length"]) for limit in SHARED)
    return (*notes(manifest["target"]).limits, *shared)


def model_card(manifest: Mapping[str, Any], license: License) -> str:
    """Return the card: Markdown after the hub's YAML metadata."""
    title = f"# {plain(manifest['checkpoint']['name'])} for {plain(manifest['target'])}, {precision(manifest)}"
    parts = [title, _origin(manifest), _use(manifest), _check(), _limits(manifest), _graphs(manifest)]
    return f"---\n{metadata(manifest, license)}---\n" + "\n\n".join([*parts, _license(license)]) + "\n"


def metadata(manifest: Mapping[str, Any], license: License) -> str:
    """Return the hub's metadata as YAML."""
    from huggingface_hub import ModelCardData

    library, repository = notes(manifest["target"]).library, manifest["checkpoint"].get("repository")
    bases = [repository] if repository else list(license.base)
    weights = precision(manifest)
    # The hub lists a quantized model under its base model; fp32 keeps the base model's weights.
    relation = "quantized" if bases and weights != "fp32" else None
    data = ModelCardData(
        base_model=bases[0] if len(bases) == 1 else bases or None,
        base_model_relation=relation,
        license=license.id,
        license_name=license.name,
        license_link=license.link if license.id == "other" else None,
        library_name=library,
        pipeline_tag=TASK,
        quantization=weights,
        tags=sorted({"onnx", "onnxruntime", "qwen3_vl", "deepstack", library, weights}),
    )
    return data.to_yaml(original_order=ORDER) + "\n"


ORDER = ["license", "license_name", "license_link", "base_model", "base_model_relation", "library_name", "pipeline_tag"]


def precision(manifest: Mapping[str, Any]) -> str:
    """How weights are stored: the recipe's name where rules quantize them, else its precision."""
    recipe = manifest["recipe"]
    return plain(recipe["name"] if recipe.get("rules") else recipe["precision"])


def plain(text: object) -> str:
    """Escape a name for Markdown and HTML, without control characters."""
    words = " ".join(clean(cut(str(text), NAME)).split())
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#!|~$&@" else c for c in words)


def quoted(text: object) -> str:
    """Format a name as inline code."""
    return f"`{' '.join(clean(cut(str(text), NAME)).split()).replace('`', '')}`"


def _origin(manifest: Mapping[str, Any]) -> str:
    checkpoint = manifest["checkpoint"]
    name, commit = checkpoint.get("repository"), checkpoint.get("revision")
    made_from = f"[{plain(name)}](https://huggingface.co/{name})" if name else quoted(checkpoint["name"])
    pinned = f" at commit {quoted(commit)}" if commit else ""
    version = manifest["versions"].get(TOOL, "")
    return (
        f"ONNX graphs of {made_from}{pinned}, with DeepStack and {precision(manifest)} weights, built by {TOOL} "
        f"{plain(version)}.\nThey were compared with PyTorch before packaging: inputs, each layer of the vision "
        "encoder, image features,\nembeddings, each layer of the decoder, logits and greedy tokens. "
        "The measured errors are in\n[evidence/report.md](evidence/report.md)."
    )


def _use(manifest: Mapping[str, Any]) -> str:
    runtime = notes(manifest["target"])
    versions = manifest["versions"]
    pinned = " ".join(
        f"{name}=={versions[name]}" if versions.get(name) and name != TOOL else name for name in runtime.packages
    )
    install = [f"pip install {pinned}"] if pinned else []
    lines = ["## Usage", "", "```", *install, *runtime.run, "```"]
    if runtime.code:
        lines += ["", "In the bundle's folder:", "", f"```{runtime.language}", runtime.code.rstrip(), "```"]
    return "\n".join([*lines, "", f"Or with {TOOL}: `qwen3vl-onnx run FOLDER --prompt TEXT --image FILE`."])


def _check() -> str:
    return "\n".join(
        (
            "## Verify the files",
            "",
            "```",
            "qwen3vl-onnx check .      # SHA-256 of every file, the graphs' inputs and outputs, no extra files",
            "```",
            "`manifest.json` lists the size and SHA-256 of every file, each graph's inputs, outputs and operators, the "
            "checkpoint's files,\nthe recipe, the versions and the patches; `bom.cdx.json` is the bill of materials.",
        )
    )


def _limits(manifest: Mapping[str, Any]) -> str:
    return "\n".join(("## Limitations", "", *(f"- {limit}" for limit in limits(manifest))))


def _graphs(manifest: Mapping[str, Any]) -> str:
    rows = ["## Graphs", "", f"Opset {manifest['opset']}.", "", "| graph | inputs | outputs |", "|---|---|---|"]
    for name, graph in manifest["graphs"].items():
        rows.append(f"| {quoted(name)} | {_ports(graph['inputs'])} | {_ports(graph['outputs'])} |")
    return "\n".join(rows)


def _ports(ports: Sequence[Mapping[str, Any]]) -> str:
    """Format ports for a table; the cache ports, a pair per layer, are summarized."""
    cached = [port for port in ports if port["name"].startswith(("past_key_values.", "present."))]
    others = [
        f"{quoted(port['name'])} [{', '.join(map(plain, port['shape']))}]" for port in ports if port not in cached
    ]
    first = [f"{quoted(cached[0]['name'])} and {len(cached) - 1} similar"] if cached else []
    return "<br>".join(others + first)


def _license(license: License) -> str:
    if license.id is None:
        terms = "The checkpoint does not state a license; ask its authors before you redistribute this bundle."
    else:
        name = license.name if license.id == "other" and license.name else license.id
        terms = f"The weights are under the checkpoint's license: {quoted(name)}."
    files = f" Unchanged files of the checkpoint: {', '.join(map(quoted, license.files))}." if license.files else ""
    return f"## License\n\n{terms}{files}"
