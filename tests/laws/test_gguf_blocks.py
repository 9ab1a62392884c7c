"""Blocks hold exactly our integers, as the gguf package reads them; RoPE and row order are Transformers' own."""

from __future__ import annotations

import math
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from spinfold.errors import SpinfoldError
from spinfold.export.gguf_blocks import block_kind, fits_blocks, pack, round_to_q8_0, unpack
from spinfold.export.gguf_config import rope
from spinfold.export.gguf_writer import permute
from spinfold.formats import IntFormat, QuantizedWeight
from spinfold.networks.gguf_reader import unpermute

ROWS, COLUMNS = 6, 192
FORMATS = [
    IntFormat(bits, symmetric, group_size)
    for bits, symmetric in ((4, True), (8, True), (4, False), (2, True), (5, True), (3, False))
    for group_size in (32, 96, None)
]


def random_weight(fmt: IntFormat, seed: int, scale_dtype: torch.dtype = torch.float32) -> QuantizedWeight:
    """Integers over the whole range of a grid, both ends included."""
    generator = torch.Generator().manual_seed(seed)
    groups = COLUMNS // fmt.group_of(COLUMNS)
    q_OI = torch.randint(fmt.low, fmt.high + 1, (ROWS, COLUMNS), generator=generator).to(fmt.dtype)
    q_OI[0, :2] = torch.tensor([fmt.low, fmt.high])
    scale_OG = (torch.rand(ROWS, groups, generator=generator) * 0.1 + 1e-3).to(scale_dtype)
    zero_OG = torch.randint(fmt.low, fmt.high + 1, (ROWS, groups), generator=generator).to(fmt.dtype)
    return QuantizedWeight(q_OI, scale_OG, None if fmt.symmetric else zero_OG, fmt)


def read(packed: np.ndarray, kind: GGMLQuantizationType) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(packed, kind))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_blocks_are_our_integers_bit_for_bit(fmt: IntFormat) -> None:
    weight, kind = random_weight(fmt, seed=0), block_kind(fmt)
    group = fmt.group_of(COLUMNS)
    d_OI = weight.scale_OG.half().float().repeat_interleave(group, dim=1)
    expected_OI = d_OI * weight.q_OI
    if weight.second_OG is not None:
        expected_OI += (-d_OI * weight.second_OG.repeat_interleave(group, dim=1)).half().float()
    blocks_OP = pack(weight, kind)
    assert torch.equal(read(blocks_OP, kind), expected_OI)
    q_OI = unpack(torch.from_numpy(blocks_OP), kind)
    assert q_OI.dtype == weight.q_OI.dtype and torch.equal(q_OI, weight.q_OI)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_scales_that_were_fp16_stay_what_they_were(fmt: IntFormat) -> None:
    weight, kind = random_weight(fmt, seed=1, scale_dtype=torch.float16), block_kind(fmt)
    error_OI = (read(pack(weight, kind), kind) - weight.dequantize()).abs()
    if weight.second_OG is None:
        assert not error_OI.any()
    else:  # half a unit in the last of 11 bits of m
        m_OG = weight.scale_OG.float() * weight.second_OG
        bound_OI = (m_OG * 2**-11 * (1 + 1e-3)).repeat_interleave(fmt.group_of(COLUMNS), dim=1) + 1e-7
        assert bool((error_OI <= bound_OI).all()) and bool(error_OI.any())


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.sampled_from([1e-3, 1.0, 300.0]))
def test_an_embedding_in_q8_0_is_rounded_to_nearest(seed: int, size: float) -> None:
    w_OI = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)) * size
    w_OI[0, :32] = 0
    rounded = round_to_q8_0(w_OI)
    read_OI = read(pack(rounded, GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0)
    step_OI = rounded.scale_OG.float().repeat_interleave(32, dim=1)
    assert torch.equal(read_OI, rounded.dequantize())
    assert bool(((read_OI - w_OI).abs() <= step_OI * 0.501 + 127 * step_OI * 2**-11).all())


def test_floating_point_tensors_become_the_nearest_of_their_type() -> None:
    w_OI = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))
    assert np.array_equal(pack(w_OI, GGMLQuantizationType.F16), w_OI.half().numpy())
    assert np.array_equal(pack(w_OI[0], GGMLQuantizationType.F32), w_OI[0].numpy())


def test_numbers_too_large_for_fp16_are_refused() -> None:
    weight = random_weight(IntFormat(4, True, 32), seed=3)
    huge = QuantizedWeight(weight.q_OI, weight.scale_OG * 1e7, None, weight.format)
    for value, kind in ((huge, GGMLQuantizationType.Q4_0), (torch.full((2, 2), 1e5), GGMLQuantizationType.F16)):
        with pytest.raises(SpinfoldError, match="fp16"):
            pack(value, kind)


