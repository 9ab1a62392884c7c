"""The kernels of the online transforms give what `runtime.transforms` and the maps define.

Not bit for bit: sums come in another order, and numbers of 16 bits pass through fp16 between the two products. So a
number near the middle between two elements may go to the other one, and none may go further.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from on_device import DEVICE, INTERPRETED, NARROW, direct, elsewhere, passes_in_the_interpreter, random
from torch import nn

from spinfold.formats import FLOAT_FORMATS, IntFormat, fake_quantize
from spinfold.maps import Hadamard, LowRankCorrection
from spinfold.networks import Wire
from spinfold.runtime import OnlineMap, Quantize
from spinfold.runtime.transforms import (
    Encoded,
    add_change,
    as_stored,
    encode,
    fake_quantize_through,
    numbers,
    residual_sum,
    rope,
)

SIZES = (576, 1536, 3072, 4096, 5120, 8192, 9728, 11008, 14336, 18944)
FORMATS = {
    "INT4": IntFormat(4, False),
    "INT4 clipped": IntFormat(4, True, clip=0.9),
    "INT4 in groups": IntFormat(4, False, 16),
    "INT8": IntFormat(8, True),
    "FP8": FLOAT_FORMATS["fp8"],
    "MXFP4": FLOAT_FORMATS["mxfp4"],
    "MXFP4 even": replace(FLOAT_FORMATS["mxfp4"], scale="even"),
    "MXFP6": FLOAT_FORMATS["mxfp6"],
    "MXFP8": FLOAT_FORMATS["mxfp8"],
    "NVFP4": replace(FLOAT_FORMATS["nvfp4"], outer="row"),
    "E5M2 scales": replace(FLOAT_FORMATS["nvfp4"], scale="e5m2", outer=None),
}

MANY = ("INT4", "FP8", "MXFP4", "NVFP4")  # also with more than a few tokens, which are cut otherwise
CASES = [(576, torch.float16, name, num_tokens) for name in FORMATS for num_tokens in (3, 67)[: 1 + (name in MANY)]]
CASES += [(1024, torch.float32, name, 3) for name in ("INT8", "MXFP4", "MXFP4 even", "MXFP8", "E5M2 scales")]
CASES += [(1536, torch.float32, "INT4 in groups", 3), (1536, torch.float16, "NVFP4", 3)]
CASES += [(128, torch.float32, "INT4", num_tokens) for num_tokens in (3, 131)]
CASES += [(64, torch.float16, name, 3) for name in ("MXFP4", "MXFP6", "E5M2 scales")]  # of the KV cache
CASES += [(11008, torch.float16, "MXFP4", 67)]
if not INTERPRETED:
    CASES += [(3072, torch.bfloat16, name, 3) for name in FORMATS]
    CASES += [(size, torch.bfloat16, name, 3) for size in (64, *SIZES) for name in ("INT4", "NVFP4")]
    CASES += [(size, torch.bfloat16, name, 67) for size in SIZES[4:] for name in MANY]


@elsewhere
def test_the_kernels_agree_in_the_interpreter():
    passes_in_the_interpreter(__file__)


def uneven(num_tokens: int, size: int) -> torch.Tensor:
    """Rows whose channels differ tenfold, the second a thousand times as large."""
    x = random(num_tokens, size) * torch.linspace(0.3, 3, size, device=DEVICE)
    x[1:2] *= 1000
    return x


def clip_of(fmt):
    return torch.tensor(fmt.clip, device=DEVICE)


@direct
@pytest.mark.parametrize("size", [32, 64, 128, *SIZES])
@pytest.mark.parametrize(
    ("dtype", "seed", "transposed"),
    [
        (torch.float32, None, False),
        (NARROW, 1, False),
        (NARROW, 2, True),
        *[(torch.float16, 3, False)] * (not INTERPRETED),
    ],
)
def test_the_map(size, dtype, seed, transposed):
    map = Hadamard(size, seed)
    map = map.inverse() if transposed else map
    x = uneven(3, size).to(dtype)
    if not map.has_kernel(x):
        pytest.skip("no kernel: too large for fp32")
    expected = map.apply(x.double())
    error = (map.by_kernel(x) - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < {torch.float32: 4e-7, torch.float16: 5e-4, torch.bfloat16: 2.5e-3}[dtype]


@direct
@pytest.mark.parametrize(("size", "dtype", "name", "num_tokens"), CASES)
def test_the_map_with_a_quantizer(size, dtype, name, num_tokens):
    fmt, map, x = FORMATS[name], Hadamard(size), uneven(num_tokens, size).to(dtype)
    if not map.has_kernel(x, fmt.group_size or 0) or (name == "NVFP4" and size <= 128):
        pytest.skip("no kernel: too large for fp32, groups cross rows of the matrix, or short rows share a scale")
    rotated = map.apply(x.double()).float()
    exact = fake_quantize(rotated, fmt)
    fake = map.by_kernel(x, grid=numbers(fmt), clip=clip_of(fmt))
    assert fake.dtype == dtype
    # What is not the same number goes to the next element, whose distance is at most that of the two largest.
    step = (rotated - exact).abs().amax(-1, keepdim=True) * 2.2 + 1e-6
    gap = (fake - exact).abs() - 2.0**-8 * exact.abs() * (dtype != torch.float32)
    assert (gap <= step).all()
    limit = 0.002 if dtype == torch.float32 else 0.03
    assert (gap > 1e-3 * step).float().mean() < limit
    if fmt.bits not in (4, 8):
        return
    expected = encode(rotated, fmt)
    codes = map.by_kernel(x, grid=numbers(fmt), clip=clip_of(fmt), packed=True)
    packed = Encoded(codes.codes, *as_stored(fmt, codes.scale, codes.second))
    assert [t.dtype for t in packed if t is not None] == [t.dtype for t in expected if t is not None]
    assert [t.shape for t in packed if t is not None] == [t.shape for t in expected if t is not None]
    assert (packed.codes != expected.codes).float().mean() < 2 * limit
    # With two bits of mantissa, or three; of powers of two, where a group's largest number lies that near to one.
    next_scale = {"E5M2 scales": 0.26, "MXFP4": 1.0, "MXFP4 even": 1.0, "MXFP8": 1.0}.get(name, 0.15)
    torch.testing.assert_close(packed.scale.float(), expected.scale.float(), rtol=next_scale, atol=0)
    if next_scale == 1.0:
        assert (packed.scale != expected.scale).float().mean() < 1e-3


@direct
@pytest.mark.parametrize("name", ["INT4", "INT4 in groups", "MXFP4", "NVFP4"])
def test_what_is_not_finite_spoils_its_row_only(name):
    fmt, map = FORMATS[name], Hadamard(1024)
    x = random(5, map.size)
    x[1, 7], x[2, 500], x[3] = float("nan"), float("-inf"), 0
    y = map.by_kernel(x, grid=numbers(fmt))
    assert y[1:3].isnan().all()
    assert (y[3] == 0).all()
    assert torch.equal(y[[0, 4]], map.by_kernel(x[[0, 4]], grid=numbers(fmt)))


@direct
def test_numbers_near_the_ends_of_fp32_keep_their_precision():
    map = Hadamard(576)
    for factor in (1e-35, 1e30):
        x = random(3, 576) * factor
        expected = map.apply(x.double())
        assert (map.by_kernel(x) - expected).norm() < 1e-5 * expected.norm()


@direct
@pytest.mark.parametrize("bits", [False, True])
@pytest.mark.parametrize("size", [1536, 5120] if INTERPRETED else SIZES)
def test_every_way_to_cut_the_work(size, bits, monkeypatch):
    from spinfold.kernels import tilings

    monkeypatch.setattr(tilings, "FEW", 0)  # else few rows are shared out, which is another way
    map, x = Hadamard(size, seed=4), random(5, size).to(NARROW)
    expected = map.apply(x.double())
    same = {"programs": 1, "num_stages": 2, "num_warps": 8, "ahead": False}
    cuts = {cut._replace(**same): cut for cut in tilings.tilings(map.orders) if cut.bits == bits}
    if not cuts:
        pytest.skip("its left matrix is small, and stays in 16 bits")
    for cut in cuts:
        tiling = cut if INTERPRETED else cuts[cut]
        assert (map.by_kernel(x, tiling=tiling) - expected).norm() < 3e-3 * expected.norm()


@direct
@pytest.mark.parametrize("name", [None, "INT4", "INT8", "MXFP4", "NVFP4"])
@pytest.mark.parametrize("cut", [(64, 1, 64, 4, 1, 1), (128, 2, 32, 2, 1, 1), (64, 1, 128, 4, 1, 1)])
def test_warps_that_share_a_tile(cut, name, monkeypatch):
    """What a row's numbers or codes are does not depend on which warp and thread has them."""
    from spinfold.kernels import tilings

    monkeypatch.setattr(tilings, "FEW", 0)
    map, x = Hadamard(8192), uneven(5, 8192).to(NARROW)
    options = {} if name is None else {"grid": numbers(FORMATS[name]), "packed": True}
    alone = map.by_kernel(x, tiling=tilings.Tiling(64, 1, 16, 1, 1, 1), **options)
    shared = map.by_kernel(x, tiling=tilings.Tiling(*cut), **options)
    if name is None:
        assert (alone - shared).norm() < 3e-3 * alone.norm()
    else:
        assert (alone.codes != shared.codes).float().mean() < 0.03
        torch.testing.assert_close(alone.scale.float(), shared.scale.float(), rtol=0.15, atol=0)


