"""A recipe is the whole choice, strict about what it does not know."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from spinfold.errors import SpinfoldError
from spinfold.formats import CacheFormat, IntFormat
from spinfold.methods import METHODS
from spinfold.recipe import Bits, Recipe, RoundingMethod, presets

BITS = st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16])
RECIPES = st.builds(
    lambda bits, **fields: Recipe().with_(bits=str(Bits(*bits)), **fields),
    st.tuples(BITS, BITS, BITS, BITS),
    method=st.sampled_from(sorted(METHODS)),
    sites=st.lists(st.sampled_from(["residual", "value", "query_key", "down"])).map(tuple),
    group_size=st.none() | st.integers(1, 4096),
    rounding__method=st.sampled_from(get_args(RoundingMethod)),
    overrides=st.lists(
        st.fixed_dictionaries(
            {"match": st.sampled_from(["layers.*", "layers.0.[qk]"])},
            optional={
                "bits": st.integers(2, 8),
                "group_size": st.just("row") | st.integers(1, 64),
                "symmetric": st.booleans(),
            },
        ),
        max_size=3,
    ),
    budget=st.none() | st.floats(2.1, 15),
    rounding__damp=st.floats(1e-6, 1),
    activations__clip=st.floats(0.1, 1),
    calibration__source=st.text(st.characters(categories=["L", "N", "P", "Zs"]), min_size=1),
    fit__learning_rate=st.none() | st.floats(1e-9, 1e3),
    seed=st.integers(0, 2**63 - 1),
)


def test_the_papers_have_presets() -> None:
    assert {"none", "quarot", "quarot-paper", "spinquant"} <= set(presets())


@pytest.mark.parametrize("name", presets())
def test_presets_load_and_name_a_method(name: str) -> None:
    recipe = Recipe.load(name)
    method = METHODS[recipe.method]
    assert set(recipe.sites or ()) <= set(method.allowed)
    assert name.startswith(recipe.method)


def test_presets_hold_the_published_settings() -> None:
    quarot, spinquant = Recipe.load("quarot-paper"), Recipe.load("spinquant")
    assert (quarot.activations.symmetric, quarot.activations.clip, quarot.kv.symmetric, quarot.kv.clip) == (
        True,
        0.9,
        False,
        0.95,
    )
    assert (spinquant.fit.learning_rate, spinquant.fit.step_rule, spinquant.fit.weight_bits) == (1.5, "capped", 16)
    assert spinquant.activations.per_head
    assert not spinquant.rounding.act_order


@given(RECIPES)
@settings(deadline=None)
def test_a_written_recipe_is_the_same_recipe(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(recipe.to_yaml(), "utf-8")
    assert Recipe.load(path) == recipe
    assert Recipe.load(path).fingerprint() == recipe.fingerprint()


def test_the_order_of_sites_does_not_matter() -> None:
    assert Recipe(sites=("down", "residual")) == Recipe(sites=("residual", "down"))


@pytest.mark.parametrize("field", ["seed", "bits", "method", "group_size"])
def test_each_field_counts_in_the_fingerprint(field: str) -> None:
    other = {"seed": 1, "bits": "W4A16KV16", "method": "none", "group_size": 32}[field]
    assert Recipe().with_(**{field: other}).fingerprint() != Recipe().fingerprint()


REFUSED = {
    "unknown key": ({"metod": "quarot"}, "'method'"),
    "unknown nested key": ({"fit": {"step": 3}}, "'steps'"),
    "bits": ({"bits": "W9Z4"}, "W9Z4"),
    "nine bits": ({"bits": "W9A4"}, "W9A4"),
    "one bit": ({"bits": "W1A4"}, "W1A4"),
    "site": ({"sites": ["residual", "elbow"]}, "elbow"),
    "newer": ({"schema_version": 2}, "newer spinfold"),
    "half a cache": ({"bits": "W4A4K4"}, "W4A4K4"),
    "group of one token": ({"kv": {"key_group": 1}}, "kv.key_group"),
    "zero length": ({"calibration": {"seq_len": 0}}, "calibration.seq_len"),
    "zero group": ({"group_size": 0}, "group_size"),
    "clip": ({"activations": {"clip": 1.5}}, "activations.clip"),
    "seed": ({"seed": -1}, "seed"),
    "not a number": ({"rounding": {"damp": "much"}}, "rounding.damp"),
    "override": ({"overrides": [{"match": "layers.*", "bitz": 3}]}, "bitz"),
    "absorbs nothing": ({"rounding": {"method": "autoround", "absorb": 0.1}}, "autoround"),
    "not a section": ({"fit": 3}, "fit"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_by_name(case: str, tmp_path: Path) -> None:
    data, named = REFUSED[case]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data), "utf-8")
    with pytest.raises(SpinfoldError) as caught:
        Recipe.load(path)
    assert named in str(caught.value)
    assert caught.value.what
    assert caught.value.why
    assert caught.value.fix


@pytest.mark.parametrize(
    "content", [b"", b"- a\n- b\n", b"method: [", b"\xff\xfe\x00", b"just text", b"a: !!python/object:os.x"]
)
def test_a_file_that_is_no_recipe_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(SpinfoldError):
        Recipe.load(path)


def test_a_misspelt_preset_is_answered_with_the_nearest() -> None:
    with pytest.raises(SpinfoldError, match="'spinquant'"):
        Recipe.load("spinquand")


@given(st.tuples(BITS, BITS, BITS, BITS))
def test_bits_notation_round_trips(bits: tuple[int, int, int, int]) -> None:
    assert Bits.parse(str(Bits(*bits))) == bits


@pytest.mark.parametrize(
    ("text", "bits", "written"),
    [
        ("w4a8", (4, 8, 16, 16), "W4A8KV16"),
        ("W4A4K4V2", (4, 4, 4, 2), "W4A4K4V2"),
        ("W16A16k16v2", (16, 16, 16, 2), "W16A16K16V2"),
        ("W4A4K3V3", (4, 4, 3, 3), "W4A4KV3"),
    ],
)
def test_keys_and_values_can_have_bits_of_their_own(text: str, bits: tuple[int, ...], written: str) -> None:
    assert (Bits.parse(text), str(Bits.parse(text))) == (bits, written)


def test_the_cache_format_is_what_the_recipe_says() -> None:
    kv = {"key_group": 32, "before_rope": True, "sink": 4, "residual": 128, "symmetric": True, "clip": 0.9}
    key, value = IntFormat(4, True, 32, 0.9), IntFormat(2, True, None, 0.9)
    assert Recipe.parse({"bits": "W4A4K4V2", "kv": kv}).kv_format == CacheFormat(key, value, True, 4, 128)
    only_values = Recipe.parse({"bits": "W4A4K16V2", "kv": kv}).kv_format
    assert only_values == CacheFormat(None, value, False, 4, 128)
    assert Recipe.parse({"bits": "W4A4", "kv": kv}).kv_format is None
    assert Recipe.parse({"bits": "W4A4KV4"}).kv_format.by_token  # type: ignore[union-attr]
