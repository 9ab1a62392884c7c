"""The Transformers plugin: what `from_pretrained` gives is the run, packed in memory, and nothing it is not told to be.

Every family once, each with other bits, groups and signs, so that all of these are covered without their product.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from tiny_run import unsettle
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, DynamicCache, logging
from transformers.models.llama import LlamaConfig, LlamaForCausalLM

from spinfold.checkpoint import load_maps, load_run, save_clips, save_maps, save_model
from spinfold.errors import SpinfoldError
from spinfold.export import check as checks
from spinfold.export.cache import QuantizedCache, QuantizedLayer, decode_rows, encode_rows
from spinfold.export.contents import Contents
from spinfold.export.packed import PackedWeight, packed_tensors
from spinfold.export.quantizer import SpinfoldConfig, digest
from spinfold.export.targets import BOUNDS
from spinfold.export.transformers import write
from spinfold.files import write_json
from spinfold.folding import fold, fold_norms
from spinfold.formats import FLOAT_FORMATS, IntFormat, QuantizedWeight, fake_quantize, fit_grid
from spinfold.maps import Hadamard, SiteMaps, as_held, random_orthogonal
from spinfold.networks import Network, network
from spinfold.networks.family import FAMILIES
from spinfold.networks.sources import resolve
from spinfold.recipe import Recipe
from spinfold.rounding import round_network
from spinfold.runtime import online

CPU = torch.device("cpu")
BUILD = zoo.FAMILIES | zoo.EXPERTS
IDS = zoo.random_tokens(7)


@dataclass(frozen=True)
class Case:
    """A run to be exported: a family, and the recipe's changes."""

    family: str
    bits: str
    changes: dict[str, Any] = field(default_factory=dict)
    bases: bool = False
    clips: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.family}-{self.bits}"


CASES = [
    Case("llama", "W4A4KV4"),
    Case("llama_tied", "W2A8KV2", {"activations__per_head": True}),
    Case("llama_biases", "W3A8KV4", {"weights__symmetric": False}, clips={"0.key": 0.8, "1.down": 0.9}),
    Case("llama_head_dim", "W16A4KV5"),
    Case("smollm", "W8A8KV8", {"group_size": 32}, bases=True),
    Case("mistral", "W4A16KV3", {"weights__scale_dtype": "float16"}),
    Case("qwen2", "W4A4KV4", {"weights__symmetric": False, "group_size": 16}),
    Case("qwen3", "W5A6KV4", {"kv__symmetric": True}),
    Case("phi3", "W6A16"),
    Case("granite", "W7A4KV6", bases=True),
    Case("gemma2", "W4A4KV4"),
    Case("gemma3", "W4A4KV4", {"weights__scale_dtype": "bfloat16"}),
    Case("olmo2", "W4A4"),
    Case("mixtral", "W4A4KV4"),
    Case("qwen3", "W4A8KV4", {"kv__format": "amxfp4"}, clips={"0.key": 0.9}),
    Case("mistral", "W4A8K4V16", {"kv__format": "nvfp4", "kv__sink": 2}),
    Case("smollm", "W4A4K4V2", {"kv__key_group": 8, "kv__value_group": 4, "kv__sink": 2, "kv__residual": 5}),
    Case("gemma3", "W4A8K3V4", {"kv__key_group": 6, "kv__before_rope": True}, clips={"1.key": 0.9, "0.value": 0.8}),
    Case("qwen3_moe_mixed", "W3A4KV4", {"weights__symmetric": False, "group_size": 16}),
    Case("phi3", "W4A4KV4", {"format": "nvfp4"}),
    Case("mixtral", "W4A4", {"format": "amxfp4"}),
    Case("qwen2", "W6A16KV4", {"format": "mxfp6"}),
    Case("smollm", "W8A8KV4", {"format": "fp8", "weights__scale_dtype": "bfloat16"}),
    Case("olmo2", "W4A4KV3", {"format": "mxfp4"}),
]