@direct
@pytest.mark.parametrize("name", [None, "INT4", "MXFP4", "NVFP4"])
@pytest.mark.parametrize("dtype", [NARROW, torch.float32])
@pytest.mark.parametrize("size", [1536] if INTERPRETED else [1536, 11008, 18944])
def test_a_matrix_in_bits_is_the_same_matrix(size, dtype, name, monkeypatch):
    """Bit for bit, with rows and columns beyond the matrix, for one program and for many."""
    from spinfold.kernels import tilings

    if size == 18944 and dtype == torch.float32:
        pytest.skip("two pieces of such a row do not fit into shared memory")
    map, x = Hadamard(size, seed=4), uneven(5, size).to(dtype)
    cut = tilings.Tiling(32 if size == 1536 else 64 if size == 11008 else 128, 1, 64, 4, 1, 1)
    options = {} if name is None else {"grid": numbers(FORMATS[name]), "packed": True}
    for few in (0, 64):
        monkeypatch.setattr(tilings, "FEW", few)
        numbers_of_16_bits = map.by_kernel(x, tiling=cut, **options)
        bits = map.by_kernel(x, tiling=cut._replace(bits=True), **options)
        for one, other in zip(*((y,) if name is None else y for y in (numbers_of_16_bits, bits)), strict=True):
            assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("size", SIZES)
