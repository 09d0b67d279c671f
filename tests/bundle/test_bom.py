"""The bill of materials follows CycloneDX 1.6, lists every file, and is the same bytes for the same manifest."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest
from cyclonedx.model.bom import Bom
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from builder.bundle.bom import bom
from builder.bundle.model_card import limits
from builder.checkpoint.license import SPDX, License
from builder.targets.registry import PACKAGING
from tests.helpers.manifests import COMMIT, manifest

APACHE = License("apache-2.0", files=("LICENSE",))


def document(license: License = APACHE, **changes: Any) -> dict[str, Any]:
    """Read back, after validation against the published schema."""
    text = bom(manifest(**changes), license)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    found: dict[str, Any] = json.loads(text)
    return found


def component(found: dict[str, Any], ref: str) -> dict[str, Any]:
    (match,) = [each for each in found["components"] if each["bom-ref"] == ref]
    return dict(match)


def test_it_has_the_model_its_base_its_files_and_its_tools() -> None:
    found = document()
    model = found["metadata"]["component"]
    assert (model["type"], model["name"]) == ("machine-learning-model", "Tiny-VL-fp32-genai")
    assert model["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert model["modelCard"]["considerations"]["technicalLimitations"] == list(limits(manifest()))
    assert {"name": "qwen3vl-onnx:recipe.precision", "value": "fp32"} in model["properties"]
    base = component(found, "checkpoint")
    assert base["purl"] == f"pkg:huggingface/Org/Tiny-VL@{COMMIT}"
    assert model["pedigree"]["ancestors"][0]["purl"] == base["purl"]
    assert base["components"][0]["hashes"] == [{"alg": "SHA-256", "content": "1" * 64}]
    files = {
        component["name"]: component["hashes"][0]["content"]
        for component in found["components"]
        if component["type"] == "file"
    }
    assert files == {name: facts["sha256"] for name, facts in manifest()["files"].items()}
    assert component(found, "pkg:pypi/onnx-ir@1.1.0")["scope"] == "excluded"
    assert component(found, "pkg:pypi/torch@2.13.0%2Bcpu")["version"] == "2.13.0+cpu"
    assert found["metadata"]["tools"]["components"][0]["version"] == "0.1.0"


def test_every_reference_leads_somewhere() -> None:
    found = document()
    refs = [found["metadata"]["component"]["bom-ref"], *(part["bom-ref"] for part in found["components"])]
    refs += [component["bom-ref"] for parent in found["components"] for component in parent.get("components", ())]
    assert len(set(refs)) == len(refs)
    for dependency in found["dependencies"]:
        assert {dependency["ref"], *dependency["dependsOn"]} <= set(refs)


def test_it_is_the_same_for_the_same_manifest_and_has_no_time() -> None:
    text = bom(manifest(), APACHE)
    assert text == bom(manifest(), APACHE)
    assert "timestamp" not in text
    one, other = document(), document(opset=17)
    assert one["serialNumber"] != other["serialNumber"]
    assert uuid.UUID(one["serialNumber"].removeprefix("urn:uuid:")).version == 5


@pytest.mark.parametrize("target", [*PACKAGING, "another"])
def test_each_target_and_a_local_checkpoint_keep_to_the_schema(target: str) -> None:
    found = document(License(), target=target, checkpoint={"repository": None, "revision": None})
    assert "licenses" not in found["metadata"]["component"]
    assert "purl" not in component(found, "checkpoint")


@pytest.mark.parametrize("name", SPDX)
def test_each_license_that_is_translated_is_one_of_spdx(name: str) -> None:
    assert document(License(name))["metadata"]["component"]["licenses"] == [{"license": {"id": SPDX[name]}}]


@pytest.mark.parametrize(
    "license",
    [
        License("other", "tongyi", "https://example.org/a"),
        License("other", "tongyi", "LICENSE"),
        License("other"),
        License("llama3"),
        License("other", "<x> & \u202e"),
        License("other", "n", "https://exa mple/ä"),
    ],
)
def test_other_licenses_are_named(license: License) -> None:
    (one,) = document(license)["metadata"]["component"]["licenses"]
    assert one["license"]["name"] == (license.name or license.id)
    assert ("url" in one["license"]) is (license.link or "").startswith("https://example")


@pytest.mark.parametrize("name", ["a b/ä", "x" * 5000, '"', "\u202e", "<b>"])
def test_names_of_any_kind_keep_to_the_schema(name: str) -> None:
    document(checkpoint={"name": name})
    document(files={name: {"size": 1, "sha256": "2" * 64}})


def test_the_reference_library_reads_it() -> None:
    """It omits the model card, which it does not support."""
    content = document()
    content["metadata"]["component"].pop("modelCard")
    read = Bom.from_json(content)  # type: ignore[attr-defined]
    assert read.metadata.component.name == "Tiny-VL-fp32-genai"
    assert len(read.components) == len(content["components"])
