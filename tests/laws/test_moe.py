"""Layers of experts in the network view: every expert is a linear of its own, the router is folded and left alone, and
each expert is rounded against the tokens that meet it.

Shapes: T tokens, K experts of a token, D residual width, F expert width, I in features.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig

import spinfold
from spinfold.checkpoint import load_run, save_folder
from spinfold.errors import SpinfoldError
from spinfold.evaluation import prove_same_function, take_fingerprint
from spinfold.fitting.capture import capture, second_moments
from spinfold.folding import fold, fold_norms
from spinfold.formats import IntFormat, fake_quantize
from spinfold.maps import Diagonal, SiteMaps, random_orthogonal
from spinfold.networks import Layer, Network
from spinfold.networks.sources import resolve
from spinfold.plan import plan_run
from spinfold.progress import Quiet
from spinfold.recipe import Recipe
from spinfold.rounding import round_network
from spinfold.rounding.stream import Stream, moments_of
from spinfold.runtime import Quantize, quantize_wires, round_weights_through

IDS_BT = zoo.random_tokens(1, 2, 24)
TEXT = "The rain in Spain stays mainly in the plain; the theatre in the north is there.\n" * 100


def tiny(family: str, dtype: torch.dtype = torch.float64) -> Network:
    return Network(zoo.EXPERTS[family](1, 96, torch.float32)).to(dtype=dtype)


def maps_for(network: Network, seed: int = 0) -> SiteMaps:
    layers = network.layers
    return SiteMaps(
        residual=random_orthogonal(network.hidden_size, seed),
        value=tuple(random_orthogonal(x.head_dim, seed + 10 + x.index) for x in layers),
        query_key=tuple(random_orthogonal(x.head_dim, seed + 20 + x.index) for x in layers),
        down=tuple(random_orthogonal(x.mlp_width, seed + 30 + x.index) for x in layers),
    )


def routed(network: Network, layer: Layer, wire: str, ids_BT: Tensor = IDS_BT) -> tuple[Tensor, Tensor]:
    """What a wire of experts carries and which experts read it, `(T, K)`."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = layer.wire(wire).register_forward_hook(lambda _, args, x: seen.append((x, args[1])))
    network.hidden(ids_BT)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", zoo.EXPERTS)
def test_every_weight_is_one_linear_or_none_at_all(family: str) -> None:
    network = tiny(family)
    experts = getattr(network.config, "num_experts", None) or network.config.num_local_experts
    sparse = [any(x.role == "router" for x in layer.foldable) for layer in network.layers]
    assert sparse == ([True, False] if family.endswith("mixed") else [True, True])
    assert [len(layer.linears) for layer in network.layers] == [4 + 3 * (experts if s else 1) for s in sparse]
    for linear in network.linears:
        linear.weight_OI.fill_(7)  # each element once, and nothing but the linears
    left = {name for name, value in network.model.named_parameters() if not bool((value == 7).all())}
    assert all(
        "norm" in name or name.endswith(("gate.weight", "embed_tokens.weight", "lm_head.weight")) for name in left
    )
    assert len([name for name in left if name.endswith("mlp.gate.weight")]) == sum(sparse)
    total = sum(linear.weight_OI.numel() for linear in network.linears)
    assert total == sum(p.numel() for name, p in network.model.named_parameters() if name not in left)