def test_what_comes_behind_a_map_fits_where_the_map_fits(size):
    """`has_kernel` asks for the map, `by_kernel` for what becomes of a row."""
    from spinfold.kernels import tilings

    orders = Hadamard(size).orders
    cases = [(n, b, kib) for n in (3, 4096) for b in (2, 4) for kib in (48, 64, 99, 100, 163, 227)]
    for num_rows, num_bytes, kib in cases:
        for width in (0, 16, 32):
            options = {"num_rows": num_rows, "num_bytes": num_bytes, "memory": kib * 1024}
            if tilings.best_tiling(orders, width, **options) is not None:
                for kind in ("groups", "rows", "group codes", "row codes", "row bytes"):
                    assert tilings.best_tiling(orders, width, kind=kind, **options) is not None


@pytest.mark.parametrize("depths", [(16,), (128, 32, 16)])
def test_signs_are_where_the_kernel_looks_for_them(depths):
    from spinfold.kernels.signs import packed_signs

    x_RD = random(32, sum(depths)).sign()
    words_RC4 = packed_signs(x_RD, depths).unflatten(1, (-1, 4))
    for block, x_Rd in enumerate(x_RD.split(list(depths), dim=1)):
        for column in range(x_Rd.shape[1]):
            p, t, e = column // 8, column % 8 // 2, column % 2
            negative_R = words_RC4[:, block, t] >> (15 + 16 * e - p) & 1
            assert torch.equal(1 - 2 * negative_R, x_Rd[:, column].to(negative_R.dtype))


@direct
@pytest.mark.parametrize("name", [None, "MXFP4"])
def test_few_rows_are_shared_out_among_programs(name, monkeypatch):
    from spinfold.kernels import tilings

    map, x = Hadamard(1536, seed=4), random(5, 1536)
    grid = None if name is None else numbers(FORMATS[name])
    shared = map.by_kernel(x, grid=grid)
    monkeypatch.setattr(tilings, "FEW", 0)
    gap = (map.by_kernel(x, grid=grid) - shared).abs()
    assert (gap > 1e-5).float().mean() <= (0 if name is None else 1e-3)


