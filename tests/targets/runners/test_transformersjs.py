"""The target `transformersjs` in transformers.js: under Node.js, and on the demo page in Chromium.

Without Node.js, its packages or the browser, these tests are skipped; in a run of all tests (`make test-full`) they
fail.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest

from builder.bundle.generate import answer
from builder.checkpoint.load import open_checkpoint
from builder.checkpoint.parts import DECODER, EMBEDDINGS, VISION
from builder.reference.cases import Case, Suite, held_out, shipped_cases
from builder.reference.model import Reference
from builder.stages.engine.dry_run import described
from builder.stages.engine.estimate import graph_bytes
from builder.targets.recipe import Target
from builder.targets.recipe_file import load_recipe
from builder.targets.runners import node
from builder.targets.runners.registry import open_runner
from builder.targets.transformersjs import NAME, layout
from builder.verify.report.gates import Report
from builder.verify.self_test import mutations
from builder.verify.whole import verify
from tests.conftest import Built
from tests.helpers.checkpoints import MINIATURE
from tests.helpers.chromium import Page, browser, chromium, served
from tests.helpers.shown import shown

pytestmark = pytest.mark.torch  # to build the bundle
TOKENS = 16
ANSWER = "document.getElementById('answer')"
STATUS = "document.getElementById('status').textContent"


def needed(request: pytest.FixtureRequest, why: str | None) -> None:
    """Skip a test that cannot run here, or fail it in a run of all tests."""
    if why is not None:
        (pytest.fail if request.config.getoption("markexpr") == "" else pytest.skip)(why)


@pytest.fixture(autouse=True)
def npm_packages(request: pytest.FixtureRequest) -> None:
    needed(request, node.missing())


@pytest.fixture
def page_needed(request: pytest.FixtureRequest) -> None:
    needed(request, None if chromium() else "Chromium is not installed: apt-get install chromium")


@pytest.fixture(scope="module")
def bundle(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`bundle(like)`: the miniature built by a shipped recipe for this target; tests must not change it."""
    folder = tmp_path_factory.mktemp("recipes")

    def built_like(like: str) -> Path:
        file = folder / f"{like}-js.toml"
        file.write_text(f'like = "{like}"\ntargets = ["{NAME}"]\nprovider = "cpu"\n')
        return built(MINIATURE, load_recipe(file)) / NAME

    return built_like


def verified(folder: Path, reference: Reference, *names: str) -> Report:
    cases = tuple(case for case in shipped_cases() if case.name in names)
    return verify(folder, NAME, reference, Suite(cases, tokens=TOKENS))


def test_it_equals_pytorch(bundle: Callable[[str], Path], reference: Reference) -> None:
    report = verified(bundle("fp32"), reference, "text", "one image", "wide, tall")
    assert report.ok, shown(report)
    counts = {place: sum(gate.place == place for gate in report.gates) for place in ("tokens", "pixel values")}
    own = [gate for gate in report.gates if gate.place in ("tokens of the runtime's pixels", "runtime's pixel values")]
    assert counts == {"tokens": 4, "pixel values": 2}  # three cases, and their near ties
    assert [gate.measured for gate in own] == [0, 0]
    assert report.facts["skipped"] == {
        "wide, tall": "not run through the runtime's own processor, which takes 1 image per prompt"
    }
    versions = report.facts["versions"]
    assert isinstance(versions, dict)
    assert {node.LIBRARY, node.RUNTIME, "Node.js"} <= versions.keys()


def test_zeroed_deepstack_fails(bundle: Callable[[str], Path], reference: Reference, tmp_path: Path) -> None:
    broken = Path(copytree(bundle("fp32"), tmp_path / "broken"))
    mutations.deepstack_zeroed(broken, NAME)
    report = verified(broken, reference, "one image")
    assert report.first_failure is not None
    assert report.first_failure.place == "deepstack features"
    assert not next(gate for gate in report.gates if gate.place == "tokens").ok


@pytest.mark.parametrize("role", [VISION, EMBEDDINGS, DECODER])
def test_a_dry_run_estimates_the_size_of_each_graphs_data(bundle: Callable[[str], Path], role: str) -> None:
    rows = graph_bytes(described(open_checkpoint(MINIATURE)), (NAME,))
    (size,) = (row.data_bytes for row in rows if row.graph == f"{role}.onnx")
    assert (bundle("fp32") / layout(role, load_recipe("fp32")).data).stat().st_size == size


