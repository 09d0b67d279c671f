"""The stand-alone pipeline's preprocessing of images, texts and settings is bit-identical to transformers."""

from __future__ import annotations

import json
import lzma
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from builder.checkpoint.load import open_checkpoint
from builder.reference.cases import SUITE
from builder.targets.clients import pipeline
from builder.targets.clients.pipeline import ImageError, ImageSettings, Settings, SettingsError, TextError
from builder.targets.config_files import pipeline_settings, vision_processor
from tests.helpers.checkpoints import MINIATURE, QWEN3_TOKENIZER

FOLDERS = (SUITE / "images", MINIATURE.parent / "heldout")
IMAGES = sorted(path for folder in FOLDERS for path in folder.iterdir() if path.suffix in (".png", ".jpg"))
OWN = {path.name: path for path in IMAGES}
# Sides that are halfway between two multiples, smaller than one, out of bounds either way, and primes.
AWKWARD = [
    (400, 600),
    (16, 16),
    (48, 80),
    (1, 1),
    (1, 200),
    (200, 1),
    (31, 33),
    (272, 208),
    (1009, 47),
    (7, 1303),
    (8000, 40),
]
AWKWARD += [(int(h), int(w)) for h, w in np.random.default_rng(5).integers(9, 420, (26, 2))]
MINI = ImageSettings(4096, 131072, 16, 2, 2, 255.0, (0.5,) * 3, (0.5,) * 3)
SETTINGS = {
    "miniature": MINI,
    "real": replace(MINI, min_pixels=65536, max_pixels=16777216),
    "another family": ImageSettings(
        3136,
        200704,
        14,
        1,
        3,
        255.0,
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    ),
}


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    file = tmp_path_factory.mktemp("settings") / "pipeline.json"
    file.write_text(pipeline_settings(open_checkpoint(MINIATURE), 4096), encoding="utf-8")
    return pipeline.read_settings(file)


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng((height, width)).integers(0, 256, (height, width, 3), np.uint8))


def upstream_processor(settings: ImageSettings) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels},
        patch_size=settings.patch_size,
        temporal_patch_size=settings.temporal_patch_size,
        merge_size=settings.merge_size,
        image_mean=list(settings.mean),
        image_std=list(settings.std),
    )


def assert_same_pixels(images: list[Image.Image], settings: ImageSettings) -> None:
    expected = upstream_processor(settings)(images=images, return_tensors="np")
    pixels, grids = pipeline.preprocess(images, settings)
    assert pixels.dtype == expected["pixel_values"].dtype == np.float32
    np.testing.assert_array_equal(grids, expected["image_grid_thw"])
    np.testing.assert_array_equal(pixels, expected["pixel_values"])


@pytest.mark.torch
@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_images_equal_upstreams(path: Path) -> None:
    from transformers.image_utils import load_image

    ours, upstream = pipeline.load_image(path), load_image(str(path))
    assert (ours.mode, ours.size, ours.tobytes()) == (upstream.mode, upstream.size, upstream.tobytes())
    assert_same_pixels([ours], MINI)


@pytest.mark.torch
@pytest.mark.parametrize("name", SETTINGS)
def test_pixel_values_equal_upstreams(name: str) -> None:
    sizes = AWKWARD if name == "miniature" else AWKWARD[::3]
    for size in sizes:
        assert_same_pixels([noise(*size)], SETTINGS[name])
    assert_same_pixels([noise(*size) for size in AWKWARD[:5]], SETTINGS[name])


