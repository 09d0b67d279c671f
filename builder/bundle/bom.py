"""Write bom.cdx.json, a bundle's bill of materials: CycloneDX 1.6 with a model card (ML-BOM).

Schema: https://cyclonedx.org/docs/1.6/json/. It lists every file of the bundle except itself and the manifest. The same
manifest gives the same bytes: there is no time, and the serial number is derived from the content. The Python reference
library (11.12) cannot write model cards; the tests validate the document against its schema.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from builder.bundle.model_card import CARD, TASK, TOOL, limits
from builder.checkpoint.license import License

BOM = "bom.cdx.json"
_ADDRESS = re.compile(r"https?://[\w./%~:?=&+-]+", re.ASCII)
_SERIAL = uuid.uuid5(uuid.NAMESPACE_URL, "urn:qwen3vl-onnx:bom")
_BUNDLE, _CHECKPOINT = "bundle", "checkpoint"  # references within the document

Json = dict[str, Any]


def bom(manifest: Mapping[str, Any], license: License) -> str:
    """Return the document as JSON text."""
    content = _document(manifest, license)
    serial = uuid.uuid5(_SERIAL, json.dumps(content, sort_keys=True, ensure_ascii=False))
    head = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
    }
    return json.dumps({**head, "serialNumber": f"urn:uuid:{serial}", **content}, indent=1, ensure_ascii=False) + "\n"


def _document(manifest: Mapping[str, Any], license: License) -> Json:
    packages = [_package(name, version) for name, version in manifest["versions"].items() if name != TOOL]
    files = [_file(name, facts) for name, facts in manifest["files"].items() if name != BOM]
    tool = {"type": "application", "name": TOOL, "version": str(manifest["versions"].get(TOOL, ""))}
    dependencies = [
        {"ref": _BUNDLE, "dependsOn": [_CHECKPOINT, *(file["bom-ref"] for file in files)]},
        {"ref": _CHECKPOINT, "dependsOn": []},
    ]
    return {
        "version": 1,
        "metadata": {"tools": {"components": [tool]}, "component": _bundle(manifest, license)},
        "components": [_checkpoint(manifest, license), *files, *packages],
        "dependencies": dependencies,
    }


def _bundle(manifest: Mapping[str, Any], license: License) -> Json:
    checkpoint, recipe = manifest["checkpoint"], manifest["recipe"]
    facts = {
        "target": manifest["target"],
        "attention": manifest["attention"],
        "opset": manifest["opset"],
        **{f"recipe.{key}": value for key, value in recipe.items()},
        **{f"patch.{name}": f"{patch['target']} {patch['digest']}" for name, patch in manifest["patches"].items()},
    }
    references = [
        {"type": "documentation", "url": CARD},
        {"type": "evidence", "url": "evidence/report.md"},
    ]
    return {
        "type": "machine-learning-model",
        "bom-ref": _BUNDLE,
        "name": f"{checkpoint['name']}-{recipe['name']}-{manifest['target']}",
        **_licenses(license),
        "pedigree": {"ancestors": [{**_identity(checkpoint), "type": "machine-learning-model"}]},
        "externalReferences": references,
        "modelCard": _model_card(manifest),
        "properties": _properties(facts),
    }


def _model_card(manifest: Mapping[str, Any]) -> Json:
    return {
        "modelParameters": {
            "task": TASK,
            "architectureFamily": "transformer",
            "modelArchitecture": "Qwen3VLForConditionalGeneration",
            "inputs": [{"format": "text"}, {"format": "image"}],
            "outputs": [{"format": "text"}],
        },
        "considerations": {"technicalLimitations": list(limits(manifest))},
    }


def _checkpoint(manifest: Mapping[str, Any], license: License) -> Json:
    checkpoint = manifest["checkpoint"]
    parts = [{**_file(name, facts), "bom-ref": f"checkpoint/{name}"} for name, facts in checkpoint["files"].items()]
    return {
        "type": "machine-learning-model",
        "bom-ref": _CHECKPOINT,
        **_identity(checkpoint),
        **_licenses(license),
        "components": parts,
        "properties": _properties({"config_sha256": checkpoint["config_sha256"]}),
    }


def _identity(checkpoint: Mapping[str, Any]) -> Json:
    """Name, commit and URL of a checkpoint; purl type `huggingface`, https://github.com/package-url/purl-spec."""
    repository, commit = checkpoint.get("repository"), checkpoint.get("revision")
    found: Json = {"name": str(checkpoint["name"])}
    if commit:
        found["version"] = commit
    if repository:
        found["purl"] = f"pkg:huggingface/{quote(repository)}" + (f"@{commit}" if commit else "")
        found["externalReferences"] = [{"type": "distribution", "url": f"https://huggingface.co/{quote(repository)}"}]
    return found


def _file(name: str, facts: Mapping[str, Any]) -> Json:
    return {
        "type": "file",
        "bom-ref": f"file/{name}",
        "name": name,
        "hashes": [{"alg": "SHA-256", "content": facts["sha256"]}],
        "properties": _properties({"size": facts["size"]}),
    }


def _package(name: str, version: str) -> Json:
    """A package that the bundle was built with, and does not contain."""
    normal = name.lower().replace("_", "-")
    purl = f"pkg:pypi/{normal}@{quote(version, safe='')}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl, "scope": "excluded"}


def _licenses(license: License) -> Json:
    if license.id is None:
        return {}
    name = license.name if license.id == "other" and license.name else license.id
    terms: Json = {"id": license.spdx} if license.spdx else {"name": name}
    address = {"url": license.link} if license.link and _ADDRESS.fullmatch(license.link) else {}
    return {"licenses": [{"license": {**terms, **address}}]}


def _properties(facts: Mapping[str, Any]) -> list[Json]:
    return [{"name": f"{TOOL}:{key}", "value": str(value)} for key, value in facts.items()]
