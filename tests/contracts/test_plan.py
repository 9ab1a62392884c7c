"""What can be refused before a weight is read, is."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinfold.errors import SpinfoldError
from spinfold.methods import METHODS
from spinfold.networks import FAMILIES, SITES, Family
from spinfold.plan import check_output, check_seq_len, plan_run
from spinfold.recipe import Recipe
from spinfold.rotation import sites_of

SUBSETS = [subset for size in range(1, 5) for subset in combinations(SITES, size)]
RECIPE = Recipe().with_(method="quarot", calibration__seq_len=64)


def config(model_type: str = "llama", **changes: Any) -> SimpleNamespace:
    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 4, "head_dim": 24}
    return SimpleNamespace(model_type=model_type, **sizes | {"max_position_embeddings": 256} | changes)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("sites", SUBSETS, ids="+".join)
def test_sites_are_refused_exactly_where_the_family_says_so(family: Family, sites: tuple[str, ...]) -> None:
    recipe = RECIPE.with_(sites=sites)
    if all(family.supports(site) for site in sites):
        plan_run(config(family.model_types[0]), recipe)
        return
    with pytest.raises(SpinfoldError) as caught:
        plan_run(config(family.model_types[0]), recipe)
    advised = caught.value.fix.removeprefix("Use --sites ").removesuffix(".").split(",")
    plan_run(config(family.model_types[0]), recipe.with_(sites=tuple(advised)))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_serves_its_own_sites(method: str) -> None:
    plan_run(config(), RECIPE.with_(method=method))


@given(st.integers(1, 200), st.sampled_from([80, 96, 128]), st.sampled_from([24, 40]), st.sampled_from([160, 192]))
def test_a_group_size_must_divide_every_input(size: int, hidden: int, head_dim: int, mlp: int) -> None:
    widths = (hidden, 4 * head_dim, mlp)
    model = config(hidden_size=hidden, head_dim=head_dim, intermediate_size=mlp)
    recipe = RECIPE.with_(group_size=size)
    if all(width % size == 0 for width in widths):
        plan_run(model, recipe)
        return
    with pytest.raises(SpinfoldError) as caught:
        plan_run(model, recipe)
    for divisor in caught.value.fix.removeprefix("Use one of ").removesuffix(".").split(", "):
        plan_run(model, recipe.with_(group_size=int(divisor)))


def test_groups_of_unrounded_weights_are_refused() -> None:
    with pytest.raises(SpinfoldError, match="16 bits"):
        plan_run(config(), RECIPE.with_(bits="W16A4", group_size=32))


CACHES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a map behind RoPE": ({"sites": ("value", "query_key"), "kv__before_rope": True}, {}, "query_key"),
    "RoPE that changes": (
        {"kv__before_rope": True},
        {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {}}},
        "dynamic",
    ),
    "nothing quantized": ({"kv__sink": 4, "kv__residual": 32, "kv__key_group": 32}, {}, "68"),
}


@pytest.mark.parametrize("case", CACHES)
def test_a_cache_that_can_not_be_had(case: str) -> None:
    changes, model, said = CACHES[case]
    with pytest.raises(SpinfoldError, match=said) as caught:
        plan_run(config(**model), RECIPE.with_(**changes))
    assert "KV cache" in caught.value.what
    plan_run(config(**model), RECIPE.with_(**changes | {"bits": "W4A4KV16"}))


def test_before_rope_leaves_the_map_behind_it_out() -> None:
    recipe = RECIPE.with_(kv__before_rope=True)
    plan_run(config(), recipe)
    assert "query_key" not in sites_of(recipe)
    assert "query_key" in sites_of(recipe.with_(kv__before_rope=False))


def test_the_length_of_a_fits_windows_counts_too() -> None:
    with pytest.raises(SpinfoldError, match="257"):
        plan_run(config(), RECIPE.with_(method="spinquant", fit__seq_len=257))


@given(st.integers(-5, 400))
def test_a_window_fits_the_model_or_is_refused(seq_len: int) -> None:
    if 2 <= seq_len <= 256:
        check_seq_len(config(), seq_len)
    else:
        with pytest.raises(SpinfoldError):
            check_seq_len(config(), seq_len)


def test_an_output_may_be_new_or_empty_however_deep(tmp_path: Path) -> None:
    check_output(tmp_path)
    check_output(tmp_path / "a" / "b" / "c")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("trace", ["run.json", "state/key.json"])
def test_an_earlier_run_may_only_be_resumed(trace: str, tmp_path: Path) -> None:
    (tmp_path / trace).parent.mkdir(exist_ok=True)
    (tmp_path / trace).write_text("{}")
    with pytest.raises(SpinfoldError, match="--resume"):
        check_output(tmp_path)
    check_output(tmp_path, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_anything_else_is_refused_by_name(resume: bool, tmp_path: Path) -> None:
    for name in ("thesis.tex", "b", "c", "d"):
        (tmp_path / name).touch()
    with pytest.raises(SpinfoldError, match=r"b, c, d and 1 more"):
        check_output(tmp_path, resume)


@pytest.mark.parametrize("kind", ["file", "broken link"])
@pytest.mark.parametrize("below", ["", "run"])
def test_a_file_in_the_way_is_refused(kind: str, below: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.touch() if kind == "file" else path.symlink_to(tmp_path / "gone")
    with pytest.raises(SpinfoldError, match="not a folder"):
        check_output(path / below)