@direct
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_the_number_of_tokens_does_not_matter(num_tokens):
    map, fmt = Hadamard(576), FORMATS["INT4"]
    x = random(7, 576)
    whole = map.by_kernel(x, grid=numbers(fmt))
    assert torch.equal(map.by_kernel(x[:num_tokens], grid=numbers(fmt)), whole[:num_tokens])


@direct
@pytest.mark.parametrize("size", [576] if INTERPRETED else [5120, 9728, 11008, 14336, 18944])
@pytest.mark.parametrize("name", [None, "INT4"])
def test_a_row_is_the_same_in_whichever_turn_its_program_takes_it(size, name):
    map, x = Hadamard(size), uneven(70 if INTERPRETED else 1500, size).to(NARROW)
    options = {} if name is None else {"grid": numbers(FORMATS[name]), "packed": True}
    last = 67  # in their first turn; not so few that they are cut otherwise
    whole, few = map.by_kernel(x, **options), map.by_kernel(x[-last:], **options)
    for of_all, alone in zip(*((whole, few) if name else ((whole,), (few,))), strict=True):
        assert torch.equal(of_all[-last:], alone)


def with_turns(size, name):
    """Options for rows of 5120 or more that programs take, and for rows dealt out."""
    from spinfold.kernels.tilings import Tiling

    columns, parts = (64, 1) if size in (5120, 11008) else (128, 2)
    tiling = Tiling(columns, parts, 64, 4, 1, 2, at_once=parts == 2, bits=True, rest=64, turns=True)
    options = {} if name is None else {"grid": numbers(FORMATS[name]), "packed": True}
    return {**options, "tiling": tiling}, {**options, "tiling": tiling._replace(turns=False)}


@direct
@pytest.mark.parametrize("size", [5120] if INTERPRETED else [5120, 9728, 11008, 14336, 18944])
@pytest.mark.parametrize("name", [None, "INT4", "MXFP4"])
def test_rows_that_programs_take_are_those_dealt_out(size, name, monkeypatch):
    from spinfold.kernels import hadamard

    counter = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(hadamard, "counter_for", lambda device: counter)
    map, x = Hadamard(size), uneven(14 if INTERPRETED else 3001, size).to(NARROW)
    taken, dealt_out = with_turns(size, name)
    expected = map.by_kernel(x, **dealt_out)
    for rows in (len(x), len(x), 9 if INTERPRETED else 600):  # one launch leaves the counter to the next
        actual = map.by_kernel(x[:rows], **taken)
        for one, other in zip(*((actual, expected) if name else ((actual,), (expected,))), strict=True):
            assert one is other is None or torch.equal(one, other[:rows])
        assert counter.tolist() == [0, 0]


@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")
def test_rows_are_taken_in_graphs_and_on_streams_beside_each_other():
    map, (taken, dealt_out) = Hadamard(11008), with_turns(11008, None)
    xs = [random(2000, 11008, seed=seed).to(NARROW) for seed in range(3)]
    expected = [map.by_kernel(x, **dealt_out) for x in xs]
    map.by_kernel(xs[0], **taken)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [map.by_kernel(x, **taken) for x in xs[:2]]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(20):
        graph.replay()
        beside = []
        for stream in streams:
            with torch.cuda.stream(stream):
                beside.append(map.by_kernel(xs[2], **taken))
        torch.cuda.synchronize()
        for one, other in zip([*captured, *beside], [*expected, expected[2]], strict=True):
            assert torch.equal(one, other)
        for one in captured:
            one.zero_()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")
def test_the_gradient_is_that_of_the_map():
    map, x, g = Hadamard(11008, seed=1), random(3, 11008).requires_grad_(), random(3, 11008, seed=1)
    (actual,) = torch.autograd.grad(map.apply(x), x, g)
    torch.testing.assert_close(actual.double(), map.inverse().apply(g.double()), rtol=0, atol=1e-5)