@pytest.mark.parametrize("family", zoo.EXPERTS)
def test_the_linears_are_the_experts(family: str) -> None:
    """The block's output from the named views: Σ_k share down(act(gate x) * up x)."""
    network = tiny(family)
    layer = network.layers[0]
    found: list[Tensor] = []
    block = layer.module.get_submodule("mlp")
    handle = block.register_forward_hook(lambda _, __, y: found.append(y))
    x, experts_TK = routed(network, layer, "mlp_input")
    handle.remove()
    router = next(linear for linear in layer.foldable if linear.role == "router")
    scores_TE = F.linear(x[0], router.weight_OI).float().softmax(-1)
    share_TK = scores_TE.gather(1, experts_TK)
    if getattr(network.config, "norm_topk_prob", True):
        share_TK = share_TK / share_TK.sum(-1, keepdim=True)
    expected = torch.zeros_like(x[0])
    for t, experts in enumerate(experts_TK.tolist()):
        for k, e in enumerate(experts):
            gate, up, down = (layer.linears[f"{role}@{e}"].weight_OI for role in ("gate", "up", "down"))
            expected[t] += share_TK[t, k] * (down @ (F.silu(gate @ x[0, t]) * (up @ x[0, t])))
    torch.testing.assert_close(found[0].flatten(0, 1), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("place", ["mlp.shared_expert", "mlp.gate_proj", "mlp.experts.gate_proj"])
def test_a_parameter_beside_the_experts_is_refused(place: str) -> None:
    """A name that is known of dense layers is none that is known of a layer of experts."""
    model = zoo.EXPERTS["qwen3_moe"](0)
    owner, _, name = place.rpartition(".")
    model.base_model.layers[1].get_submodule(owner).add_module(name, nn.Linear(96, 96))
    with pytest.raises(SpinfoldError, match=r"layers\.1\." + place):
        Network(model)


@pytest.mark.parametrize("forget", ["router", "gate@1", "down@2"])
def test_one_forgotten_linear_breaks_the_law(forget: str) -> None:
    network = tiny("mixtral")
    original = take_fingerprint(network, IDS_BT)
    fold_norms(network)
    linear = next(x for x in network.layers[0].foldable if x.key == forget)
    before = linear.weight_OI.clone()
    fold(network, maps_for(network))
    folded = linear.weight_OI.clone()
    assert prove_same_function(network, original).ok
    linear.weight_OI.copy_(before)
    assert prove_same_function(network, original).measured > 1e-3
    linear.weight_OI.copy_(folded)
    assert prove_same_function(network, original).ok


def test_the_router_reads_what_is_not_quantized() -> None:
    network = tiny("qwen3_moe")
    layer = network.layers[0]
    x, experts_TK = routed(network, layer, "mlp_input")
    before = network(IDS_BT)
    layer.wire("mlp_input").ops.append(Quantize(IntFormat(2, False)))
    coarse, same_TK = routed(network, layer, "mlp_input")
    assert torch.equal(experts_TK, same_TK)
    assert not torch.allclose(coarse, x, atol=0.1)
    assert not torch.allclose(network(IDS_BT), before, atol=0.1)


@pytest.mark.parametrize("family", zoo.EXPERTS)
@pytest.mark.parametrize("weights", [None, IntFormat(4, True), IntFormat(3, False, 8)], ids=str)
def test_rounding_through_maps_is_rounding_after_the_fold(family: str, weights: IntFormat | None) -> None:
    network = tiny(family)
    fold_norms(network)
    maps, recipe, folded = maps_for(network), Recipe(bits="W4A8KV8"), network.copy()
    untouched = network(IDS_BT)
    take_off = [quantize_wires(network, recipe, maps)]
    if weights is not None:
        take_off.append(round_weights_through(network, weights, maps))
    seen = network(IDS_BT)
    fold(folded, maps)
    for linear in folded.linears if weights else ():
        linear.weight_OI.copy_(fake_quantize(linear.weight_OI.clone(), weights))
    quantize_wires(folded, recipe)
    torch.testing.assert_close(seen, folded(IDS_BT), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(seen, untouched, atol=1e-2), "nothing was quantized"
    for undo in take_off:
        undo()
    assert torch.equal(network(IDS_BT), untouched)


def test_scales_behind_the_norm_reach_the_router() -> None:
    network = tiny("mixtral")
    original = take_fingerprint(network, IDS_BT)
    draws = torch.Generator().manual_seed(0)
    scales = [Diagonal(torch.rand(96, generator=draws, dtype=torch.float64) + 0.5) for _ in network.layers]
    fold(network, SiteMaps(mlp_input=tuple(scales)))
    assert (proof := prove_same_function(network, original)).ok, proof


@pytest.mark.parametrize("family", zoo.EXPERTS)
def test_a_basis_of_its_own_at_every_boundary(family: str) -> None:
    """The skip connection past a layer of experts changes the basis where their sum joins it."""
    network = tiny(family)
    original = take_fingerprint(network, IDS_BT)
    fold_norms(network)
    bases = tuple(random_orthogonal(network.hidden_size, i) for i in range(2 * len(network.layers) + 1))
    fold(network, SiteMaps(residual=bases))
    assert (proof := prove_same_function(network, original)).ok, proof


def test_gradients_reach_every_expert() -> None:
    network = tiny("qwen3_moe")
    module = network.layers[0].linears["down@0"].module
    for name in ("gate_up_proj", "down_proj"):
        getattr(module, name).requires_grad_()
    _, experts_TK = routed(network, network.layers[0], "down")
    network(IDS_BT).square().mean().backward()
    met = sorted(experts_TK.unique().tolist())
    for name in ("gate_up_proj", "down_proj"):
        norm_E = getattr(module, name).grad.flatten(1).norm(dim=1)
        assert norm_E.nonzero().flatten().tolist() == met


@pytest.mark.parametrize("wire", ["mlp_input", "down"])
@pytest.mark.parametrize("windows", [(1, 3), (4, 100)], ids=str)
def test_an_expert_has_the_hessian_of_its_tokens(wire: str, windows: tuple[int, int]) -> None:
    """Against a loop over tokens, the mean of all experts making up for tokens that are missing."""
    network = tiny("qwen3_moe", torch.float32)
    layer, ids_BT = network.layers[0], zoo.random_tokens(2, *windows)
    x, experts_TK = routed(network, layer, wire, ids_BT)
    rows: dict[int, list[Tensor]] = {}
    for t, experts in enumerate(experts_TK.tolist()):
        for k, e in enumerate(experts):
            rows.setdefault(e, []).append((x[0, k, t] if wire == "down" else x[0, t]).double())
    own = {e: torch.stack(r).T @ torch.stack(r) / len(r) for e, r in rows.items()}
    total = sum(map(len, rows.values()))
    mean_II = torch.stack([own[e] * len(rows[e]) / total for e in own]).sum(0)

    stream = Stream(network, ids_BT, "fp32")
    found = {e: moments.hessian_II for e, moments in moments_of(stream, layer, wire, range(6))}
    assert list(found) == list(range(6))
    for e, hessian_II in found.items():
        share = min(1.0, len(rows.get(e, ())) / len(mean_II))
        expected = own[e] * share + mean_II * (1 - share) if e in own else mean_II
        torch.testing.assert_close(hessian_II, expected, rtol=1e-4, atol=1e-5)
    few = windows[0] == 1
    assert (len(rows) < 6) == few, "experts that no token meets"
    assert any(len(r) >= len(mean_II) for r in rows.values()) != few, "experts with tokens enough"


@pytest.mark.parametrize("family", zoo.EXPERTS)
@pytest.mark.parametrize("method", ["rtn", "gptq", "gptaq"])
def test_every_expert_gets_onto_its_grid(family: str, method: str) -> None:
    network = tiny(family, torch.float32)
    recipe = Recipe(bits="W4A16KV16").with_(rounding__method=method)
    before = {(x.layer, x.key): x.weight_OI.clone() for x in network.linears}
    rounded = [one for layer in round_network(network, recipe, zoo.random_tokens(3, 8, 64)) for one in layer]
    assert {(x.layer, x.key) for x in rounded} == before.keys()
    for one in rounded:
        w_OI = network.layers[one.layer].linears[one.key].weight_OI
        assert torch.equal(w_OI, one.weight.dequantize())
        assert (w_OI - before[one.layer, one.key]).norm() < 0.5 * w_OI.norm()
    if method != "rtn":
        errors = [(x.error, x.nearest_error) for x in rounded if "@" in x.key]
        assert all(a is not None and b is not None and a < b for a, b in errors)


def test_wires_of_experts_are_captured_by_token() -> None:
    network = tiny("qwen3_moe", torch.float32)
    ids_WT = zoo.random_tokens(4, 4, 32)
    x, experts_TK = routed(network, network.layers[1], "down", ids_WT)
    some = capture(network, ids_WT, ["down", "mlp_input"], 40, seed=0, compute="fp32")
    every = capture(network, ids_WT, ["down", "mlp_input"], None, seed=0, compute="fp32")
    assert some[1, "down"].shape == (40 * experts_TK.shape[1], 80)
    assert some[1, "mlp_input"].shape == (40, 96)
    torch.testing.assert_close(every[1, "down"], x[0].transpose(0, 1).flatten(0, 1))
    moment_NN = dict(second_moments(network, ids_WT, ["down"], compute="fp32"))[1]["down"]
    torch.testing.assert_close(moment_NN.float(), every[1, "down"].T @ every[1, "down"] / len(every[1, "down"]))


@pytest.mark.parametrize("family", zoo.EXPERTS)
def test_a_rotated_folder_is_the_same_model_under_the_published_names(family: str, tmp_path: Path) -> None:
    source = zoo.save(zoo.EXPERTS[family](2), tmp_path / "model")
    network = Network(resolve(source).load_model())
    original = take_fingerprint(network, IDS_BT)
    network.untie()
    fold_norms(network)
    maps = maps_for(network)
    fold(network, SiteMaps(residual=maps.residual, value=maps.value))
    save_folder(network.copy(), tmp_path / "rotated", torch.float32)
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "rotated"))
    assert {name: x.shape for name, x in old.items()} == {name: x.shape for name, x in new.items()}
    assert not any(torch.equal(new[name], x) for name, x in old.items() if "experts" in name or "gate" in name)
    again = Network(resolve(tmp_path / "rotated").load_model())
    assert (proof := prove_same_function(again, original)).ok, proof


