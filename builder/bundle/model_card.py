"""README.md of a bundle: the card that the hub shows.

In: a manifest, the checkpoint's license. Out: Markdown behind the hub's metadata. Guaranteed: the same text for the
same manifest, and so no measured figure: those are of a machine, and lie in `evidence/report.md`, which the card links
to; what a checkpoint names is shown as text; limits are those of the target's runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from builder.checkpoint.license import License
from builder.targets.registry import PACKAGING
from builder.targets.spec import Notes
from builder.util.text import clean, cut

CARD = "README.md"
TOOL = "qwen3vl-onnx"
TASK = "image-text-to-text"
NAME = 120  # characters


SHARED = (
    "One prompt and its answer are at most {max_length} tokens together, as the bundle's settings say.",
    "Images only: there is no video.",
)
OTHERS = Notes("onnx", ("onnxruntime",), (), ())


def notes(target: str) -> Notes:
    """Of a runtime; what holds for every runtime where nobody has written any."""
    return PACKAGING[target].notes if target in PACKAGING else OTHERS


def limits(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """What a user must know, a sentence each."""
    shared = (one.format(max_length=manifest["recipe"]["max_length"]) for one in SHARED)
    return (*notes(manifest["target"]).limits, *shared)


def model_card(manifest: Mapping[str, Any], license: License) -> str:
    """The card's text."""
    title = f"# {plain(manifest['checkpoint']['name'])} for {plain(manifest['target'])}, {precision(manifest)}"
    parts = [title, _origin(manifest), _use(manifest), _check(), _limits(manifest), _graphs(manifest)]
    return f"---\n{metadata(manifest, license)}---\n" + "\n\n".join([*parts, _license(license)]) + "\n"


def metadata(manifest: Mapping[str, Any], license: License) -> str:
    """The hub's metadata, as YAML."""
    from huggingface_hub import ModelCardData

    told, repository = notes(manifest["target"]), manifest["checkpoint"].get("repository")
    bases = [repository] if repository else list(license.base)
    level = precision(manifest)
    # The hub files a model of other weights below the one that it was made from; fp32 holds the same weights.
    relation = "quantized" if bases and level != "fp32" else None
    data = ModelCardData(
        base_model=bases[0] if len(bases) == 1 else bases or None,
        base_model_relation=relation,
        license=license.id,
        license_name=license.name,
        license_link=license.link if license.id == "other" else None,
        library_name=told.library,
        pipeline_tag=TASK,
        quantization=level,
        tags=sorted({"onnx", "onnxruntime", "qwen3_vl", "deepstack", told.library, level}),
    )
    return data.to_yaml(original_order=ORDER) + "\n"


ORDER = ["license", "license_name", "license_link", "base_model", "base_model_relation", "library_name", "pipeline_tag"]


def precision(manifest: Mapping[str, Any]) -> str:
    """The recipe's word for the weights: its name where rules quantize them."""
    recipe = manifest["recipe"]
    return plain(recipe["name"] if recipe.get("rules") else recipe["precision"])


def plain(text: object) -> str:
    """A name that is no markup: control characters gone, and what Markdown or HTML would read escaped."""
    words = " ".join(clean(cut(str(text), NAME)).split())
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#!|~$&@" else c for c in words)


def quoted(text: object) -> str:
    """The same as code."""
    return f"`{' '.join(clean(cut(str(text), NAME)).split()).replace('`', '')}`"


def _origin(manifest: Mapping[str, Any]) -> str:
    checkpoint = manifest["checkpoint"]
    name, commit = checkpoint.get("repository"), checkpoint.get("revision")
    made_from = f"[{plain(name)}](https://huggingface.co/{name})" if name else quoted(checkpoint["name"])
    pinned = f" at commit {quoted(commit)}" if commit else ""
    version = manifest["versions"].get(TOOL, "")
    return (
        f"ONNX graphs of {made_from}{pinned}, DeepStack included, weights in {precision(manifest)}, made by {TOOL} "
        f"{plain(version)}.\nThey were compared with PyTorch before they became this bundle: inputs, the vision "
        "encoder layer by layer, features,\nembeddings, the decoder layer by layer, logits and greedy tokens. "
        "What was compared, and the figures, are in\n[evidence/report.md](evidence/report.md)."
    )


def _use(manifest: Mapping[str, Any]) -> str:
    told = notes(manifest["target"])
    versions = manifest["versions"]
    pinned = " ".join(
        f"{name}=={versions[name]}" if versions.get(name) and name != TOOL else name for name in told.packages
    )
    install = [f"pip install {pinned}"] if pinned else []
    lines = ["## Run it", "", "```", *install, *told.run, "```"]
    lines += ["", "In the bundle's folder:", "", f"```{told.language}", told.code.rstrip(), "```"] if told.code else []
    return "\n".join([*lines, "", f"Or with {TOOL}: `qwen3vl-onnx run FOLDER --prompt TEXT --image FILE`."])


def _check() -> str:
    return "\n".join(
        (
            "## Check it",
            "",
            "```",
            "qwen3vl-onnx check .      # every file's SHA-256, the graphs' contract, nothing besides",
            "```",
            "`manifest.json` has the size and SHA-256 of every file, each graph's ports and operators, the "
            "checkpoint's files,\nthe recipe, the versions and the patches; `bom.cdx.json` is the bill of materials.",
        )
    )


def _limits(manifest: Mapping[str, Any]) -> str:
    return "\n".join(("## Know its limits", "", *(f"- {one}" for one in limits(manifest))))


def _graphs(manifest: Mapping[str, Any]) -> str:
    rows = ["## Graphs", "", f"Opset {manifest['opset']}.", "", "| graph | inputs | outputs |", "|---|---|---|"]
    for name, graph in manifest["graphs"].items():
        rows.append(f"| {quoted(name)} | {_ports(graph['inputs'])} | {_ports(graph['outputs'])} |")
    return "\n".join(rows)


def _ports(ports: Sequence[Mapping[str, Any]]) -> str:
    """Cache ports, which there is a pair of a layer, are counted."""
    cached = [port for port in ports if port["name"].startswith(("past_key_values.", "present."))]
    others = [
        f"{quoted(port['name'])} [{', '.join(map(plain, port['shape']))}]" for port in ports if port not in cached
    ]
    first = [f"{quoted(cached[0]['name'])} and {len(cached) - 1} like it"] if cached else []
    return "<br>".join(others + first)


def _license(license: License) -> str:
    if license.id is None:
        told = "The checkpoint does not say under which license it is; ask its authors before you pass this bundle on."
    else:
        name = license.name if license.id == "other" and license.name else license.id
        told = f"These weights come under the checkpoint's license: {quoted(name)}."
    files = f" Its files, as they came: {', '.join(map(quoted, license.files))}." if license.files else ""
    return f"## License\n\n{told}{files}"