@pytest.mark.parametrize(
    ("fmt", "width", "ok"),
    [
        (None, 7, True),
        (IntFormat(4, True, 32), 96, True),
        (IntFormat(4, False, 64), 128, True),
        (IntFormat(8, True), 96, True),
        (IntFormat(4, True, 48), 96, False),
        (IntFormat(4, True), 40, False),
        (IntFormat(8, False, 32), 96, False),
    ],
)
def test_what_fits_is_known_beforehand(fmt: IntFormat | None, width: int, ok: bool) -> None:
    verdict = fits_blocks(fmt, width)
    assert bool(verdict) is ok and bool(verdict.reason and verdict.fix) is not ok


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_row_order_is_the_inverse_of_the_readers(num_heads: int, half: int, bias: bool) -> None:
    shape = (num_heads * 2 * half,) if bias else (num_heads * 2 * half, 3)
    w_OI = torch.arange(math.prod(shape)).reshape(shape)
    moved = permute(w_OI, num_heads)
    assert isinstance(moved, torch.Tensor) and torch.equal(unpermute(moved, num_heads), w_OI)


def test_integers_scales_and_zero_points_move_with_their_rows() -> None:
    weight = random_weight(IntFormat(4, False, 32), seed=4)
    assert torch.equal(unpermute(permute(weight, 3).dequantize(), 3), weight.dequantize())


# ---- RoPE: what llama.cpp computes from the metadata, against Transformers' own functions ---------------------------


def config_with(rope_parameters: dict[str, Any], model_type: str = "llama", **changes: Any) -> Any:
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    return AutoConfig.for_model(model_type, **(sizes | changes), rope_parameters=rope_parameters)


def plain_frequencies(theta: float, rotated: int) -> torch.Tensor:
    return theta ** -(torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)


@settings(max_examples=25)
@given(
    theta=st.sampled_from([1e4, 5e5]),
    factor=st.floats(1.5, 64),
    low=st.floats(0.5, 2),
    high=st.floats(3, 8),
    original=st.sampled_from([64, 512, 8192]),
)
def test_llama3_scaling(theta: float, factor: float, low: float, high: float, original: int) -> None:
    given_ = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": low}
    given_ |= {"high_freq_factor": high, "original_max_position_embeddings": original}
    config = config_with(given_)
    expected_F, scale = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    factors, _ = rope(config, "llama")
    frequencies_F = plain_frequencies(theta, 64) / factors["rope_freqs.weight"].double()
    assert scale == 1 and torch.allclose(frequencies_F, expected_F.double(), rtol=1e-5)


@pytest.mark.parametrize("attention_factor", [None, 1.25])
def test_longrope(attention_factor: float | None) -> None:
    given_ = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 512}
    given_ |= {"partial_rotary_factor": 0.75, "attention_factor": attention_factor}
    given_ |= {"short_factor": [1 + i / 20 for i in range(24)], "long_factor": [2 + i / 10 for i in range(24)]}
    config = config_with(given_, "phi3", original_max_position_embeddings=512, pad_token_id=0)
    factors, values = rope(config, "phi3")
    for name, length in (("short", 512), ("long", 513)):
        expected_F, scale = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), seq_len=length)
        frequencies_F = plain_frequencies(1e4, 48) / factors[f"rope_factors_{name}.weight"].double()
        assert torch.allclose(frequencies_F, expected_F.double(), rtol=1e-5)
        assert values["phi3.rope.scaling.attn_factor"] == pytest.approx(scale)
    assert values["phi3.rope.dimension_count"] == 48


@pytest.mark.parametrize("attention_factor", [None, 0.8])
@pytest.mark.parametrize("factor", [4.0, 1.0])
def test_yarn_leaves_llama_cpp_only_the_rest_of_the_attention_factor(
    factor: float, attention_factor: float | None
) -> None:
    given_ = {"rope_type": "yarn", "rope_theta": 1e4, "factor": factor, "original_max_position_embeddings": 512}
    config = config_with(given_ | {"attention_factor": attention_factor}, "qwen2")
    _, scale = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    _, values = rope(config, "qwen2")
    own = 1 + 0.1 * math.log(factor)  # ggml's rope_yarn multiplies cos and sin by it
    assert values["qwen2.rope.scaling.attn_factor"] * own == pytest.approx(scale)


@pytest.mark.parametrize(
    ("given_", "model_type"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "llama"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "llama"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 16, "original_max_position_embeddings": 512}, "qwen2"),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            | {"original_max_position_embeddings": 512},
            "qwen3",
        ),
    ],
    ids=["dynamic", "part of a head", "YaRN with its own betas", "frequency factors in qwen3"],
)
def test_rope_that_llama_cpp_computes_otherwise_is_refused(given_: dict[str, Any], model_type: str) -> None:
    with pytest.raises(SpinfoldError, match=r"RoPE|rotates"):
        rope(config_with({"rope_theta": 1e4} | given_, model_type), model_type)
