"""Sign a bundle, and check a signature offline, with OpenSSF's model-signing and a key of your own.

`model.sig` covers all files except evidence/, which later verifications write. Only key files are used: no network,
account or transparency log. Private keys are PEM files of the elliptic curves P-256, P-384 or P-521.

Example: check a signature without this tool.
    model_signing verify key BUNDLE --signature BUNDLE/model.sig --public_key KEY --ignore-paths BUNDLE/evidence
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from builder.bundle.inventory import SIGNATURE, Content
from builder.bundle.layout import EVIDENCE, OTHERWISE
from builder.util.errors import MissingPackageError, OutputError, SignatureError
from builder.util.files import atomic_write

if TYPE_CHECKING:
    from model_signing import hashing

MAKE_KEY = (
    "create a key pair: openssl ecparam -name prime256v1 -genkey -noout -out key.pem; "
    "openssl ec -in key.pem -pubout -out key.pub"
)
MAX_KEY = 64 * 2**10  # bytes of a PEM file


def sign(content: Content, key: Path) -> Path:
    """Sign the files of a checked bundle, and return the signature's path.

    Raises:
        SignatureError: `key` is not a private key that can sign.
        OutputError: the signature cannot be written.
        MissingPackageError: the extra [sign] is not installed.
    """
    _check_key(key, "a private key")
    path = content.folder / SIGNATURE
    with _needs_package():
        from model_signing import signing
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=key)
    except Exception as error:  # cryptography raises many types
        raise SignatureError(
            f"{key} cannot sign",
            expected="an elliptic-curve private key in PEM, without a password",
            found=f"{type(error).__name__}: {error}",
            next=MAKE_KEY,
        ) from error
    try:
        with atomic_write(path) as part:
            config.set_hashing_config(_signed_files()).sign(content.folder, part)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written", found=error.strerror or error, next="check its permissions and the free space"
        ) from error
    return path


def check_signature(content: Content, key: Path) -> None:
    """Check that the bundle is signed with the private key that matches the public key in the file `key`.

    Raises:
        SignatureError: there is no signature, or it is of another key or of other files.
        MissingPackageError: the extra [sign] is not installed.
    """
    if not content.signed:
        raise SignatureError(
            f"{content.folder} is not signed",
            expected=f"{SIGNATURE}, made with the private key of {key}",
            found="no such file",
            next="where it was built: qwen3vl-onnx sign BUNDLE --key PRIVATE_KEY",
        )
    _check_key(key, "a public key")
    with _needs_package():
        from model_signing import verifying
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=key)
    except Exception as error:
        raise SignatureError(
            f"{key} is not a public key",
            expected="an elliptic-curve public key in PEM",
            found=f"{type(error).__name__}: {error}",
            next="openssl ec -in PRIVATE_KEY -pubout -out PUBLIC_KEY",
        ) from error
    try:
        config.set_hashing_config(_signed_files()).verify(content.folder, content.folder / SIGNATURE)
    except Exception as error:  # a malformed signature can raise anything
        raise SignatureError(
            f"{SIGNATURE} is not a signature of {content.folder} by {key}",
            expected="every file but evidence/, signed by that key",
            found=f"{type(error).__name__}: {error}".rstrip(": "),
            next=OTHERWISE,
        ) from error


def _signed_files() -> hashing.Config:
    from model_signing import hashing

    unsigned = [Path(name) for name in (SIGNATURE, f"{SIGNATURE}.part", EVIDENCE, ".cache")]
    return hashing.Config().use_file_serialization().set_ignored_paths(paths=unsigned)


def _check_key(key: Path, kind: str) -> None:
    """Refuse what is not a small file: the libraries would read a device forever."""
    if not key.is_file() or key.stat().st_size > MAX_KEY:
        raise SignatureError(
            f"{key} is not {kind}",
            expected="a PEM file",
            found="a large file" if key.is_file() else "no file",
            next=MAKE_KEY,
        )


@contextmanager
def _needs_package() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"signatures need {error.name}, which is not installed", next='pip install "qwen3vl-onnx[sign]"'
        ) from error
