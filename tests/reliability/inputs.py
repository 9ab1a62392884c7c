"""The kinds of hostile input. Each puts one input into a folder and returns what a user would do with it.

    KINDS[kind](sound, folder, chance) -> action

An action may raise `SpinfoldError` or succeed; `judge` looks on.
"""

from __future__ import annotations

import codecs
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import torch
import zoo
from contracts import tiny_run
from damage import NAMES, ODD, damaged, json_bytes, twisted

import spinfold
from spinfold.export.check import verify_files
from spinfold.export.contents import Contents
from spinfold.files import load_tensors, save_tensors
from spinfold.fitting import journal
from spinfold.fitting.text import load_text
from spinfold.grid import Grid
from spinfold.networks.sources import resolve
from spinfold.recipe import Recipe

__all__ = ["KINDS", "Sound"]

Action = Callable[[], object]
PLACES = [("fit residual rotation", 2), ("evaluate quantized", 0)]
"""Where a run was stopped in whose state somebody writes."""
EVIL = "open('pwned', 'w').close()\nclass Config: pass\n"


class Sound:
    """What is sound before it is damaged, each made when first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def text(self) -> Path:
        path = self.root / "text.txt"
        path.write_text(tiny_run.TEXT, "utf-8")
        return path

    @cached_property
    def folder(self) -> Path:
        """A model with its tokenizer, and with code that nobody may run."""
        path = zoo.write_tiny_tokenizer(zoo.save(zoo.FAMILIES["llama"](0, 48), self.root / "folder"))
        (path / "evil.py").write_text(EVIL)
        return path

    @cached_property
    def sharded(self) -> Path:
        return zoo.save(zoo.FAMILIES["llama"](0, 48), self.root / "sharded", shards=3)

    @cached_property
    def gguf(self) -> Path:
        return zoo.write_gguf(zoo.FAMILIES["qwen2"](0, 48), self.root / "tiny.gguf", "qwen2")

    @cached_property
    def run(self) -> Path:
        """A finished run with maps at every site, and with its page."""
        recipe = tiny_run.recipe(self.text, rounding__method="rtn", method="quarot")
        return spinfold.quantize(str(self.folder), self.root / "run", recipe, device="cpu").path

    @cached_property
    def exported(self) -> Path:
        return spinfold.export(self.run, "transformers", self.root / "exported", check=False).path

    @cached_property
    def comparison(self) -> Path:
        recipe = tiny_run.recipe(self.text, rounding__method="rtn")
        options = {"recipe": recipe, "text": str(self.text), "max_tokens": 64, "device": "cpu"}
        return spinfold.compare(str(self.folder), self.root / "comparison", ["none", "quarot"], **options).path


def _copy(path: Path, folder: Path) -> Path:
    return Path(shutil.copytree(path, folder / path.name))


def _use(model: Path, sound: Sound) -> Action:
    """Measure a model on a few tokens, which reads all of it."""
    return lambda: spinfold.evaluate(model, text=str(sound.text), seq_len=16, max_tokens=32, device="cpu")


def _twist(path: Path, chance: Random) -> None:
    path.write_bytes(json_bytes(twisted(json.loads(path.read_bytes()), chance), chance))


def _damage(path: Path, chance: Random, end: int | None = None) -> None:
    path.write_bytes(damaged(path.read_bytes(), chance, end))


def safetensors(sound: Sound, folder: Path, chance: Random) -> Action:
    """Header bytes that flip, end or lie; entries with other shapes, types and offsets."""
    model = _copy(sound.folder, folder)
    _harm_safetensors(model / "model.safetensors", chance)
    return _use(model, sound)


def _harm_safetensors(path: Path, chance: Random) -> None:
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    match chance.randrange(3):
        case 0:
            path.write_bytes(damaged(data, chance, start))
            return
        case 1:
            header = twisted(header, chance)
        case _:
            _lie(header, chance)
    text = json_bytes(header, chance)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])


def _lie(header: dict[str, Any], chance: Random) -> None:
    """Change a header such that it stays one: shapes, types, names and places that are others' or nobody's."""
    one, other = chance.choices(sorted(header.keys() - {"__metadata__"}), k=2)
    match chance.randrange(6):
        case 0:
            header[one], header[other] = header[other], header[one]
        case 1:
            header[one]["shape"] = header[one]["shape"][::-1]
        case 2:
            header[one]["shape"] = chance.choice(
                ([], [1], [0], [2**40] * 3, [1, *header[one]["shape"]], header[other]["shape"])
            )
        case 3:
            header[one]["dtype"] = chance.choice(("F64", "F16", "I8", "U8", "BOOL", "F8_E4M3", "I64", "F32"))
        case 4:
            header[one]["data_offsets"] = chance.choice(([0, 0], [8, 0], [0, 2**62], header[other]["data_offsets"]))
        case _:
            header[chance.choice((*NAMES, f"{one}.x"))] = header.pop(one)
    header["__metadata__"] = chance.choice(({}, {"format": "pt"}, {"x": NAMES[0]}, {one: "nan inf x"}))


def gguf(sound: Sound, folder: Path, chance: Random) -> Action:
    """Header bytes that flip, end or lie, at places of all kinds."""
    path = Path(shutil.copy(sound.gguf, folder / "tiny.gguf"))
    scanned = resolve(sound.gguf).weights
    _damage(path, chance, chance.choice((24, 200, getattr(scanned, "header_bytes", None))))
    return lambda: resolve(path).load_model()


def config(sound: Sound, folder: Path, chance: Random) -> Action:
    """A config.json with other values, other keys, and code of its own to load."""
    model = _copy(sound.folder, folder)
    path = model / "config.json"
    data = json.loads(path.read_text())
    if not chance.randrange(4):
        data |= {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Config"}}
    path.write_bytes(json_bytes(twisted(data, chance), chance))
    return _use(model, sound)


def tokenizer(sound: Sound, folder: Path, chance: Random) -> Action:
    """Tokenizer files with other values."""
    model = _copy(sound.folder, folder)
    _twist(model / chance.choice(("tokenizer.json", "tokenizer_config.json")), chance)
    return _use(model, sound)


def shards(sound: Sound, folder: Path, chance: Random) -> Action:
    """Names of shards that lead elsewhere, links that do, and an index that lies."""
    model = _copy(sound.sharded, folder)
    index = model / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    match chance.randrange(3):
        case 0:
            key = chance.choice(sorted(data["weight_map"]))
            data["weight_map"][key] = chance.choice((*NAMES, "/etc/x.safetensors", "../sharded/x.safetensors", *ODD))
            index.write_text(json.dumps(data))
        case 1:
            link = chance.choice(sorted(model.glob("*.safetensors")))
            link.unlink()
            link.symlink_to(chance.choice(("/etc/passwd", "/dev/zero", "/dev/null", "..", link.name, "/nowhere", "/")))
        case _:
            _twist(index, chance)
    return lambda: resolve(model).load_model()


LAUGHS = "\n".join([f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9 if i else ['lol'] * 9)}]" for i in range(12)])
YAMLS = (
    *(LAUGHS, f"{LAUGHS}\nbits: *a11", f"{LAUGHS}\nfit: {{steps: *a11}}", f"{LAUGHS}\nrecipe: {{fit: *a11}}"),
    *("a: &a [*a]", "fit: &f {steps: *f}", "entries: &e [*e]", "&x {recipe: *x}", "a: &a\n  <<: *a"),
    *("[" * 5000, "{a: " * 5000, "- " * 5000, "a:\n" + "".join(" " * i + "a:\n" for i in range(600))),
    *(
        "seed: " + "9" * 5000,
        "seed: 1" + "_0" * 3000,
        "seed: 0x" + "f" * 6000,
        "a: 2001-99-99",
        "a: 1:" + "59:" * 999 + "0",
    ),
    *("!!python/object/apply:os.system ['touch pwned']", "!!python/name:os.system", "!!binary '%%%'", "!!set {a, b}"),
    *(
        "? [a, b]\n: 1",
        "? {a: 1}\n: 1",
        "1: 2",
        "null: 1",
        "bits: 2020-01-01",
        "--- 1\n--- 2",
        "%YAML 9.9\n---\na: 1",
        "\0",
    ),
    *(
        "a: &b c\nb: *d",
        "seed: .nan",
        "seed: .inf",
        "fit: {learning_rate: .nan}",
        "fit: {learning_rate: 1e999}",
        "bits: W٤A٤",
    ),
)
"""YAML that grows, nests, repeats itself, names Python objects, or holds what Python can't."""


