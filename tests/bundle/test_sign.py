"""A signature is of these files and this key, needs no network, and is not needed."""

from __future__ import annotations

import builtins
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from typer.testing import CliRunner, Result

from builder.cli.app import app
from tests.helpers.bundles import DATA, edit_manifest, graph, relisted, small_bundle

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object, **named: object) -> None:
        raise AssertionError("it asks the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """(private, public)."""
    return pair(tmp_path / "mine", ec.generate_private_key(ec.SECP256R1()))


def pair(path: Path, key: PrivateKey, password: bytes | None = None) -> tuple[Path, Path]:
    hidden = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    private, public = path.with_suffix(".pem"), path.with_suffix(".pub")
    private.write_bytes(key.private_bytes(pem, pkcs8, hidden))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def signed(tmp_path: Path, keys: tuple[Path, Path]) -> Path:
    folder = small_bundle(tmp_path / "genai")
    result = invoke("sign", folder, "--key", keys[0])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(folder / "model.sig")
    return folder


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments])


def refused(*arguments: object, code: int = 27) -> dict[str, Any]:
    result = invoke(*arguments, "--json")
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_what_was_signed_holds_with_its_key(signed: Path, keys: tuple[Path, Path]) -> None:
    done = invoke("check", signed, "--key", keys[1], "--json")
    assert json.loads(done.stdout)["signature"] == "holds"
    assert json.loads(invoke("check", signed, "--json").stdout)["signature"] == "not checked"
    assert "not checked: no --key" in invoke("check", signed).stdout


def test_another_name_another_verification_and_a_second_signature_are_fine(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(signed, tmp_path / "elsewhere" / "other"))
    (moved / "evidence" / "report.md").write_text("compared again")
    (moved / ".gitattributes").write_text("*.data filter=lfs\n")
    assert invoke("check", moved, "--key", keys[1]).exit_code == 0
    assert invoke("sign", moved, "--key", keys[0]).exit_code == 0
    assert invoke("check", moved, "--key", keys[1]).exit_code == 0


@pytest.mark.seconds
def test_another_tool_verifies_it(signed: Path, keys: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(signed)]
    options = ["--signature", signed / "model.sig", "--public_key", keys[1], "--ignore-paths", signed / "evidence"]
    done = subprocess.run([*command, *map(str, options)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_signature_says_nothing_of_this_machine(signed: Path, tmp_path: Path) -> None:
    import base64

    told = json.loads((signed / "model.sig").read_text())
    payload = base64.b64decode(told["dsseEnvelope"]["payload"]).decode()
    assert str(tmp_path) not in payload
    listed = {one["name"] for one in json.loads(payload)["predicate"]["resources"]}
    assert {"manifest.json", "model.onnx", DATA} <= listed
    assert not [name for name in listed if name.startswith("evidence")]


def test_a_bundle_that_someone_made_consistent_again_is_told(signed: Path, keys: tuple[Path, Path]) -> None:
    """Other weights, and a manifest that names them: only a signature tells."""
    graph(signed / "model.onnx", seed=1)
    relisted(signed)
    assert invoke("check", signed).exit_code == 0
    error = refused("check", signed, "--key", keys[1])
    assert "model.sig" in error["what"]
    assert "manifest.json" in error["found"]


def test_a_file_that_the_signature_lacks_is_told(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / "more.txt").write_text("x")
    relisted(signed)
    assert "more.txt" in refused("check", signed, "--key", keys[1])["found"]


def test_another_key_and_no_signature_are_refused(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    _, other = pair(tmp_path / "other", ec.generate_private_key(ec.SECP256R1()))
    assert "model.sig" in refused("check", signed, "--key", other)["what"]
    (signed / "model.sig").unlink()
    assert "is not signed" in refused("check", signed, "--key", keys[1])["what"]


SPOILT: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "no JSON": lambda content: b"{",
    "a list": lambda content: b"[]",
    "an empty object": lambda content: b"{}",
    "half": lambda content: content[: len(content) // 2],
    "another payload": lambda content: content.replace(b'"payload":"', b'"payload":"AAAA'),
    "deep": lambda content: b'{"a":' * 100_000,
    "no bytes of text": lambda content: b"\xff\xfe" * 100,
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_signature_is_refused(signed: Path, keys: tuple[Path, Path], name: str) -> None:
    path = signed / "model.sig"
    path.write_bytes(SPOILT[name](path.read_bytes()))
    assert "model.sig" in refused("check", signed, "--key", keys[1])["what"]


def test_keys_of_another_kind_are_refused(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    curve = ec.generate_private_key(ec.SECP256R1())
    other = {
        "rsa": pair(tmp_path / "rsa", rsa.generate_private_key(65537, 2048)),
        "ed25519": pair(tmp_path / "ed", ed25519.Ed25519PrivateKey.generate()),
        "curve": pair(tmp_path / "k1", ec.generate_private_key(ec.SECP256K1())),
        "missing": (tmp_path / "no.pem", tmp_path / "no.pub"),
        "a folder": (tmp_path, tmp_path),
        "a device": (Path("/dev/zero"), Path("/dev/zero")),
        "text": (signed / "chat_template.jinja", signed / "chat_template.jinja"),
        "with a password": (pair(tmp_path / "pw", curve, b"secret")[0], keys[0]),
        "the wrong half": (keys[1], keys[0]),
    }
    for name, (private, public) in other.items():
        for command, key in (("sign", private), ("check", public)):
            error = refused(command, signed, "--key", key)
            assert str(key) in error["what"], name
            assert "openssl" in error["next"], name


def test_what_is_broken_is_not_signed(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    folder = small_bundle(tmp_path / "genai")
    edit_manifest(folder, lambda content: content.update(opset=19))
    refused("sign", folder, "--key", keys[0], code=21)
    assert not (folder / "model.sig").exists()


def test_without_the_package_only_a_key_is_refused(
    signed: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = builtins.__import__

    def absent(name: str, *more: Any, **named: Any) -> Any:
        if name.partition(".")[0] == "model_signing":
            raise ModuleNotFoundError("No module named 'model_signing'", name="model_signing")
        return kept(name, *more, **named)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert invoke("check", signed).exit_code == 0
    for command, key in (("check", keys[1]), ("sign", keys[0])):
        assert refused(command, signed, "--key", key, code=22)["next"] == 'pip install "qwen3vl-onnx[sign]"'