def make_run(path: Path, case: Case, model: Any = None) -> Path:
    """A finished run with a map at every site that the family has, rounded to nearest."""
    recipe = Recipe().with_(bits=case.bits, rounding__method="rtn", weights__clip_search=False, **case.changes)
    network = Network(model or BUILD[case.family](), name=case.family)
    network.untie()
    layers, maps = network.layers, SiteMaps()
    if model is None:
        bases = tuple(Hadamard(network.hidden_size, seed) for seed in range(2 * len(layers) + 1))
        maps = SiteMaps(
            residual=(bases if case.bases else bases[0]) if network.family.supports("residual") else None,
            value=tuple(Hadamard(x.head_dim, x.index) for x in layers),
            query_key=None if recipe.kv.before_rope else tuple(Hadamard(x.head_dim, x.index) for x in layers),
            down=tuple(Hadamard(x.mlp_width, x.index) for x in layers),
        )
    if maps.residual is not None:
        fold_norms(network)
    fold(network, maps)
    rounded = [one for layer in round_network(network, recipe) for one in layer] if recipe.weight_format else []
    save_maps(path, maps)
    save_clips(path, case.clips)
    save_model(path / "model", network, rounded)
    zoo.write_tiny_tokenizer(path / "model")
    data: dict[str, Any] = {"spinfold": "0", "recipe": recipe.model_dump(mode="json"), "model": {"name": case.family}}
    data |= {"text": {"evaluation": "nothing"}, "metrics": {"rows": [{"name": "none", "perplexity": 2.5}]}}
    proof = {"statement": "the same function", "measured": 1e-7, "tolerance": 1e-5, "detail": ""}
    write_json(path / "run.json", data | {"proofs": [proof]})
    return path


def export(run: Path, folder: Path, **options: Any) -> Path:
    folder.mkdir()
    write(Contents.open(run), folder, **options)
    return folder


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="module")
def of_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], tuple[Path, Path]]:
    """The run and the exported folder of a case, made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(case: Case) -> tuple[Path, Path]:
        if str(case) not in made:
            base = tmp_path_factory.mktemp("case")
            run = make_run(base / "run", case)
            made[str(case)] = run, export(run, base / "out")
        return made[str(case)]

    return get


@pytest.fixture
def folder(of_case: Any, tmp_path: Path) -> Path:
    """A folder to be spoilt."""
    return Path(shutil.copytree(of_case(CASES[0])[1], tmp_path / "copy"))


# ---- the same function -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_the_loaded_model_is_the_run(case: Case, of_case: Any) -> None:
    """Number by number, and by the check of `export` on a real text, which sees two rows in each other's place."""
    run, out = of_case(case)
    model, network = load(out), load_run(run, CPU)
    expected = network(IDS)
    assert relative(model(IDS, use_cache=False).logits, expected) <= 1e-6
    assert relative(model(IDS).logits, expected) <= 1e-6

    text_NT = zoo.text_tokens(out, batch=2)
    expected_NTV = network(text_NT)

    def check() -> list[str]:
        logits_NTV = model(text_NT, use_cache=False).logits
        proofs = checks.compare(expected_NTV, logits_NTV, text_NT, BOUNDS["transformers"], "transformers")
        return [str(proof) for proof in proofs if not proof.ok]

    assert not check()
    zoo.swap_rows(model.state_dict())
    assert len(check()) == 3