def recipes(sound: Sound, folder: Path, chance: Random) -> Action:
    """Recipes and plans as YAML: bombs, unknown keys, wrong types, huge numbers, damaged bytes."""
    path = folder / "recipe.yaml"
    whole = Recipe().model_dump(mode="json")
    plan = {"recipe": {"fit": {"steps": 0}}, "bits": ["W4A4"], "seeds": [0], "rounding": ["rtn"]}
    plan["entries"] = ["quarot", {"label": "x", "source": "quarot", "recipe": {"seed": 1}, "bits": ["W4A16"]}]
    match chance.randrange(4):
        case 0:
            path.write_text(chance.choice(YAMLS), "utf-8")
        case 1:
            path.write_bytes(damaged(Recipe().to_yaml().encode(), chance))
        case 2:
            path.write_bytes(json_bytes(twisted(plan, chance), chance))
        case _:
            path.write_bytes(json_bytes(twisted(whole, chance), chance))
    word = f"{chance.choice(('', 'x='))}quarot:{chance.choice(sorted(whole))}={chance.choice((*YAMLS, *map(str, ODD)))}"
    return chance.choice(
        (
            lambda: Recipe.load(path),
            lambda: Grid.load(path).cells(Recipe()),
            lambda: Grid.parse({"entries": [f"x={path}"]}).cells(Recipe()),
            lambda: Grid.parse({"entries": [word]}).cells(Recipe()),
        )
    )