def test_a_bundle_streams_its_answer(bundle: Callable[[str], Path]) -> None:
    case = next(case for case in held_out(open_checkpoint(MINIATURE)) if len(case.images) == 1)
    pieces: list[str] = []
    result = answer(bundle("fp32"), case.prompt, case.images, max_new_tokens=TOKENS, on_text=pieces.append)
    assert result.text == case.answer == "".join(pieces)
    assert len(pieces) > 1


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["deepstack0", "untied"])
def test_other_shapes_equal_pytorch(checkpoint: Callable[[str], Path], built: Built, shape: str) -> None:
    """Without DeepStack the packed axis is the hidden axis; untied, each matrix is in one file."""
    folder, recipe = checkpoint(shape), replace(load_recipe("fp32"), targets=(Target(NAME, "fused"),))
    report = verified(built(folder, recipe) / NAME, Reference(open_checkpoint(folder)), "text", "one image")
    assert report.ok, shown(report)
    assert sum(gate.place == "tokens" for gate in report.gates) == 3


@pytest.mark.slow
@pytest.mark.parametrize("like", ["fp16", "int8", "int4-fast", "int4-webgpu"])
def test_lossy_recipes_keep_held_out_accuracy(bundle: Callable[[str], Path], like: str) -> None:
    """The miniature answers 36 held-out questions correctly in fp32; recipes allow it to lose one."""
    cases, runner = held_out(open_checkpoint(MINIATURE)), open_runner(bundle(like), NAME)
    answers = [runner.text(list(runner.tokens(runner.prepare(case.prompt, case.images), 16))) for case in cases]
    assert sum(text == case.answer for text, case in zip(answers, cases, strict=True)) >= 35


def one_image(reference: Reference) -> list[Case]:
    """The held-out questions with one image, all of which need resizing."""
    return [case for case in held_out(reference.checkpoint) if len(case.images) == 1]


def answer_on_the_page(page: Page, case: Case) -> tuple[list[int], str]:
    """Ask a question on the page; return the tokens and the text of the answer."""
    if case.images:
        page.choose("#image", case.images[0])
    page.value(f"document.getElementById('question').value = {json.dumps(case.prompt)}")
    page.value(f"document.getElementById('most').value = {TOKENS}; document.getElementById('ask').click()")
    page.until("document.body.dataset.state === 'ready'")
    tokens = page.value(f"{ANSWER}.dataset.tokens")
    assert tokens is not None, page.value(STATUS)
    return json.loads(tokens), page.value(f"{ANSWER}.textContent")


def folders(bundle: Path) -> dict[str, Path]:
    return {"bundle": bundle, "node_modules": node.packages() / "node_modules"}


@pytest.mark.slow
@pytest.mark.usefixtures("page_needed")
@pytest.mark.parametrize(("device", "most"), [("wasm", None), ("webgpu", 8)])
def test_the_demo_equals_pytorch(
    bundle: Callable[[str], Path],
    reference: Reference,
    record_property: Callable[[str, object], None],
    tmp_path: Path,
    device: str,
    most: int | None,
) -> None:
    """Each question with an image, and one without; only a few on WebGPU, whose software adapter is slow."""
    without_image = next(case for case in shipped_cases() if case.name == "text")
    cases = [without_image, *one_image(reference)[:most]]
    with served(folders(bundle("fp32"))) as (url, requested), browser(webgpu=device == "webgpu") as page:
        page.open(f"{url}/bundle/demo/index.html?device={device}")
        for case in cases:
            tokens, text = answer_on_the_page(page, case)
            want = reference.generate(reference.prepare(case.prompt, case.images), TOKENS).tokens
            assert tokens == list(want), case.name
            assert text.strip() == reference.text(want).strip()
        page.image(tmp_path / "demo.png")
    record_property("cases", len(cases))
    assert all(path.split("/")[1] in ("bundle", "node_modules") for path in requested)
    assert any(path.endswith("asyncify.wasm") for path in requested) == (device == "webgpu")
    assert (tmp_path / "demo.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.usefixtures("page_needed")
def test_the_demo_answers_in_4_bits_on_webgpu(bundle: Callable[[str], Path], reference: Reference) -> None:
    cases = one_image(reference)[:3]
    with served(folders(bundle("int4"))) as (url, _), browser(webgpu=True) as page:
        page.open(f"{url}/bundle/demo/index.html?device=webgpu")
        assert [answer_on_the_page(page, case)[1].strip() for case in cases] == [case.answer for case in cases]


@pytest.mark.parametrize(("device", "why"), [("webgpu", "offers no WebGPU here"), ("cuda", "are wasm and webgpu")])
@pytest.mark.usefixtures("page_needed")
def test_an_unavailable_device_is_reported(bundle: Callable[[str], Path], device: str, why: str) -> None:
    with served(folders(bundle("fp32"))) as (url, _), browser() as page:
        page.open(f"{url}/bundle/demo/index.html?device={device}")
        page.value("document.getElementById('ask').click()")
        page.until("document.body.dataset.state === 'ready'")
        assert why in page.value(STATUS)
