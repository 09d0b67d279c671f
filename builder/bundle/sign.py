"""A signature that anybody can check offline: OpenSSF's model signing, with a key of one's own.

In: a bundle, a private key in a file (PEM, elliptic curve P-256, P-384 or P-521). Out: `model.sig` in the bundle, over
all its files but evidence/, which every later verification writes. Guaranteed: no network, no account, no log: of
`model-signing` only its keys are used. `model_signing verify key BUNDLE --signature BUNDLE/model.sig --public_key KEY
--ignore-paths BUNDLE/evidence` checks the signature without this tool.
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
    "make a pair: openssl ecparam -name prime256v1 -genkey -noout -out key.pem; "
    "openssl ec -in key.pem -pubout -out key.pub"
)
MAX_KEY = 64 * 2**10  # bytes of a PEM file


def sign(content: Content, key: Path) -> Path:
    """Sign the bundle's files, which must have been checked; returns the signature's path.

    Raises:
        SignatureError: `key` is no private key that can sign.
        MissingPackageError: the extra [sign] is not installed.
    """
    _check_key(key, "a private key")
    path = content.folder / SIGNATURE
    with _needs_package():
        from model_signing import signing
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=key)
    except Exception as error:  # cryptography's many
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
        raise OutputError(f"{path} cannot be written", found=error.strerror or error, next="mend it") from error
    return path


def check_signature(content: Content, key: Path) -> None:
    """That the bundle is signed by the private key of the public key in the file `key`.

    Raises:
        SignatureError: no signature, one of another key, or of other files.
        MissingPackageError: the extra [sign] is not installed.
    """
    if not content.signed:
        raise SignatureError(
            f"{content.folder} is not signed",
            expected=f"{SIGNATURE}, by the key {key}",
            found="no such file",
            next="qwen3vl-onnx sign BUNDLE --key PRIVATE_KEY, where it was built",
        )
    _check_key(key, "a public key")
    with _needs_package():
        from model_signing import verifying
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=key)
    except Exception as error:
        raise SignatureError(
            f"{key} is no public key",
            expected="an elliptic-curve public key in PEM",
            found=f"{type(error).__name__}: {error}",
            next="openssl ec -in PRIVATE_KEY -pubout -out PUBLIC_KEY",
        ) from error
    try:
        config.set_hashing_config(_signed_files()).verify(content.folder, content.folder / SIGNATURE)
    except Exception as error:  # whatever a signature that someone wrote makes of its reader
        raise SignatureError(
            f"{SIGNATURE} is no signature of {content.folder} by {key}",
            expected="every file but evidence/, signed by that key",
            found=f"{type(error).__name__}: {error}".rstrip(": "),
            next=OTHERWISE,
        ) from error


def _signed_files() -> hashing.Config:
    from model_signing import hashing

    unsigned = [Path(one) for one in (SIGNATURE, f"{SIGNATURE}.part", EVIDENCE, ".cache")]
    return hashing.Config().use_file_serialization().set_ignored_paths(paths=unsigned)


def _check_key(key: Path, kind: str) -> None:
    """The libraries would read a device to its end."""
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
