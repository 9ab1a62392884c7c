"""Laws of the outlier statistics: known answers, invariances, surfaces that keep their peaks, files that come back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import FAMILIES, random_tokens

from spinfold.errors import SpinfoldError
from spinfold.evaluation.outliers import MEASURED_WIRES, Outliers, kurtosis, max_pool, measure_outliers, peak_to_rms
from spinfold.networks import Network

TABLES = ("kurtosis_LW", "peak_to_rms_LW", "worst_peak_to_rms_LW", "largest_LW")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def network() -> Network:
    return Network(FAMILIES["llama"](0, 96, torch.float32))


@pytest.fixture(scope="module")
def ids_BT() -> Tensor:
    return random_tokens(1, batch=3, length=13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 4, 64, 1000])
def test_flat_and_one_hot_rows(n: int, dtype: torch.dtype) -> None:
    sign = 1 - 2 * (torch.arange(n) % 2)
    rows = torch.stack([7.0 * sign, 3.0 * (torch.arange(n) == n // 2), torch.zeros(n)]).to(dtype)
    assert kurtosis(rows).tolist() == pytest.approx([1, n, 1])
    assert peak_to_rms(rows).tolist() == pytest.approx([1, n**0.5, 1])


def test_gaussian_rows_have_kurtosis_three() -> None:
    x_RC = torch.randn(200, 5000, generator=torch.Generator().manual_seed(0))
    assert kurtosis(x_RC).mean().item() == pytest.approx(3, abs=0.02)


@given(seed=st.integers(0, 999), exponent=st.integers(-30, 30), n=st.integers(1, 40))
def test_scale_free_and_within_bounds(seed: int, exponent: int, n: int) -> None:
    x_RC = torch.randn(5, n, generator=torch.Generator().manual_seed(seed))
    for statistic, most in ((kurtosis, n), (peak_to_rms, n**0.5)):
        value_R = statistic(x_RC)
        assert bool(((value_R >= 1 - 1e-5) & (value_R <= most * (1 + 1e-5))).all())
        torch.testing.assert_close(statistic(x_RC * 10.0**exponent), value_R, rtol=1e-4, atol=0)


def test_nan_is_not_hidden() -> None:
    x_RC = torch.tensor([[1.0, float("nan")], [1.0, 1.0]])
    assert kurtosis(x_RC).isnan().tolist() == peak_to_rms(x_RC).isnan().tolist() == [True, False]


@given(tokens=st.integers(1, 300), channels=st.integers(1, 400), seed=st.integers(0, 99))
def test_every_peak_survives_pooling(tokens: int, channels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_TC = torch.rand(tokens, channels, generator=generator)
    t, c = (int(torch.randint(size, (), generator=generator)) for size in (tokens, channels))
    x_TC[t, c] = -9.0
    peaks, (step_t, step_c) = max_pool(x_TC)
    assert peaks.shape[0] <= 128
    assert peaks.shape[1] <= 192
    assert peaks[t // step_t, c // step_c] == 9
    assert (peaks > 1).sum() == 1
    if (step_t, step_c) == (1, 1):
        assert torch.equal(peaks, x_TC.abs())


@pytest.mark.parametrize("wire", MEASURED_WIRES)
def test_an_outlier_planted_on_a_wire_is_found_there(network: Network, ids_BT: Tensor, wire: str) -> None:
    class Spike(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            x[..., 3, 1] = 1e4  # one channel of one token (of every head)
            return x

    other = network.copy()
    other.layers[1].wire(wire).ops.append(Spike())
    found = measure_outliers(other, ids_BT, surfaces=1)
    before = measure_outliers(network, ids_BT, at=[(1, wire)])
    column = MEASURED_WIRES.index(wire)
    rms_bound = found.worst_peak_to_rms_LW[1, column]
    assert found.largest_LW[1, column] == 1e4
    assert rms_bound > before.worst_peak_to_rms_LW[1, column]
    (surface,) = measure_outliers(other, ids_BT, at=[(1, wire)]).surfaces
    token, channel = np.unravel_index(surface.peaks_TC.argmax(), surface.peaks_TC.shape)
    assert (token * surface.step_tokens, channel * surface.step_channels) == (3, 1)
    np.testing.assert_array_equal(found.kurtosis_LW[0], before.kurtosis_LW[0])  # layer 0 stands before it


def test_means_are_over_all_rows_of_all_windows(network: Network, ids_BT: Tensor) -> None:
    seen: list[Tensor] = []
    handle = network.layers[1].wire("key").register_forward_hook(lambda _m, _a, out: seen.append(out))
    try:
        with torch.no_grad():
            for ids_T in ids_BT:
                network.hidden(ids_T[None])
    finally:
        handle.remove()
    x_RC = torch.cat([x.flatten(0, 2) for x in seen])
    place = 1, MEASURED_WIRES.index("key")
    found = measure_outliers(network, ids_BT)
    assert found.tokens == ids_BT.numel()
    assert found.kurtosis_LW[place] == pytest.approx(kurtosis(x_RC).mean().item())
    assert found.peak_to_rms_LW[place] == pytest.approx(peak_to_rms(x_RC).mean().item())
    assert found.worst_peak_to_rms_LW[place] == pytest.approx(peak_to_rms(x_RC).max().item())
    assert found.largest_LW[place] == x_RC.abs().max().item()


def test_surfaces_are_the_worst_places_or_the_given_ones(network: Network, ids_BT: Tensor) -> None:
    worst = measure_outliers(network, ids_BT, surfaces=3)
    order = np.argsort(-worst.kurtosis_LW, axis=None)[:3]
    rows, columns = np.unravel_index(order, worst.kurtosis_LW.shape)
    assert worst.places == tuple((int(i), MEASURED_WIRES[j]) for i, j in zip(rows, columns, strict=True))
    assert measure_outliers(network, ids_BT, at=worst.places[::-1]).places == worst.places[::-1]
    assert measure_outliers(network, ids_BT, surfaces=0).surfaces == ()


def test_the_network_is_left_as_it_was(network: Network, ids_BT: Tensor) -> None:
    with torch.no_grad():
        before = network.hidden(ids_BT)
        measure_outliers(network, ids_BT)
        assert torch.equal(network.hidden(ids_BT), before)
    assert not any(layer.wire(wire)._forward_hooks for layer in network.layers for wire in MEASURED_WIRES)


@pytest.mark.parametrize("bad", [(0, "query"), (99, "down"), (-1, "down")])
def test_a_place_that_is_not_there(network: Network, ids_BT: Tensor, bad: tuple[int, str]) -> None:
    with pytest.raises(ValueError, match="no wire"):
        measure_outliers(network, ids_BT, at=[bad])


def test_no_window(network: Network) -> None:
    with pytest.raises(ValueError, match="not empty"):
        measure_outliers(network, torch.empty(0, 8, dtype=torch.long))


@pytest.mark.parametrize("surfaces", [0, 2])
def test_saved_and_loaded_is_the_same(network: Network, ids_BT: Tensor, tmp_path: Path, surfaces: int) -> None:
    saved = measure_outliers(network, ids_BT, surfaces=surfaces)
    loaded = Outliers.load(saved.save(tmp_path / "outliers.npz"))
    assert (loaded.wires, loaded.tokens, loaded.places) == (saved.wires, saved.tokens, saved.places)
    for table in TABLES:
        np.testing.assert_array_equal(getattr(loaded, table), getattr(saved, table))
    for ours, theirs in zip(saved.surfaces, loaded.surfaces, strict=True):
        np.testing.assert_array_equal(ours.peaks_TC, theirs.peaks_TC)
        assert (ours.step_tokens, ours.step_channels) == (theirs.step_tokens, theirs.step_channels)
    assert [path.name for path in tmp_path.iterdir()] == ["outliers.npz"]


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut short"])
def test_a_broken_file_is_an_error_that_says_so(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "outliers.npz"
    path.write_bytes(content)
    with pytest.raises(SpinfoldError, match="can't be read"):
        Outliers.load(path)
    with pytest.raises(SpinfoldError, match="can't be read"):
        Outliers.load(tmp_path / "absent.npz")
