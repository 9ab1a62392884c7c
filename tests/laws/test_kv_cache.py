"""The KV cache: what one pass computes is what a cache computes that is filled token by token, for every option.

The reference here goes by the definition, query by query: it builds what each query may see from the tokens that there
are at its time, and nothing else.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from spinfold.errors import SpinfoldError
from spinfold.export.cache import HeldLayer, quantize_cache
from spinfold.fitting.clipping import CLIP_RATIOS, search_clips
from spinfold.folding import fold
from spinfold.formats import CacheFormat, Format, IntFormat, fake_quantize
from spinfold.formats.cache import tokens_of
from spinfold.maps import Hadamard, SiteMaps
from spinfold.networks import Attended, Network
from spinfold.recipe import Recipe
from spinfold.runtime import QuantizeCache, cache_quantizer, quantize_wires

IDS = zoo.random_tokens(5)
BUILD = zoo.FAMILIES | zoo.EXPERTS
OPTIONS: dict[str, dict[str, Any]] = {
    "group": {"key_group": 8},
    "both groups": {"key_group": 4, "value_group": 6},
    "before rope": {"before_rope": True},
    "sink": {"sink": 3},
    "residual": {"residual": 7},
    "symmetric": {"symmetric": True, "residual": 1},
    "kivi": {"key_group": 8, "residual": 8},
    "kvquant": {"key_group": 5, "before_rope": True, "sink": 1},
    "amxfp4": {"format": "amxfp4", "sink": 2, "residual": 5},
    "nvfp4": {"format": "nvfp4", "before_rope": True, "residual": 3, "clip": 0.9},
    "all": {"key_group": 4, "value_group": 2, "before_rope": True, "sink": 2, "residual": 5, "clip": 0.9},
}


def recipe_of(options: dict[str, Any], bits: str = "W16A16K4V2") -> Recipe:
    return Recipe.parse({"bits": bits, "kv": options})


def bits_of(name: str) -> str:
    return "KV4" if "format" in OPTIONS[name] else "K4V2"


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


# ---- the definition ------------------------------------------------------------------------------------------------


COUNTS = st.integers(0, 9)


@given(COUNTS, COUNTS, st.sampled_from([None, 2, 3, 4]), st.integers(0, 40))
def test_a_token_is_quantized_once_and_late_enough(sink: int, residual: int, group: int | None, tokens: int) -> None:
    format = CacheFormat(IntFormat(4, False, group), IntFormat(2, False), sink=sink, residual=residual)
    first, end = format.span(tokens)
    assert first == min(sink, tokens)
    assert (end - first) % format.group == 0
    assert end == first or end <= tokens - residual
    assert tokens - residual - end < format.group or end == first  # and no later than it may be
    assert format.span(tokens + 1)[1] >= end
    assert int(format.ends(torch.tensor(tokens))) == (end if tokens >= sink else sink)


def attend_by_definition(
    x: dict[str, Tensor], format: CacheFormat, rope: Any, positions_BT: Tensor, mask_TS: Tensor
) -> Tensor:
    """What each query gets, one query and one token at a time."""

    def seen(name: str, grid: Format | None, count: int) -> Tensor:
        whole = x[name][:, :, :count]
        first, end = format.span(count)
        out = whole.clone()
        for start in range(first, end, format.group):
            size = (tokens_of(grid) if grid else None) or 1
            for part in range(start, start + format.group, size):
                block = whole[:, :, part : part + size]
                if grid is None:
                    continue
                turned = name == "key" and format.before_rope
                if turned:
                    block = rope.turn_back(block, positions_BT[:, part : part + size])
                block = fake_quantize(block.mT, grid).mT if tokens_of(grid) else fake_quantize(block, grid)
                if turned:
                    block = rope.turn(block, positions_BT[:, part : part + size])
                out[:, :, part : part + size] = block
        return out

    outs = []
    for t in range(x["query"].shape[2]):
        key, value = seen("key", format.key, t + 1), seen("value", format.value, t + 1)
        scores = (x["query"][:, :, t : t + 1] @ key.mT).masked_fill(~mask_TS[t, : t + 1], -torch.inf)
        outs.append(scores.softmax(-1) @ value)
    return torch.cat(outs, 2)


@pytest.mark.parametrize("window", [None, 6], ids=["causal", "sliding"])
@pytest.mark.parametrize(
    ("name", "bits"), [*((name, bits_of(name)) for name in OPTIONS), ("all", "K16V3"), ("all", "K4V16")]
)
def test_one_pass_sees_what_each_query_would(name: str, bits: str, window: int | None) -> None:
    format = recipe_of(OPTIONS[name], f"W16A16{bits}").kv_format
    assert format is not None
    layer = Network(BUILD["qwen3" if "format" in OPTIONS[name] else "llama"]()).layers[0]
    rope, num_tokens, generator = layer.rope, 23, torch.Generator().manual_seed(0)
    rope.positions_BT = torch.arange(num_tokens)[None] + 2
    shape = 2, 3, num_tokens, layer.head_dim
    x = {k: torch.randn(shape, generator=generator, dtype=torch.float64) for k in ("query", "key", "value")}
    mask = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    mask = mask if window is None else mask.triu(1 - window)
    given_mask = None if window is None else mask[None, None].expand(2, 1, -1, -1)
    quantizers = [None if one is None else cache_quantizer(one)(one) for one in (format.key, format.value)]
    op = QuantizeCache(format, quantizers[0], quantizers[1], rope)
    key, value, out_mask, _ = op(Attended(x["key"], x["value"], given_mask, num_tokens))
    scores = (x["query"] @ key.mT).masked_fill(~(mask if out_mask is None else out_mask), -torch.inf)
    expected = attend_by_definition(x, format, rope, rope.positions_BT, mask)
    assert relative(scores.softmax(-1) @ value, expected) <= 1e-12


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
def test_rope_is_what_transformers_did(family: str) -> None:
    """Turned back, keys of all positions are what the projection gave; a scaling of RoPE is undone as well."""
    network = Network(BUILD[family]()).to(dtype=torch.float64)
    layer, seen = network.layers[0], []
    layer.wire("key").register_forward_hook(lambda _, __, x: seen.append(x))
    network(IDS)
    positions_BT = layer.rope.positions_BT
    plain = layer.rope.turn_back(seen[0], positions_BT)
    assert relative(layer.rope.turn(plain, positions_BT), seen[0]) <= 1e-12
    network(IDS.new_full(IDS.shape, 7))  # one token, so before RoPE all keys of the first layer are the same
    same = layer.rope.turn_back(seen[1], positions_BT)
    assert relative(same, same[:, :, :1].expand_as(same)) <= 1e-6
    assert relative(seen[1], seen[1][:, :, :1].expand_as(same)) > 0.1


# ---- the real cache ------------------------------------------------------------------------------------------------


def cached_logits(model: Any, ids_BT: Tensor, sizes: list[int], **first: Any) -> tuple[Tensor, Any]:
    """Logits of a text that comes in pieces, and the cache."""
    cache: Any = None
    parts: list[Tensor] = []
    for piece_BT in ids_BT.split(sizes, dim=1):
        output = model(piece_BT, past_key_values=cache, use_cache=True)
        cache, parts = output.past_key_values, [*parts, output.logits]
    return torch.cat(parts, 1), cache


def network_of(family: str, options: dict[str, Any], bits: str = "W16A16K4V2") -> Network:
    """In fp64, so that no number falls to the other side of a tie since it was computed in another order."""
    recipe, network = recipe_of(options, bits), Network(BUILD[family]()).to(dtype=torch.float64)
    if recipe.keys_behind_rope:
        fold(network, SiteMaps(query_key=tuple(Hadamard(x.head_dim, x.index) for x in network.layers)))
    quantize_wires(network, recipe)
    return network


CELLS = [("llama", name, "W16A16K4V2") for name, options in OPTIONS.items() if "format" not in options]
CELLS += [(family, name, "W16A16KV4") for family in ("qwen3", "mistral", "gemma3") for name in ("amxfp4", "nvfp4")]
CELLS += [("qwen3", "nvfp4", "W16A16K16V4"), ("gemma2", "kivi", "W16A16K4V2")]
CELLS += [(family, "all", "W16A16K4V2") for family in ("mistral", "qwen3", "phi3", "gemma2", "gemma3", "mixtral")]
CELLS += [("olmo2", "all", "W16A16K3V16"), ("olmo2", "all", "W16A16K16V2")]


@pytest.mark.parametrize(("family", "name", "bits"), CELLS)
@torch.no_grad()
def test_the_real_cache_is_fake_quantization(family: str, name: str, bits: str) -> None:
    """Token by token, in pieces, and at once: the logits of one pass."""
    network = network_of(family, OPTIONS[name], bits)
    expected = network(IDS)
    quantize_cache(network.model.base_model)
    assert relative(network(IDS), expected) <= 1e-12
    length = IDS.shape[1]
    for sizes in ([2, 9, *[1] * 10, length - 21], [length]):
        logits, cache = cached_logits(network.model, IDS, sizes)
        assert relative(logits, expected) <= 1e-9
        assert all(isinstance(layer, HeldLayer) for layer in cache.layers)
        assert cache.get_seq_length() == length


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "amxfp4"])
@pytest.mark.parametrize("family", ["qwen3", "mistral"])
@torch.no_grad()
def test_a_cache_of_blocks_is_fake_quantization(family: str, name: str) -> None:
    """Every token at once, as plain layers of the cache hold it."""
    network = network_of(family, {"format": name}, "W16A16KV4")
    formats = [op.format for wire in ("key", "value") for op in network.layers[0].wire(wire).ops[-1:]]
    assert [(one.element, one.outer) for one in formats] == [("e2m1", "row" if name == "nvfp4" else None)] * 2
    expected = network(IDS)
    quantize_cache(network.model.base_model)
    for sizes in ([2, 9, *[1] * 10, IDS.shape[1] - 21], [IDS.shape[1]]):
        logits, cache = cached_logits(network.model, IDS, sizes)
        assert relative(logits, expected) <= 1e-9
    row = {"mxfp4": 16 + 1, "nvfp4": 16 + 2 + 8, "amxfp4": 16 + 2}[
        name
    ]  # of heads of 32; NVFP4's own scale is fp64 here
    assert (
        {layer.keys.shape[-1] for layer in cache.layers} == {layer.values.shape[-1] for layer in cache.layers} == {row}
    )


@torch.no_grad()
def test_every_token_alone() -> None:
    network = network_of("llama", OPTIONS["all"])
    expected = network(IDS)
    quantize_cache(network.model.base_model)
    assert relative(cached_logits(network.model, IDS, [1] * IDS.shape[1])[0], expected) <= 1e-9


@torch.no_grad()
def test_what_is_held() -> None:
    """Bytes of rows for the span, floating point for the rest, and nothing else."""
    network = network_of("llama", OPTIONS["all"])
    quantize_cache(network.model.base_model)
    layer = cached_logits(network.model, IDS, [IDS.shape[1]])[1].layers[0]
    first, end = recipe_of(OPTIONS["all"]).kv_format.span(40)  # type: ignore[union-attr]
    assert (first, end) == (2, 34)
    row = 24 * (2 + 8 + 1)  # of a group of 4 keys in each of 24 channels: 4 x 4 bits, an fp64 scale, a zero point
    assert (layer.keys.dtype, tuple(layer.keys.shape)) == (torch.uint8, (2, 2, 8, row))
    assert (layer.values.dtype, tuple(layer.values.shape)) == (torch.uint8, (2, 2, 16, 24 * (1 + 8 + 1)))
    assert layer.kept_keys.shape == layer.kept_values.shape == (2, 2, 40 - 32, 24)


@torch.no_grad()
def test_padding_on_the_left_and_beams() -> None:
    """Positions are the text's, tokens are counted with the padding; a beam takes its cache along."""
    network = network_of("llama", {"key_group": 4, "before_rope": True, "residual": 3})
    quantize_cache(network.model.base_model)
    settings: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    alone = network.model.generate(IDS[:1, 3:12], **settings)
    text = torch.cat([torch.zeros(2, 4, dtype=torch.int64), IDS[:, 3:12]], 1)  # a group of padding: the same groups
    mask = (torch.arange(13) >= 4).long().expand(2, -1)
    padded = network.model.generate(text, attention_mask=mask, **settings)
    assert torch.equal(padded[0, 4:], alone[0])
    options = settings | {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
    beams = network.model.generate(IDS[:, :9], **options)
    without = network.model.generate(IDS[:, :9], use_cache=False, **options)
    assert torch.equal(beams.sequences, without.sequences)
    assert relative(beams.sequences_scores, without.sequences_scores) <= 1e-9


@torch.no_grad()
def test_a_cache_that_can_not_know_is_refused() -> None:
    network = network_of("llama", OPTIONS["sink"])
    quantize_cache(network.model.base_model)
    cache = DynamicCache()
    network.model(IDS, past_key_values=cache)
    with pytest.raises(SpinfoldError, match="does not know which"):
        network.model(IDS[:, :1], past_key_values=cache)
    ours = DynamicCache(config=network.model.config)
    network.model(IDS, past_key_values=ours)
    assert not ours.is_croppable
    with pytest.raises(SpinfoldError, match="can't go back"):
        ours.crop(-1)
    ours.reset()
    assert ours.get_seq_length() == 0


# ---- fits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"key_group": 20}, {"key_group": 20, "before_rope": True}, {"sink": 1}], ids=str)
def test_searched_clips_are_the_best_for_what_is_quantized(options: dict[str, Any]) -> None:
    """The search is told apart from the whole range by the error that the cache itself then has."""
    recipe = recipe_of(options | {"clip": "searched"}, "W16A16KV2")
    network = Network(BUILD["llama"]())
    clips = search_clips(network, recipe, IDS)
    assert sorted(clips) == ["0.key", "0.value", "1.key", "1.value"]
    assert clips["0.key"] < 1

    def error(changes: dict[str, float]) -> float:
        """Of the first layer's keys as attention sees them; later layers have other inputs then."""
        seen: list[Attended] = []
        handle = (
            network.layers[0]
            .wire("cache")
            .register_forward_hook(lambda _, before, after: seen.extend((before[0], after)))
        )
        take_off = quantize_wires(network, recipe, clips={**clips, **changes})
        network(IDS)
        take_off()
        handle.remove()
        length = IDS.shape[1]
        return float((seen[1].key_BHSN[:, :, :length] - seen[0].key_BHSN).square().sum())

    assert clips["0.key"] == min(CLIP_RATIOS, key=lambda ratio: error({"0.key": ratio}))


@pytest.mark.parametrize("name", ["kivi", "all"])
def test_a_learned_clip_gets_its_gradient(name: str) -> None:
    network, recipe = Network(BUILD["llama"]()), recipe_of(OPTIONS[name], "W16A16K3V3")
    clips = {place: torch.tensor(0.8, requires_grad=True) for place in ("0.key", "0.value")}
    quantize_wires(network, recipe, clips=clips, scale_gradient=True)
    network(IDS).logsumexp(-1).sum().backward()
    assert all(clip.grad is not None and float(clip.grad.abs()) > 0 for clip in clips.values())