class StopsAtTheEnd(Quiet):
    """Lets a run go until all layers are rounded and none is written."""

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Any]:
        if name == "write checkpoint":
            raise KeyboardInterrupt
        return super().stage(name, total)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe_mixed"])
def test_a_run_comes_back_as_it_was(family: str, tmp_path: Path) -> None:
    """And one that was stopped ends with the same bytes."""
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    calibration = {"source": str(tmp_path / "text.txt"), "samples": 4, "seq_len": 32}
    recipe = Recipe.parse({"method": "smoothquant", "bits": "W4A8KV8", "calibration": calibration})
    model = str(zoo.write_tiny_tokenizer(zoo.save(zoo.EXPERTS[family](), tmp_path / "model")))
    run = spinfold.quantize(model, tmp_path / "whole", recipe, device="cpu")
    file = run.path / "model" / "model.safetensors"
    tensors = load_file(file)
    assert not any("experts" in name for name in tensors)
    expected = tensors["layers.0.gate@2.q"] * tensors["layers.0.gate@2.scale"]
    network = load_run(run.path, torch.device("cpu"))
    torch.testing.assert_close(network.layers[0].linears["gate@2"].weight_OI, expected, rtol=0, atol=0)

    with pytest.raises(KeyboardInterrupt):
        spinfold.quantize(model, tmp_path / "halves", recipe, device="cpu", progress=StopsAtTheEnd())
    resumed = spinfold.quantize(model, tmp_path / "halves", recipe, device="cpu", resume=True)
    assert (resumed.path / "model" / "model.safetensors").read_bytes() == file.read_bytes()
    both = (sorted(one.data["rounding"], key=str) for one in (run, resumed))
    assert next(both) == next(both)