ENCODINGS = ("utf-8", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp037", "shift_jis", "utf-7", "gb18030", "koi8-r")


def texts(sound: Sound, folder: Path, chance: Random) -> Action:
    """Texts in odd encodings, with marks that lie, as JSON lines that are none."""
    line = chance.choice(
        (tiny_run.TEXT[:300], "Größe 東京 🙂\n", json.dumps({"text": "a b c"}) + "\n", "[" * 9999, "", "\ufeff")
    )
    line = json.dumps(twisted([{"text": line, "content": "x"}], chance)) + "\n" if chance.random() < 0.3 else line
    data = (line * chance.randint(1, 9)).encode(chance.choice(ENCODINGS), "replace")
    mark = chance.choice((b"", b"", codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE))
    data = damaged(mark + data, chance) if chance.random() < 0.5 else mark + data
    path = folder / f"text{chance.choice(('.txt', '.jsonl', '.json', '.ndjson', '', '.bin'))}"
    path.write_bytes(data)
    return lambda: load_text(path)


def runs(sound: Sound, folder: Path, chance: Random) -> Action:
    """A run folder in which somebody has written: figures, maps, clip ratios, config, tensors."""
    exportable = chance.random() < 0.3
    run = _copy(sound.run, folder)
    names = ["run.json", "maps.json", "clips.json", "model/config.json", "model/tokenizer_config.json"]
    names += ["model/model.safetensors", "maps.safetensors"]
    path = run / chance.choice(names if exportable else [*names, "outliers-before.npz", "outliers-after.npz"])
    if path.suffix == ".json":
        _twist(path, chance)
    elif path.suffix == ".safetensors" and path.stat().st_size > 200:
        _harm_safetensors(path, chance)
    else:
        _damage(path, chance)
    if exportable:
        return lambda: spinfold.export(run, "transformers", folder / "out", check=False)
    return chance.choice((_use(run, sound), lambda: Contents.open(run), lambda: spinfold.report(run)))


def proofs(sound: Sound, folder: Path, chance: Random) -> Action:
    """A checkpoint that was exported, and its proof.json with other contents."""
    exported = _copy(sound.exported, folder)
    _twist(exported / "proof.json", chance)
    return lambda: verify_files(exported)


def comparisons(sound: Sound, folder: Path, chance: Random) -> Action:
    """A comparison's key or one of its cells with other contents, taken over into another one or gone on with."""
    one = _copy(sound.comparison, folder)
    _twist(chance.choice((one / "comparison.json", *sorted((one / "cells").glob("*.json")))), chance)
    if chance.random() < 0.5:
        return lambda: spinfold.compare(None, folder / "merged", merge=[one])
    return lambda: spinfold.compare(None, one, resume=True)


def states(sound: Sound, folder: Path, chance: Random) -> Action:
    """A run that was stopped, and in whose state somebody has written before it goes on."""
    run = folder / "run"
    recipe = tiny_run.recipe(sound.text, rounding__method="rtn", method="kurtail", fit__steps=2)
    shutil.copytree(_stopped(sound, recipe, chance.choice(PLACES)), run)
    path = chance.choice(sorted(one for one in (run / "state").rglob("*.*") if one.suffix in (".json", ".safetensors")))
    if path.match(journal.KEPT_LOOPS) and chance.random() < 0.5:
        _fill(path, chance)
    else:
        _twist(path, chance) if path.suffix == ".json" else _harm_safetensors(path, chance)
    return lambda: spinfold.quantize(str(sound.folder), run, recipe, device="cpu", resume=True)


def _fill(path: Path, chance: Random) -> None:
    """One tensor of a file with another number everywhere."""
    tensors, metadata = load_tensors(path)
    name = chance.choice(sorted(tensors))
    odd = chance.choice([float("nan"), float("inf"), 0, 1e38, -1]) if tensors[name].is_floating_point() else 77
    save_tensors(path, tensors | {name: torch.full_like(tensors[name], odd)}, metadata)


def _stopped(sound: Sound, recipe: Recipe, place: tuple[str, int]) -> Path:
    """A run that was stopped at a step of a stage; each step of its fit was kept."""
    path = sound.root / f"stopped in {place[0]}"

    def stop(stage: str, done: int) -> None:
        if (stage, done) == place:
            raise KeyboardInterrupt

    if not path.exists():
        with suppress(KeyboardInterrupt), mock.patch.multiple(journal, PATIENCE=0.0, RATIO=0.0):
            spinfold.quantize(str(sound.folder), path, recipe, device="cpu", progress=tiny_run.Hook(stop))
    return path


def names(sound: Sound, folder: Path, chance: Random) -> Action:
    """Names of models, texts, recipes and methods, alone and in pieces."""
    name = "".join(chance.choice(NAMES)[: chance.randint(1, 400)] for _ in range(chance.randint(1, 3)))
    os.chdir(folder)
    return chance.choice(
        (
            lambda: resolve(name),
            lambda: load_text(name),
            lambda: Recipe.load(name),
            lambda: Recipe().with_(bits=name),
            lambda: Grid.parse({"entries": [name]}),
            lambda: spinfold.report(name),
            lambda: spinfold.quantize(str(sound.folder), folder / "out", Recipe().with_(method=name)),
            lambda: spinfold.export(sound.run, name, folder / "out"),
            lambda: spinfold.evaluate(sound.folder, text=name),
        )
    )


KINDS: dict[str, tuple[int, Callable[[Sound, Path, Random], Action]]] = {
    "safetensors": (400, safetensors),
    "gguf": (500, gguf),
    "config": (400, config),
    "tokenizer": (150, tokenizer),
    "shards": (150, shards),
    "recipes": (500, recipes),
    "texts": (300, texts),
    "runs": (400, runs),
    "states": (60, states),
    "proofs": (100, proofs),
    "comparisons": (150, comparisons),
    "names": (300, names),
}
"""Each kind with the number of inputs of `--full`."""
