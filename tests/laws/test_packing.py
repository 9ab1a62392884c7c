"""Packing loses nothing and wastes nothing, for every width of value and row, and agrees with compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spinfold.export.packing import as_unsigned, pack, pack_words, unpack

BITS = range(2, 9)


def integers(rows: int, width: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1 << bits, (rows, width), generator=generator, dtype=torch.uint8)


@given(st.sampled_from(BITS), st.integers(1, 70), st.integers(1, 5), st.integers(0, 99))
def test_unpacking_gives_back_every_integer(bits: int, width: int, rows: int, seed: int) -> None:
    u_OI = integers(rows, width, bits, seed)
    packed_OP = pack(u_OI, bits)
    assert packed_OP.dtype == torch.uint8 and packed_OP.shape == (rows, -(-width * bits // 8))
    assert torch.equal(unpack(packed_OP, bits, width), u_OI)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [1, 7, 40])
def test_a_row_is_one_little_endian_number(bits: int, width: int) -> None:
    u_OI = integers(3, width, bits)
    for u_I, packed_P in zip(u_OI.tolist(), pack(u_OI, bits).tolist(), strict=True):
        assert int.from_bytes(bytes(packed_P), "little") == sum(u << bits * i for i, u in enumerate(u_I))


@pytest.mark.parametrize("bits", BITS)
def test_rows_do_not_touch_each_other(bits: int) -> None:
    u_OI = integers(4, 13, bits)
    assert torch.equal(pack(u_OI, bits), torch.cat([pack(u_1I, bits) for u_1I in u_OI.split(1)]))


@pytest.mark.parametrize("bits", BITS)
def test_signed_integers_move_up_by_half_the_range(bits: int) -> None:
    half = 1 << bits - 1
    q_I = torch.arange(-half, half).to(torch.int8)
    assert as_unsigned(q_I, bits).tolist() == list(range(1 << bits))
    assert as_unsigned(torch.arange(1 << bits).to(torch.uint8), bits).tolist() == list(range(1 << bits))


@pytest.mark.parametrize("bits", [1, 9])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="2 to 8 bits"):
        pack(integers(1, 8, 1), bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [1, 31, 32, 40, 96])
def test_words_are_those_of_compressed_tensors(bits: int, width: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    u_OI = integers(5, width, bits)
    q_OI = (u_OI.int() - (1 << bits - 1)).to(torch.int8)
    words_OW = pack_words(u_OI, bits)
    assert torch.equal(words_OW, helpers.pack_to_int32(q_OI, bits))
    assert torch.equal(helpers.unpack_from_int32(words_OW, bits, q_OI.shape), q_OI)
    along_O = helpers.pack_to_int32(q_OI, bits, packed_dim=0)
    assert torch.equal(pack_words(u_OI.T, bits).T, along_O)