@pytest.mark.torch
def test_token_ids_equal_upstreams(settings: Settings, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    real = tmp_path / "real"
    real.mkdir()
    shutil.copyfile(QWEN3_TOKENIZER / "tokenizer_config.json", real / "tokenizer_config.json")
    (real / "tokenizer.json").write_bytes(lzma.decompress((QWEN3_TOKENIZER / "tokenizer.json.xz").read_bytes()))
    texts = [
        "",
        "Read the number.",
        "  two  spaces ",
        "e\u0301 \u00e9 \U0001f642 数字\r\n\t",
        "<|im_end|> 12345 don't",
    ]
    for folder in (MINIATURE, real):
        upstream = AutoTokenizer.from_pretrained(folder)
        tokenizer = pipeline.load_tokenizer(folder / "tokenizer.json")
        for text in texts:
            for grids in ([], [[1, 4, 6]], [[1, 2, 2], [1, 8, 4]]):
                images = [f"<|vision_start|>{'<|image_pad|>' * (h * w // 4)}<|vision_end|>" for _, h, w in grids]
                turn = f"<|im_start|>user\n{''.join(images)}{text}<|im_end|>\n<|im_start|>assistant\n"
                ids = pipeline.encode(text, np.array(grids, np.int64).reshape(-1, 3), tokenizer, settings)
                assert ids.dtype == np.int64
                assert ids.tolist() == [upstream(turn)["input_ids"]]


@pytest.mark.torch
@pytest.mark.parametrize(
    "grids",
    [
        [],
        [(1, 4, 6)],
        [(1, 16, 4), (1, 2, 2)],
        [(1, 2, 8), (1, 8, 2), (1, 6, 6)],
        [(3, 4, 6), (1, 4, 4)],
    ],
    ids=str,
)
@pytest.mark.parametrize("between", [[], [11, 12, 13]], ids=["adjacent", "separate"])
def test_position_ids_equal_upstreams(
    grids: list[tuple[int, int, int]], between: list[int], settings: Settings
) -> None:
    import torch
    from transformers import AutoConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

    with torch.device("meta"):
        upstream: Any = Qwen3VLModel(AutoConfig.from_pretrained(MINIATURE))
    token = settings.image_token_id
    turn = [1, 2, 3]
    for t, h, w in grids:
        turn += [4065, *[token] * (t * h * w // 4), 4066, *between]
    ids, known = np.array([[*turn, 7, 8]], np.int64), np.array(grids, np.int64).reshape(-1, 3)
    expected, delta = upstream.get_rope_index(
        torch.from_numpy(ids), torch.from_numpy((ids == token).astype(np.int32)), torch.from_numpy(known)
    )
    positions, ours = pipeline.position_ids(ids, known, settings)
    assert positions.dtype == np.int64
    np.testing.assert_array_equal(positions, expected.numpy())
    assert ours == delta.item()


def test_images_at_the_end_of_a_prompt_have_positions(settings: Settings) -> None:
    ids = np.array([[5, *[settings.image_token_id] * 2]], np.int64)
    positions, delta = pipeline.position_ids(ids, np.array([[1, 2, 4]]), settings)
    assert positions[:, 0].tolist() == [[0, 1, 1], [0, 1, 1], [0, 1, 2]]
    assert delta == 0


def test_positions_need_as_many_image_tokens_as_features(settings: Settings) -> None:
    with pytest.raises(TextError, match="2 image tokens, but the images have 4"):
        pipeline.position_ids(np.array([[5, *[settings.image_token_id] * 2]]), np.array([[1, 4, 4]]), settings)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((400, 600), (384, 608)), ((16, 16), (64, 64)), ((2000, 2000), (352, 352)), ((8000, 40), (5120, 32))],
    ids=str,
)
def test_target_sizes(size: tuple[int, int], expected: tuple[int, int]) -> None:
    roomy = replace(MINI, max_pixels=2**24) if size[0] == 400 else MINI
    assert pipeline.target_size(*size, roomy) == expected


def test_an_image_that_is_too_long_is_rejected() -> None:
    with pytest.raises(ImageError, match="2010 x 10 pixels: one side is more than 200 times the other"):
        pipeline.target_size(10, 2010, MINI)


def huge_png() -> bytes:
    """A valid PNG of 57 bytes that declares 60,000 × 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    size = (60000).to_bytes(4, "big") * 2
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + bytes([8, 2, 0, 0, 0])) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "it is EPS, not one of"),
        (b"just some text", "cannot identify image file"),
        (b"", "cannot identify image file"),
        (OWN["plain.png"].read_bytes()[:5000], "truncated"),
        (OWN["photo.jpg"].read_bytes()[:5000], "truncated"),
        (huge_png(), "decompression bomb"),
        (None, "No such file"),
    ],
    ids=["eps", "text", "empty", "half a PNG", "half a JPEG", "bomb", "missing"],
)
def test_files_that_are_not_images_are_rejected(content: bytes | None, why: str, tmp_path: Path) -> None:
    file = tmp_path / "file.png"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ImageError, match=why) as caught:
        pipeline.load_image(file)
    assert str(file) in str(caught.value)


def test_settings_are_read_as_configure_writes_them(settings: Settings, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(MINIATURE)
    (tmp_path / "vision_processor.json").write_text(vision_processor(checkpoint), encoding="utf-8")
    assert pipeline.read_image_settings(tmp_path / "vision_processor.json") == MINI
    assert (settings.image_token_id, settings.eos_token_ids) == (checkpoint.image_token_id, (4058, 4056))
    assert (settings.deepstack, settings.hidden, settings.spatial_merge_size) == (3, 160, 2)


Edit = Callable[[list[dict[str, Any]]], object]


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (lambda steps: steps.pop(2), "not a complete list"),
        (lambda steps: steps.append(steps[0]), "expected the step None, found .*DecodeImage"),
        (lambda steps: steps.reverse(), "expected the step .*DecodeImage|not a complete list"),
        (lambda steps: steps[2]["attrs"].update(interpolation="LINEAR"), "CUBIC.*LINEAR"),
        (lambda steps: steps[2]["attrs"].update(smart_resize=0), "smart_resize"),
        (lambda steps: steps[2]["attrs"].update(patch_size=14), "'patch_size': 16.*'patch_size': 14"),
        (lambda steps: steps[2]["attrs"].update(keep_aspect_ratio=1), "keep_aspect_ratio"),
        (lambda steps: steps[-1]["attrs"].update(patch_size="16"), "patch_size must be of type int"),
        (lambda steps: steps[-1]["attrs"].update(temporal_patch_size=0), "a size is out of bounds"),
        (lambda steps: steps[-2]["attrs"].update(std=[0.5, 0.0, 0.5]), "mean and std"),
        (lambda steps: steps[-2]["attrs"].update(mean=[0.5]), "mean and std"),
        (lambda steps: steps[-2]["attrs"].update(mean=["a", "b", "c"]), "mean must be of type"),
        (lambda steps: steps[-2]["attrs"].pop("qwen3_vl"), "qwen3_vl"),
    ],
)
def test_unsupported_image_settings_are_rejected(edit: Edit, why: str, tmp_path: Path) -> None:
    document = json.loads(vision_processor(open_checkpoint(MINIATURE)))
    steps = [transform["operation"] for transform in document["processor"]["transforms"]]
    edit(steps)
    document["processor"]["transforms"] = [{"operation": step} for step in steps]
    file = tmp_path / "vision_processor.json"
    file.write_text(json.dumps(document))
    with pytest.raises(SettingsError, match=f"(?s)vision_processor.json.*({why})"):
        pipeline.read_image_settings(file)


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        ({"max_length": "4096"}, "max_length must be of type int"),
        ({"deepstack": True}, "deepstack must be of type int"),
        ({"eos_token_ids": ["4058"]}, "eos_token_ids must be of type"),
        ({"max_lenght": 1}, "max_lenght"),
        ({"prompt": {"prefix": "", "suffix": ""}}, "expected the keys .*'image'"),
        ({"prompt": "hello"}, "does not define the prompt format"),
    ],
    ids=str,
)
def test_invalid_settings_are_rejected(edit: dict[str, Any], why: str, tmp_path: Path) -> None:
    file = tmp_path / "pipeline.json"
    file.write_text(json.dumps(json.loads(pipeline_settings(open_checkpoint(MINIATURE), 64)) | edit))
    with pytest.raises(SettingsError, match=f"pipeline.json.*{why}"):
        pipeline.read_settings(file)


@pytest.mark.parametrize("text", ["see <|image_pad|>", "<|video_pad|>", "lone \udc80 surrogate"])
def test_invalid_texts_are_rejected(text: str, settings: Settings) -> None:
    tokenizer = pipeline.load_tokenizer(MINIATURE / "tokenizer.json")
    with pytest.raises(TextError, match=r"the text (contains <\|(image|video)_pad\|>|is not Unicode)"):
        pipeline.encode(text, np.zeros((0, 3), np.int64), tokenizer, settings)


def test_text_streams_in_complete_characters() -> None:
    tokenizer = pipeline.load_tokenizer(MINIATURE / "tokenizer.json")
    text = "a 🙂 b, 你好 ünïcode\n🙂🙂"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    pieces = list(pipeline.stream(tokenizer, ids))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(ids) > len(text) > len([piece for piece in pieces if piece]) > 10
    cut = list(pipeline.stream(tokenizer, [*ids[:-1], 4058]))
    assert "".join(cut) == tokenizer.decode([*ids[:-1], 4058]) == text[:-1] + "\ufffd"
