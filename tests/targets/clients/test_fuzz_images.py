"""Files that are not images, are damaged or declare a huge size: an `ImageError` in bounded time and memory."""

from __future__ import annotations

import io
import os
import random
import struct
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from builder.reference.cases import IMAGES as SHIPPED
from builder.targets.clients import pipeline
from builder.targets.clients.pipeline import load_image
from builder.util.errors import ImageError
from tests.helpers.hostile import mutated, outcome, record_counts
from tests.helpers.processes import ROOT

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

SAMPLES = 3000
# Twice the memory of an image of the maximum size, as conversion to another mode needs a second copy.
MOST_MEMORY = 800 * 2**20
SEEDS = sorted(file for file in SHIPPED.iterdir() if file.suffix in (".png", ".jpg"))
# Reads an image in a process that is limited to the memory of its imports and `MOST_MEMORY`.
SCRIPT = """
import resource, sys, time, psutil
from pathlib import Path
from builder.targets.clients.pipeline import ImageError, load_image
most = psutil.Process().memory_info().vms + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (most, most))
before = time.process_time()
try:
    print(load_image(Path(sys.argv[1])).size)
except ImageError as error:
    print("refused:", str(error)[:200])
assert time.process_time() - before < 10
"""
# Valid images of almost the maximum size; the sides of the second are rejected later, see `target_size`.
VALID = {"PNG of 89 megapixels, RGBA", "PNG, one row of 80 million"}


def png(width: int, height: int, color: int, rows: int = 4, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that declares this size and has `rows` rows of zeros."""
    channels = {0: 1, 2: 3, 3: 1, 6: 4}[color]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = b"\0" * (1 + width * channels)
    data = b"".join(packer.compress(row) for _ in range(rows)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)
    extra = b"".join(chunk(*entry) for entry in chunks)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _text_bomb() -> tuple[bytes, bytes]:
    return b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 200_000_000, 9)


# Headers that declare more than the file contains, and other invalid files.
IMAGES: Mapping[str, Callable[[], bytes]] = {
    "PNG of 65535²": lambda: png(65535, 65535, 2),
    "PNG of 2^31 - 1": lambda: png(2**31 - 1, 2**31 - 1, 0, 0),
    "PNG of 0 rows": lambda: png(16, 0, 2),
    "PNG, one row of 80 million": lambda: png(80_000_000, 1, 0, 1),
    "PNG of 90 megapixels": lambda: png(10_000, 9000, 2, 9000),
    "PNG of 89 megapixels, RGBA": lambda: png(9400, 9400, 6, 9400),
    "PNG with a text of 200 MB": lambda: png(64, 64, 2, 64, _text_bomb()),
    "PNG with a profile of 200 MB": lambda: png(64, 64, 2, 64, (b"iCCP", _text_bomb()[1])),
    "BMP of 2^31": lambda: b"BM"
    + struct.pack("<IHHIIiiHH", 54, 0, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 24)
    + b"\0" * 24,
    "GIF of 65535²": lambda: b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + b"\0" * 6
    + b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\2\2\x4c\1\0;",
    "PPM of 10^9": lambda: b"P6 1000000000 1000000000 255\n\0\0\0",
    "PPM of 10,000 digits": lambda: b"P6 " + b"9" * 10_000 + b" 9 255\n\0\0\0",
    "JPEG of 65535²": lambda: b"\xff\xd8\xff\xc0\0\x11\x08\xff\xff\xff\xff\3\1\x11\0\2\x11\0\3\x11\0\xff\xda",
    "TIFF in a circle": lambda: b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    "TIFF of 2^32": lambda: b"II*\0\x08\0\0\0\4\0" + b"".join(
        struct.pack("<HHII", tag, 4, 1, value)
        for tag, value in ((256, 2**32 - 1), (257, 2**32 - 1), (262, 2), (273, 8))
    ) + b"\0" * 4,
    "WebP, truncated": lambda: b"RIFF\xff\xff\xff\x7fWEBPVP8L\xff\xff\xff\x7f/\xff\xff\xff\xff",
    "SVG": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "EPS": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "empty": lambda: b"",
    "zeros": lambda: b"\0" * 100_000,
}  # fmt: skip


def read(path: Path) -> None:
    """Read an image as `builder.bundle.generate` does."""
    try:
        load_image(path)
    except pipeline.ImageError as error:
        raise ImageError(str(error)) from error


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.seconds
def test_huge_and_invalid_files(tmp_path: Path, name: str) -> None:
    file = tmp_path / "image"
    file.write_bytes(IMAGES[name]())
    command = [sys.executable, "-c", SCRIPT, str(file), str(MOST_MEMORY)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(" if name in VALID else "refused:"), done.stdout
    assert "MemoryError" not in done.stderr


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda path: path.mkdir(), id="a folder"),
        pytest.param(os.mkfifo, id="a pipe"),
        pytest.param(lambda path: path.symlink_to("/dev/zero"), id="a device"),
        pytest.param(lambda path: path.symlink_to(path), id="a link in a circle"),
        pytest.param(lambda path: None, id="nothing"),
    ],
)
def test_special_files(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "image")
    assert outcome(lambda: read(tmp_path / "image")) == "ImageError"


def others() -> list[bytes]:
    """Small images in the formats that are not among the shipped ones."""
    from PIL import Image

    images = []
    for kind in ("GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000"):
        stream = io.BytesIO()
        Image.new("RGB", (9, 7), (1, 2, 3)).save(stream, kind)
        images.append(stream.getvalue())
    return images


def fuzzed(folder: Path, seed: int, contents: list[bytes]) -> str:
    """Read an image with a few changed bytes; return its format and the outcome."""
    file = folder / "image"
    content = contents[seed % len(contents)]
    file.write_bytes(mutated(content, random.Random(seed)))
    try:
        return f"bytes of a {content[:4]!r}: {outcome(lambda: read(file))}"
    except BaseException as error:
        error.add_note(f"image {seed % len(contents)}, seed {seed}")
        raise


@pytest.fixture(scope="module")
def contents() -> list[bytes]:
    small = sorted((file.read_bytes() for file in SEEDS), key=len)[:6]
    assert len(small) == 6
    return [*small, *others()]


def test_a_few_random_changes(tmp_path: Path, contents: list[bytes]) -> None:
    counts = Counter(fuzzed(tmp_path, seed, contents) for seed in range(120))
    assert sum(count for what, count in counts.items() if not what.endswith("accepted")) > 20


@pytest.mark.slow
def test_many_random_changes(
    tmp_path: Path, contents: list[bytes], record_property: Callable[[str, object], None]
) -> None:
    record_counts(Counter(fuzzed(tmp_path, seed, contents) for seed in range(1000, 1000 + SAMPLES)), record_property)