def config(**changes: object) -> object:
    return AutoConfig.for_model(
        "qwen3_moe", hidden_size=96, head_dim=32, num_attention_heads=4, num_hidden_layers=2, **changes
    )


def test_a_group_size_must_divide_the_inputs_of_experts() -> None:
    recipe = Recipe(bits="W4A16KV16").with_(group_size=32, calibration__seq_len=64)
    plan_run(config(intermediate_size=160, moe_intermediate_size=64), recipe)
    plan_run(config(intermediate_size=161, moe_intermediate_size=64), recipe)  # no layer has an MLP of that width
    refused: list[Callable[[], object]] = [
        lambda: config(intermediate_size=160, moe_intermediate_size=80),
        lambda: config(intermediate_size=161, moe_intermediate_size=64, mlp_only_layers=[1]),
        lambda: config(intermediate_size=161, moe_intermediate_size=64, decoder_sparse_step=2),
    ]
    for build in refused:
        with pytest.raises(SpinfoldError, match="group size of 32"):
            plan_run(build(), recipe)


def test_optrot_plus_wants_layers_of_one_width() -> None:
    recipe = Recipe(bits="W4A16KV16").with_(method="optrot-plus", calibration__seq_len=64)
    plan_run(config(moe_intermediate_size=64), recipe)
    with pytest.raises(SpinfoldError, match="one width"):
        plan_run(config(moe_intermediate_size=64, mlp_only_layers=[0]), recipe)