def test_every_family_is_tried() -> None:
    assert {BUILD[case.family].args[0] for case in CASES} == {name for one in FAMILIES for name in one.model_types}


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[-4]], ids=str)
@torch.no_grad()
def test_what_one_kernel_does_it_does_in_both(case: Case, of_case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's kernel for a map and the quantizer behind it may put a number on the other side of a tie. Here such a
    kernel leaves the grid out, so that it shows: run and plugin are alike, with a cache too, if they use it alike."""
    run, out = of_case(case)
    model, exact = load(out), load_run(run, CPU)(IDS)
    monkeypatch.setattr(online, "fake_quantize_through", lambda x, map, **_: map.apply(x))
    expected = load_run(run, CPU)(IDS)
    assert relative(expected, exact) > 1e-3
    assert relative(model(IDS, use_cache=False).logits, expected) <= 1e-6
    assert relative(model(IDS).logits, expected) <= 1e-6


@pytest.mark.parametrize("side", ["run", "plugin"])
def test_a_first_call_of_a_vector_function_is_none_that_matters(
    side: str, of_case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else codes flip in a process whose threads meet in such a call, and the check fails: once, and never again."""
    run, out = of_case(CASES[0])
    ids_NT = zoo.random_tokens(7, length=128)

    def compute() -> Tensor:
        if side == "run":
            return checks.logits_of_run(run, ids_NT, CPU)
        return checks.RUNTIMES["transformers"](out, ids_NT, "cpu")

    exact = compute()
    unsettle(monkeypatch)
    assert torch.equal(compute(), exact)

    unsettle(monkeypatch)
    monkeypatch.setattr(network, "settle_vector_functions", lambda: None)
    proofs = checks.compare(exact, compute(), ids_NT, BOUNDS["transformers"], "transformers")
    assert not any(proof.ok for proof in proofs[1:])


# A key that lies between two numbers of its grid may go the other way when one token is computed at a time: that moves
# the logits by a thousandth. A token that sees another context moves them by a tenth.
@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_decoding_is_the_full_forward(case: Case, of_case: Any) -> None:
    model = load(of_case(case)[1])
    expected = model(IDS, use_cache=False).logits
    cache: Any = None
    parts: list[Tensor] = []
    for ids_BT in (IDS[:, :25], *IDS[:, 25:].split(1, dim=1)):
        output = model(ids_BT, past_key_values=cache, use_cache=True)
        cache, parts = output.past_key_values, [*parts, output.logits]
    assert relative(torch.cat(parts, 1), expected) <= 1e-2
    held = [layer.keys.dtype for layer in cache.layers]
    assert set(held) == {torch.uint8 if "K" in case.bits else torch.float32}


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate_uses_the_quantized_cache(options: dict[str, Any], of_case: Any) -> None:
    model = load(of_case(CASES[0])[1])
    settings = {"attention_mask": torch.ones_like(IDS[:, :9]), "max_new_tokens": 12, "do_sample": False} | options
    settings |= {"return_dict_in_generate": True, "pad_token_id": 0}
    made = model.generate(IDS[:, :9], **settings)
    assert all(isinstance(layer, QuantizedLayer) for layer in made.past_key_values.layers)
    without = model.generate(IDS[:, :9], use_cache=False, **settings)
    assert torch.equal(made.sequences, without.sequences)


@torch.no_grad()
def test_another_cache_gives_the_same(of_case: Any) -> None:
    """A cache that somebody else made and filled holds floating point; the wires quantize what it returns."""
    model = load(of_case(CASES[0])[1])
    expected = model(IDS, use_cache=False).logits
    full = DynamicCache()
    parts = [model(ids_BT, past_key_values=full).logits for ids_BT in IDS.split(20, dim=1)]
    assert full.layers[0].keys.dtype == torch.float32
    assert relative(torch.cat(parts, 1), expected) <= 1e-2
    ours = QuantizedCache(model.base_model)
    parts = [model(ids_BT, past_key_values=ours).logits for ids_BT in IDS.split(20, dim=1)]
    assert ours.layers[0].keys.dtype == torch.uint8
    assert relative(torch.cat(parts, 1), expected) <= 1e-2


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[8], CASES[10], *CASES[-3:]], ids=str)
@torch.no_grad()
def test_saved_and_loaded_again(case: Case, of_case: Any, tmp_path: Path) -> None:
    model = load(of_case(case)[1])
    model.save_pretrained(tmp_path / "again", max_shard_size="50KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert torch.equal(load(tmp_path / "again")(IDS).logits, model(IDS).logits)


@torch.no_grad()
def test_shards_change_nothing(of_case: Any, tmp_path: Path) -> None:
    run, out = of_case(CASES[0])
    sharded = export(run, tmp_path / "out", shard_bytes=50_000)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert torch.equal(load(sharded)(IDS).logits, load(out)(IDS).logits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", [CASES[5], CASES[4], CASES[-3], CASES[-2]], ids=str)
@torch.no_grad()
def test_on_a_gpu(case: Case, of_case: Any) -> None:
    out = of_case(case)[1]
    model, expected = load(out).to("cuda"), load(out)(IDS).logits
    output = model(IDS[:, :30].cuda())
    rest = model(IDS[:, 30:].cuda(), past_key_values=output.past_key_values)
    assert output.past_key_values.layers[0].keys.is_cuda
    assert relative(torch.cat([output.logits, rest.logits], 1).cpu(), expected) <= 2e-2


def make_dense_run(path: Path) -> Path:
    """A run whose layers share one learned map before `down`, as `online_dtype` holds it."""
    run = make_run(path, Case("llama_tied", "W4A16", {"online_dtype": "bfloat16"}))
    maps = load_maps(run)
    assert maps.down is not None
    one = random_orthogonal(maps.down[0].size, 0)
    network = Network(BUILD["llama_tied"](), name="llama_tied")
    network.untie()
    fold_norms(network)
    maps = replace(maps, down=tuple(as_held(one, torch.bfloat16) for _ in maps.down))
    fold(network, maps)
    recipe = Recipe.parse(json.loads((run / "run.json").read_text())["recipe"])
    save_maps(run, maps)
    save_model(run / "model", network, [one for layer in round_network(network, recipe) for one in layer])
    zoo.write_tiny_tokenizer(run / "model")
    return run


@torch.no_grad()
def test_a_map_of_all_layers_is_stored_once_and_held_once(tmp_path: Path) -> None:
    run = make_dense_run(tmp_path / "run")
    out = export(run, tmp_path / "out")
    stored = load_file(out / "model.safetensors")
    dense = {name: value for name, value in stored.items() if name.startswith("spinfold.") and "down" in name}
    assert {name: tuple(value.shape) for name, value in dense.items()} == {"spinfold.0.down.0.block.M": (160, 160)}
    wires = json.loads((out / "config.json").read_text())["quantization_config"]["wires"]
    assert [wires[f"{i}.down"][0] for i in (1, 2)] == [{"same": "0.down.0"}] * 2
    model = load(out)
    assert relative(model(IDS).logits, load_run(run, CPU)(IDS)) <= 1e-6

    def held(model: Any) -> set[int]:
        maps = [layer.wires["down"].ops[0].map for layer in model.base_model.layers]
        return {tensor.data_ptr() for one in maps for tensor in one.tensors().values()}

    assert len(held(model)) == 1
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert (tmp_path / "again" / "model.safetensors").stat().st_size <= 1.1 * (out / "model.safetensors").stat().st_size
    assert len(held(model.to(torch.float64))) == 1


def test_a_folder_that_has_every_map_everywhere_is_still_read(of_case: Any, tmp_path: Path) -> None:
    """Version 1: the same tensors at each place."""
    run = make_dense_run(tmp_path / "run")
    out = export(run, tmp_path / "out")
    tensors, config = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
    quantization = config["quantization_config"]
    for place, ops in quantization["wires"].items():
        for number, entry in enumerate(ops):
            if origin := entry.pop("same", None):
                wire, first = origin.rsplit(".", 1)
                ops[number] = dict(quantization["wires"][wire][int(first)])
                own = [key for key in tensors if key.startswith(f"spinfold.{origin}.")]
                copies = {key.replace(origin, f"{place}.{number}", 1): tensors[key].clone() for key in own}
                tensors |= copies
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    ours = SpinfoldConfig(quantization["recipe"], quantization["wires"], version=1)
    quantization |= {"version": 1, "checksum": ours.checksum_over({k: digest(v) for k, v in tensors.items()}, config)}
    write_json(out / "config.json", config)
    assert relative(load(out)(IDS).logits, load_run(run, CPU)(IDS)) <= 1e-6


def test_a_reference_to_no_map(folder: Path) -> None:
    def refer(quantization: dict[str, Any]) -> None:
        quantization["wires"]["1.down"][0] = {"same": "7.down.0"}
        digests = {name: digest(value) for name, value in load_file(folder / "model.safetensors").items()}
        ours = SpinfoldConfig(quantization["recipe"], quantization["wires"])
        config = json.loads((folder / "config.json").read_text())
        quantization["checksum"] = ours.checksum_over(digests, config)

    spoil_config(folder, refer)
    with pytest.raises(SpinfoldError, match="description of its wires can't be read"):
        load(folder)


@torch.no_grad()
def test_in_bfloat16_the_grids_stay(of_case: Any) -> None:
    out = of_case(CASES[0])[1]
    model, exact = load(out, dtype=torch.bfloat16), load(out)
    cast = load(out).to(torch.bfloat16)
    cast.model.rotary_emb = model.model.rotary_emb  # whose frequencies a cast rounds, in any model
    assert torch.equal(model(IDS).logits, cast(IDS).logits)
    assert model(IDS).logits.dtype == torch.bfloat16
    pairs = zip(model.modules(), exact.modules(), strict=True)
    scales = [(a.scale, b.scale) for a, b in pairs if isinstance(a, PackedWeight)]
    assert scales
    assert all(torch.equal(a, b) for a, b in scales)


def test_the_folder_is_complete(of_case: Any) -> None:
    out = of_case(CASES[0])[1]
    assert AutoTokenizer.from_pretrained(out)("the rain")["input_ids"]
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2
    card = (out / "README.md").read_text("utf-8")
    for text in ("library_name: transformers", "W4A4KV4", "| none", "2.50", "the same function: 1e-07", "clip_search:"):
        assert text in card


# ---- what is held ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_weights_are_the_weights(bits: int, symmetric: bool) -> None:
    w_OI = torch.randn(6, 5, 42, generator=torch.Generator().manual_seed(bits)).flatten(0, 1)
    format = IntFormat(bits, symmetric, group_size=14)
    grid = fit_grid(w_OI, format)
    weight = QuantizedWeight(grid.quantize(w_OI), grid.scale_OG, grid.second_OG, format)
    packed = PackedWeight((6, 5, 42), format, torch.float32, torch.float32)
    packed.load_state_dict(packed_tensors(weight, (6, 5, 42)), assign=True)
    assert torch.equal(torch.stack(list(packed)).flatten(0, 1), weight.dequantize())


@pytest.mark.parametrize("name", FLOAT_FORMATS)
def test_packed_floats_are_the_weights(name: str) -> None:
    """Also after a cast of the module to another dtype and back: the grid stays in its own."""
    w_OI = torch.randn(6, 5, 64, generator=torch.Generator().manual_seed(0)).flatten(0, 1)
    format = FLOAT_FORMATS[name]
    grid = fit_grid(w_OI, format)
    weight = QuantizedWeight(grid.quantize(w_OI), grid.scale_OG, grid.second_OG, format)
    packed = PackedWeight((6, 5, 64), format, torch.float32, torch.float32)
    tensors = packed_tensors(weight, (6, 5, 64))
    packed.load_state_dict(tensors, assign=True)
    assert torch.equal(torch.stack(list(packed)).flatten(0, 1), weight.dequantize())
    assert torch.equal(torch.stack(list(packed.bfloat16().float())).flatten(0, 1), weight.dequantize())
    num_bits = 8 * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / w_OI.numel()
    assert num_bits == weight.bits_per_weight + (32 / 64 if format.outer else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_cached_rows_are_fake_quantization(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 7, 26, generator=torch.Generator().manual_seed(bits)).to(dtype)
    x[0, 0, 0], x[0, 0, 1, 3], x[0, 0, 2, 5] = 0, torch.nan, torch.inf
    format = IntFormat(bits, symmetric, clip=0.9)
    rows, expected = encode_rows(x, format), fake_quantize(x, format)
    bytes_of_scale = torch.promote_types(dtype, torch.float32).itemsize
    assert rows.shape[-1] == -(-26 * bits // 8) + bytes_of_scale + (not symmetric)
    decoded = decode_rows(rows, format, 26, dtype)
    assert decoded.dtype == dtype
    assert torch.equal(decoded.nan_to_num(9), expected.nan_to_num(9))
    assert decoded[0, 0, 1:3].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", FLOAT_FORMATS)
def test_cached_rows_of_blocks_are_fake_quantization(name: str, dtype: torch.dtype) -> None:
    x = 10 * torch.randn(2, 3, 7, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0, 0], x[0, 0, 1, 3], x[0, 0, 2, 5], x[0, 1] = 0, torch.nan, torch.inf, x[0, 1].abs()
    x[0, 2], x[1, 0] = -x[0, 2].abs(), 1e-38 * x[1, 0]
    format = replace(FLOAT_FORMATS[name], clip=0.9)
    format = replace(format, outer=format.outer and "row")
    rows, expected = encode_rows(x, format), fake_quantize(x, format)
    if dtype != torch.float64:
        assert 8 * rows.shape[-1] == 64 * format.bits_per_number(64)
    assert encode_rows(x[:, :, :0], format).shape == (2, 3, 0, rows.shape[-1])
    decoded = decode_rows(rows, format, 64, dtype)
    assert decoded.dtype == dtype
    assert torch.equal(decoded.nan_to_num(9), expected.nan_to_num(9))
    assert torch.equal(decoded.signbit() & (decoded == 0), expected.signbit() & (expected == 0))
    assert decoded[0, 0, 1, 3].isnan() and decoded[0, 0, 2, 5].isnan()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with the widths of SmolLM2-135M and three of its thirty layers, at W4 per channel."""
    base = tmp_path_factory.mktemp("wide")
    sizes: dict[str, Any] = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
    sizes |= {"num_key_value_heads": 3, "num_hidden_layers": 3, "vocab_size": 256, "tie_word_embeddings": True}
    torch.manual_seed(0)
    run = make_run(base / "run", Case("smollm", "W4A16"), LlamaForCausalLM(LlamaConfig(**sizes)))
    return run, export(run, base / "out")


def bits_per_linear_weight(run: Path, out: Path) -> tuple[float, float]:
    """On disk, with all headers, and in memory."""
    contents, model = Contents.open(run), load(out)
    linear_weights = sum(x.weight_OI.numel() for x in contents.network.linears)
    other_bytes = sum(x.numel() * x.element_size() for _, x in contents.others())
    on_disk = sum(path.stat().st_size for path in out.iterdir() if path.suffix == ".safetensors")
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    in_memory = sum(x.numel() * x.element_size() for name, x in tensors.items() if "rotary" not in name)
    return tuple(8 * (held - other_bytes) / linear_weights for held in (on_disk, in_memory))  # type: ignore[return-value]


def test_w4_takes_less_than_4_3_bits(wide: tuple[Path, Path]) -> None:
    assert all(4 < bits <= 4.3 for bits in bits_per_linear_weight(*wide))


@pytest.mark.slow
def test_smollm2_at_w4_takes_less_than_4_3_bits(tmp_path: Path) -> None:
    """The model itself. In 7 linears of each layer 4 bits and a float32 per row; docs/runtimes.md has the figures."""
    run = make_run(tmp_path / "run", Case("smollm2", "W4A16"), resolve("smollm2").load_model())
    on_disk, in_memory = bits_per_linear_weight(run, export(run, tmp_path / "out"))
    assert in_memory == 4 + 32 * 5184 / (576 * 6144)
    assert in_memory < on_disk < 4.06


def alive_at_each(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each weight that two tokens make in floating point, in order: how many others are still there by then."""
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    dequantize = QuantizedWeight.dequantize  # what a linear and what each expert is unpacked by

    def count() -> int:
        return sum(one() is not None for one in made)

    def watched(self: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        alive.append(count())
        weight_OI = dequantize(self, dtype)
        made.append(weakref.ref(weight_OI))
        return weight_OI

    monkeypatch.setattr(QuantizedWeight, "dequantize", watched)
    before = model.get_memory_footprint()
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, pad_token_id=0)
    assert count() == 0
    assert model.get_memory_footprint() == before
    return alive


def test_one_weight_at_a_time_is_in_floating_point(wide: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert alive_at_each(load(wide[1]), monkeypatch) == [0] * (2 * 3 * 7)


def test_one_expert_at_a_time_is_in_floating_point(of_case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a loop that unpacks all of a matrix first is seen."""
    mixtral = next(case for case in CASES if case.family == "mixtral")
    model = load(of_case(mixtral)[1])
    assert alive_at_each(model, monkeypatch) == [0] * (2 * 2 * (4 + 4 + 4))

    one_by_one = PackedWeight.__iter__
    monkeypatch.setattr(PackedWeight, "__iter__", lambda self: iter(list(one_by_one(self))))
    assert max(alive_at_each(model, monkeypatch)) == 3


# ---- what is refused -------------------------------------------------------------------------------------------------


def spoil_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def spoil_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def flip_a_bit(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.down_proj.weight.packed"][3, 5] ^= 1


def swap(tensors: dict[str, Tensor]) -> None:
    a, b = (f"model.layers.{i}.self_attn.o_proj.weight.packed" for i in (0, 1))
    tensors[a], tensors[b] = tensors[b], tensors[a]


def turn_a_map(tensors: dict[str, Tensor]) -> None:
    tensors["spinfold.0.down.0.signs"].neg_()


@pytest.mark.parametrize("change", [flip_a_bit, swap, turn_a_map, lambda t: t.pop("model.norm.weight")])
def test_weights_that_were_changed(change: Callable[[dict[str, Tensor]], object], folder: Path) -> None:
    spoil_tensors(folder, change)
    with pytest.raises(SpinfoldError, match="not those that the config describes"):
        load(folder)


def test_weights_of_another_run(of_case: Any, folder: Path, tmp_path: Path) -> None:
    """Complete in themselves, of the same shapes, and of another seed."""
    run = make_run(tmp_path / "run", CASES[0], BUILD["llama"](seed=1))
    shutil.copy(export(run, tmp_path / "other") / "model.safetensors", folder)
    with pytest.raises(SpinfoldError, match="they are of two runs"):
        load(folder)


def test_a_missing_shard(of_case: Any, tmp_path: Path) -> None:
    sharded = export(of_case(CASES[0])[0], tmp_path / "out", shard_bytes=50_000)
    (missing := sorted(sharded.glob("model-*.safetensors"))[1]).unlink()
    with pytest.raises(SpinfoldError, match=f"{missing.name} can't be read"):
        load(sharded)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_shard(keep: float, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(SpinfoldError, match=r"model\.safetensors can't be read"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda q: q.update(version=4), "newer spinfold"),
        (lambda q: q["recipe"].update(schema_version=2), "newer spinfold"),
        (lambda q: q["recipe"].update(flavour=1), "flavour"),
        (lambda q: q.update(flavour=1), "flavour"),
        (lambda q: q.pop("wires"), "no wires"),
        (lambda q: q.update(recipe=[]), "no recipe"),
        (lambda q: q["recipe"].update(bits="W4A4KV8"), "not those that the config describes"),
        (lambda q: q["wires"]["0.key"][-1]["quantize"].update(bits=8), "not those that the config describes"),
        (lambda q: q["wires"].pop("1.down"), "not those that the config describes"),
    ],
)
def test_a_config_that_says_something_else(change: Callable[[dict[str, Any]], object], said: str, folder: Path) -> None:
    spoil_config(folder, change)
    with pytest.raises(SpinfoldError, match=said):
        load(folder)


def test_a_recipe_is_kept_as_it_was_written() -> None:
    """So a field that a later spinfold adds, with its default, does not spoil the checksum of an older folder."""
    assert SpinfoldConfig({"bits": "W4A16"}, {}).recipe == {"bits": "W4A16"}


@pytest.mark.parametrize(
    "change",
    [
        {"intermediate_size": 168},
        {"num_hidden_layers": 3},
        {"rms_norm_eps": 1e-2},
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
        {"hidden_act": "gelu"},
    ],
    ids=str,
)
def test_a_model_of_another_function(change: dict[str, Any], folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config | change != config
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(SpinfoldError, match="not those that the config describes"):
        load(folder)


def test_what_can_not_be_done_is_said(of_case: Any, folder: Path) -> None:
    with pytest.raises(SpinfoldError, match="AutoModelForCausalLM"):
        AutoModel.from_pretrained(folder)
    with pytest.raises(SpinfoldError, match="attn_implementation"):
        load(folder, attn_implementation="eager")
    plain = zoo.save(zoo.FAMILIES["llama"](), folder / "plain")
    with pytest.raises(SpinfoldError, match="spinfold quantize"):
        load(plain, quantization_config=AutoConfig.from_pretrained(folder).quantization_config)


def test_the_documented_way(of_case: Any) -> None:
    """In a fresh process, where spinfold comes before Transformers; here it may have come after."""
    out = of_case(CASES[0])[1]
    code = "import sys, spinfold; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    code += "model, tokenizer = (auto.from_pretrained(sys.argv[1]) for auto in (AutoModelForCausalLM, AutoTokenizer))\n"
    code += "made = model.generate(**tokenizer('the rain', return_tensors='pt'), max_new_tokens=3, do_sample=False)\n"
    code += "print(made.tolist())"
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, timeout=300)
    ids = AutoTokenizer.from_pretrained(out)("the rain", return_tensors="pt")
    assert json.loads(done.stdout) == load(out).generate(**ids, max_new_tokens=3, do_sample=False).tolist(), done.stderr
