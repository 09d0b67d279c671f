"""Execution providers: recipes without kernels are rejected, and settings select the provider."""

from __future__ import annotations

from typing import get_args

import pytest

from builder.checkpoint.tensors import EMBEDDINGS, LM_HEAD
from builder.quantization.rules import Rule
from builder.targets.providers import PROVIDERS, Name, Precision, check_provider, session_options
from builder.util.errors import RecipeError

INT8 = Rule(("model.visual.*",), "int8")


@pytest.mark.parametrize("name", get_args(Name))
@pytest.mark.parametrize("precision", get_args(Precision))
def test_only_cuda_supports_bf16(name: Name, precision: Precision) -> None:
    if precision != "bf16" or name == "cuda":
        check_provider(name, precision, (), "mine.toml")
        return
    with pytest.raises(RecipeError, match=f"mine.toml: the provider {name} does not compute in bf16") as caught:
        check_provider(name, precision, (), "mine.toml")
    assert caught.value.expected == "fp32 or fp16"
    assert caught.value.next == 'provider = "cuda"'


def test_dml_has_no_8_bit_matmul() -> None:
    for name in ("cpu", "cuda", "webgpu"):
        check_provider(name, "fp16", [INT8], "mine.toml")
    with pytest.raises(RecipeError, match="dml has no MatMulNBits for int8") as caught:
        check_provider("dml", "fp16", [Rule(("*",), "int4"), INT8], "mine.toml")
    assert caught.value.found == "int8 for model.visual.*"
    assert 'store = "int4"' in str(caught.value.next)


@pytest.mark.parametrize(
    ("rule", "able"),
    [
        pytest.param(Rule((EMBEDDINGS,), "int8"), True, id="lookup only"),
        pytest.param(Rule((EMBEDDINGS, LM_HEAD), "int8"), False, id="lookup and matmul"),
        pytest.param(Rule(("model.visual.*",), "keep"), True, id="kept"),
        pytest.param(Rule(("model.visual.*",), "int4"), True, id="4 bits"),
    ],
)
def test_dml_accepts_8_bits_outside_of_matmuls(rule: Rule, able: bool) -> None:
    if able:
        check_provider("dml", "fp16", [rule], "mine.toml")
    else:
        with pytest.raises(RecipeError, match="int8"):
            check_provider("dml", "fp16", [rule], "mine.toml")


def test_cpu_has_no_provider_options_and_counts_its_cores() -> None:
    assert session_options("cpu") == {
        "log_id": "onnxruntime-genai",
        "intra_op_num_threads": 0,
        "provider_options": [],
    }


@pytest.mark.parametrize("name", ["cuda", "dml", "webgpu"])
def test_other_providers_have_options(name: Name) -> None:
    options = session_options(name)
    assert options["provider_options"] == [{name: dict(PROVIDERS[name].options)}]
    assert "intra_op_num_threads" not in options


@pytest.mark.parametrize(("name", "on_cpu"), [("cpu", True), ("cuda", False), ("dml", True), ("webgpu", False)])
def test_quantized_rows_are_looked_up_on_a_provider_with_the_kernel(name: Name, on_cpu: bool) -> None:
    own, cpu = session_options(name), session_options("cpu")
    assert session_options(name, lookup=True) == (cpu if on_cpu else own)
    assert session_options(name, lookup=False) == own


def test_options_are_copies() -> None:
    session_options("cuda")["provider_options"][0]["cuda"]["enable_cuda_graph"] = "1"
    assert session_options("cuda")["provider_options"][0]["cuda"]["enable_cuda_graph"] == "0"