@direct
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize(("batch", "length"), [(1, 7), (2, 7), (2, 175)])  # more than 1024 rows are cut otherwise
@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
def test_heads_through_rope_a_rotation_and_a_quantizer(size, batch, length, dtype):
    from spinfold.kernels.heads import rotate_heads, split_matrix

    R_NN = torch.linalg.qr(random(size, size, seed=1).double())[0]
    x, angle = random(2, length, 3, size).to(dtype), random(batch, length, size // 2, seed=2)
    cos, sin = angle.cos(), angle.sin()
    options = {"matrix": split_matrix(R_NN), "cos": cos, "sin": sin}
    exact = rope(x, cos, sin).double() @ R_NN
    error = (rotate_heads(x, **options) - exact).norm() / exact.norm()
    # fp32: 1.5e-7 in the interpreter. A tensor core cuts a sum off at 24 or 25 bits after every 16 products, which is
    # 2e-7 for 128 of them, imitated in fp64; 6e-7 if the products with second halves come after the large ones.
    assert error < {torch.float32: 5e-7, torch.float16: 6e-4, torch.bfloat16: 3e-3}[dtype]
    fmt = IntFormat(4, False)
    grid = numbers(replace(fmt, group_size=size))
    expected = encode(exact.float(), fmt)
    codes = rotate_heads(x, grid=grid, packed=True, **options)
    assert (codes.codes != expected.codes).float().mean() < (0.001 if dtype == torch.float32 else 0.03)
    assert codes.second.shape == expected.second.shape
    fake = rotate_heads(x, grid=grid, **options)
    gap = (fake - fake_quantize(exact.float(), fmt)).abs()
    assert (gap > 0.02 * exact.abs().amax(-1, keepdim=True)).float().mean() < 0.01


@direct
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("num_heads", [1, 8, 64])
@pytest.mark.parametrize("of_one_table", [False, True])
def test_heads_in_tiles_of_whole_tokens(size, num_heads, of_one_table):
    from spinfold.kernels.heads import Cut, rotate_heads, split_matrix

    R_NN = torch.linalg.qr(random(size, size, seed=1).double())[0]
    length = (300 if INTERPRETED else 12000) // num_heads + 3
    x, table = random(1, length, num_heads, size).to(NARROW), random(1, length, size, seed=2)
    cos, sin = table.chunk(2, -1)
    if not of_one_table:
        cos, sin = cos.contiguous(), sin.contiguous()
    exact = rope(x, cos, sin).double() @ R_NN
    options = {"matrix": split_matrix(R_NN), "cos": cos, "sin": sin, "cut": Cut(64, 4, 1, 1, 1)}
    assert (rotate_heads(x, **options) - exact).norm() < 4e-3 * exact.norm()
    codes = rotate_heads(x, grid=numbers(IntFormat(4, False, size)), packed=True, **options)
    assert (codes.codes != encode(exact.float(), IntFormat(4, False)).codes).float().mean() < 0.03


@direct
@pytest.mark.parametrize("size", [32, 64, 128])
def test_two_numbers_of_16_bits_hold_22_bits_of_an_orthogonal_matrix(size):
    from spinfold.kernels.heads import rotate_heads, split_matrix

    R_NN = torch.linalg.qr(random(size, size, seed=1).double())[0]
    eye_NN = torch.eye(size, device=DEVICE)
    assert (rotate_heads(eye_NN, split_matrix(R_NN)) - R_NN).norm() < 2**-24 * R_NN.norm()


@direct
@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
@pytest.mark.parametrize("branch_dtype", [torch.float32, NARROW])
@pytest.mark.parametrize(
    ("num_tokens", "size", "rank"), [(1, 64, 3), (37, 576, 20), (0, 64, 3), (131, 576, 64), (70, 96, 200)]
)
@pytest.mark.parametrize("with_x", [True, False])
def test_the_low_rank_sum(dtype, branch_dtype, num_tokens, size, rank, with_x):
    from spinfold.kernels.low_rank import inner_product, low_rank_sum

    x, branch = random(num_tokens, size).to(dtype), random(num_tokens, size, seed=1).to(branch_dtype)
    U_NR, V_RN = (random(size, rank, seed=2) * size**-0.5).to(dtype), random(rank, size, seed=3).to(dtype)
    next_U_NR = (random(size, 40, seed=4) * size**-0.5).to(torch.promote_types(dtype, branch_dtype))
    expected = branch.double() + with_x * x.double() + x.double() @ U_NR.double() @ V_RN.double()
    near = 2e-6 if dtype == torch.float32 else 4e-3
    y, nothing = low_rank_sum(x, branch, inner_product(x, U_NR), V_RN, with_x=with_x)
    assert nothing is None
    assert y.dtype == torch.promote_types(dtype, branch_dtype)
    assert (y - expected).norm() <= near * expected.norm()
    y, next_inner = low_rank_sum(x, branch, inner_product(x, U_NR), V_RN, with_x=with_x, next_U_NR=next_U_NR)
    assert (y - expected).norm() <= near * expected.norm()
    inner = y.double() @ next_U_NR.double()
    assert (next_inner.sum(0)[:, :40] - inner).norm() <= 2e-6 * inner.norm()


@direct
@pytest.mark.parametrize("cut", [(4, 64, 3, 4, 1), (8, 128, 64, 8, 2), (16, 16, 1, 4, 2), (64, 32, 2, 4, 3)])
@pytest.mark.parametrize("num_tokens", [3, 70])
def test_a_sum_is_the_same_however_it_is_cut(cut, num_tokens):
    from spinfold.kernels.low_rank import Cut, inner_product, low_rank_sum

    x, branch = random(num_tokens, 240).to(NARROW), random(num_tokens, 240, seed=1).to(NARROW)
    U_NR, V_RN = (random(240, 33, seed=2) * 240**-0.5).to(NARROW), random(33, 240, seed=3).to(NARROW)
    y, next_inner = low_rank_sum(x, branch, inner_product(x, U_NR), V_RN, next_U_NR=U_NR, cut=Cut(*cut))
    expected = branch.double() + x.double() + x.double() @ U_NR.double() @ V_RN.double()
    assert (y - expected).norm() <= 4e-3 * expected.norm()
    inner = y.double() @ U_NR.double()
    assert (next_inner.sum(0)[:, :33] - inner).norm() <= 2e-6 * inner.norm()


@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
def test_one_residual_sum_after_the_other(dtype):
    maps = [LowRankCorrection(random(96, r, seed=r) * 96**-0.5, random(r, r, seed=1)) for r in (6, 20, 3)]
    branches = [random(2, 5, 96, seed=7 + i).to(dtype) for i in range(3)]
    x = exact = random(2, 5, 96).to(dtype)
    inner = None
    for branch, map, next_map in zip(branches, maps, [*maps[1:], None], strict=True):
        x, inner = residual_sum(branch, x, map, inner=inner, next_map=next_map)
        exact = branch.double() + LowRankCorrection(map.U_NR.double(), map.K_RR.double()).apply(exact.double())
        assert (inner is None) == (next_map is None or DEVICE == "cpu")
    assert (x - exact).norm() <= (2e-6 if dtype == torch.float32 else 8e-3) * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", [None, 0.8])
def test_a_wire_does_a_map_and_the_quantizer_behind_it_at_once(dtype, clip):
    map, fmt, x = Hadamard(96, seed=0), IntFormat(4, False), random(2, 5, 96).to(dtype)
    ratio = None if clip is None else torch.tensor(clip, device=DEVICE)
    wire = Wire()
    wire.ops.extend([nn.Identity(), OnlineMap(map), Quantize(fmt, clip=ratio), nn.Identity()])
    expected = fake_quantize(map.apply(x.float()), fmt, clip=ratio).to(dtype)
    assert (wire(x) != expected).float().mean() <= (0.02 if DEVICE == "cuda" else 0)
    assert wire(x).dtype == dtype


def test_gradients_pass_a_merged_quantizer_straight_through():
    map, fmt = Hadamard(96, seed=0), IntFormat(4, False)
    x, g = random(5, 96).requires_grad_(), random(5, 96, seed=1)
    (actual,) = torch.autograd.grad(fake_quantize_through(x, map, fmt), x, g)
    torch.testing.assert_close(actual, map.inverse().apply(g))


@pytest.mark.parametrize("factor", [1.0, 0.22])
def test_a_change_of_basis_joins_its_branch(factor):
    map = LowRankCorrection(random(96, 6), random(6, 6, seed=1))
    x, branch = random(2, 5, 96), random(2, 5, 96, seed=2)
    expected = branch + (map.apply(x) - x) / factor
    wire = Wire()
    wire.ops.append(OnlineMap(map))
    for actual in (wire.added_to(branch, x, factor), add_change(branch, x, map, factor)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    wire.ops.append(nn.Identity())
    torch.testing.assert_close(wire.added_to(branch, x, factor), expected, rtol=1e-4, atol=1e-4)


def test_the_factors_of_a_correction_follow_it():
    map = LowRankCorrection(random(96, 6), random(6, 6, seed=1))
    _, before = map.two_factors(torch.float32)
    assert map.two_factors(torch.float32)[1] is before
    map.K_RR.mul_(2)
    torch.testing.assert_close(map.two_factors(torch.float32)[1], 2 * before)
