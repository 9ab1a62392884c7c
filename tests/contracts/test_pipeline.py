"""A whole run on a tiny model: what it leaves behind is complete, agrees with itself, and can be read again."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from safetensors.torch import load_file
from tiny_run import TEXT, contents, quantize, recipe, tiny_model, tree

import spinfold
from spinfold.checkpoint import load_maps
from spinfold.errors import SpinfoldError
from spinfold.fitting.text import texts_of
from spinfold.maps import Hadamard, Orthogonal, SiteMaps
from spinfold.networks.sources import resolve
from spinfold.progress import Quiet
from spinfold.recipe import Bits, Recipe
from spinfold.rotation import prove_orthogonal
from spinfold.subject import EVAL_TOKENS, prepare

BITS = ("W4A16", "W4A4KV4", "W16A4KV4")
FILES = {"recipe.yaml", "run.json", "maps.json", "maps.safetensors", "clips.json", "report.html", "log.txt", "model"}
FILES |= {"outliers-before.npz", "outliers-after.npz"}
EVALUATION_TOKENS = 1 << 13


@pytest.fixture(scope="module")
def other_text(text: Path) -> Path:
    path = text.with_name("other.jsonl")
    path.write_text("\n".join(json.dumps({"text": f"In the year {i} it rained there."}) for i in range(60)), "utf-8")
    return path


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
@pytest.mark.parametrize("method", ["none", "quarot", "spinquant"])
def test_a_run_holds_what_it_says(
    method: str, rounding: str, bits: str, model: Path, text: Path, other_text: Path, tmp_path: Path
) -> None:
    asked = {"method": method, "rounding__method": rounding, "bits": bits}
    run = quantize(model, tmp_path / "run", text, evaluate_on=str(other_text), **asked)
    assert {path.name for path in run.path.iterdir()} == FILES
    assert json.loads((run.path / "run.json").read_text()) == run.data
    assert Recipe.load(run.path / "recipe.yaml") == recipe(text, **asked)

    assert all(proof["ok"] for proof in run.data["proofs"]), run.data["proofs"]
    maps = load_maps(run.path)
    learned_sites = {"none": (), "quarot": ("residual", "value", "query_key", "down")}
    sites = learned_sites.get(method, learned_sites["quarot"])
    assert maps.sites == tuple(site for site in sites if site != "query_key" or Bits.parse(bits).kv < 16)
    assert set(run.data["fit"]["orthogonality"]) == set(maps.sites)
    assert all(gap < 1e-6 for gap in run.data["fit"]["orthogonality"].values())
    assert len(run.data["fit"]["losses"]) == (2 if method == "spinquant" else 0)

    stored = load_file(run.path / "model" / "model.safetensors")
    rounded = {name for name in stored if name.endswith(".q")}
    assert len(rounded) == len(run.data["rounding"]) == (3 * 7 if bits != "W16A4KV4" else 0)
    assert all(len(stored[name].unique()) <= 16 for name in rounded)

    original, quantized = run.data["metrics"]["rows"]
    assert (original["name"], quantized["name"]) == ("original", method)
    assert quantized["kl"] > 1e-6
    again = spinfold.evaluate(run.path, text=str(other_text), seq_len=32, max_tokens=EVALUATION_TOKENS, device="cpu")
    assert again["tokens"] == quantized["tokens"]
    assert again["perplexity"] == pytest.approx(quantized["perplexity"], rel=1e-6)
    before = spinfold.evaluate(str(model), text=str(other_text), seq_len=32, max_tokens=EVALUATION_TOKENS, device="cpu")
    assert before["perplexity"] == pytest.approx(original["perplexity"], rel=1e-6)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "phi3", "granite", "mistral", "gemma2", "olmo2"])
def test_every_family_goes_all_the_way(family: str, text: Path, tmp_path: Path) -> None:
    post_norms = family in ("gemma2", "olmo2")
    asked = {"sites": ("value", "query_key", "down")} if post_norms else {}
    model = tiny_model(tmp_path / "model", family)
    run = quantize(model, tmp_path / "run", text, method="quarot", group_size=8, **asked)
    assert math.isfinite(run.data["metrics"]["rows"][1]["perplexity"])
    again = spinfold.evaluate(run.path, text=str(text), seq_len=32, device="cpu", reference=str(model))
    assert 0 < again["kl"] < math.inf
    assert 0 < again["top1"] <= 1


def test_the_figures_come_from_text_that_nothing_was_fitted_on(model: Path, text: Path, tmp_path: Path) -> None:
    """Without a text of its own, the evaluation takes the end of the calibration text, and calibration the rest."""
    runs = []
    for name, ending in (("a", "QWXZ"), ("b", "ZXWQ")):
        path = tmp_path / f"{name}.txt"
        path.write_text(TEXT + ending * 200, "utf-8")
        runs.append(quantize(model, tmp_path / name, path, method="none", samples=None))
    first, second = (load_file(run.path / "model" / "model.safetensors") for run in runs)
    assert all((first[name] == second[name]).all() for name in first)
    assert runs[0].data["metrics"] != runs[1].data["metrics"]


def test_equal_seeds_give_equal_bytes_and_others_do_not(model: Path, text: Path, tmp_path: Path) -> None:
    runs = [
        contents(quantize(model, tmp_path / name, text, seed=seed).path)
        for name, seed in zip("abc", (0, 0, 1), strict=True)
    ]
    assert runs[0] == runs[1]
    assert runs[0]["model/model.safetensors"] != runs[2]["model/model.safetensors"]
    assert runs[0]["maps.safetensors"] != runs[2]["maps.safetensors"]


def test_files_have_the_modes_of_the_users_umask(model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    expected = (tmp_path / "file").stat().st_mode
    run = quantize(model, tmp_path / "run", text, method="none")
    assert {path.stat().st_mode for path in run.path.rglob("*") if path.is_file()} == {expected}


def test_the_page_can_be_drawn_again(model: Path, text: Path, tmp_path: Path) -> None:
    run = quantize(model, tmp_path / "run", text, method="quarot")
    page = (run.path / "report.html").read_text("utf-8")
    (run.path / "report.html").unlink()
    assert spinfold.report(run.path).read_text("utf-8") == page
    with np.load(run.path / "outliers-before.npz") as before, np.load(run.path / "outliers-after.npz") as after:
        assert before["kurtosis"].shape == after["kurtosis"].shape


# ---- errors --------------------------------------------------------------------------------------------------------


def refused(run: object, *, match: str) -> None:
    with pytest.raises(SpinfoldError, match=match) as caught:
        run()  # type: ignore[operator]
    assert caught.value.why
    assert caught.value.fix


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A model whose tokenizer knows more tokens than its embedding has rows."""
    small = zoo.FAMILIES["llama"]()
    small.resize_token_embeddings(64)
    return zoo.write_tiny_tokenizer(zoo.save(small, tmp_path / "foreign"))


def test_a_foreign_tokenizer_is_refused(foreign: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(lambda: quantize(foreign, out, text), match="tokenizer does not belong")
    refused(lambda: spinfold.evaluate(foreign, text=str(text), seq_len=32), match="tokenizer does not belong")
    refused(lambda: spinfold.verify(foreign, foreign, text=str(text)), match="tokenizer does not belong")
    refused(lambda: spinfold.rotate(str(foreign), out, recipe=recipe(text)), match="tokenizer does not belong")
    assert not out.exists()


def test_what_is_held_out_does_not_depend_on_the_recipe(model: Path, tmp_path: Path) -> None:
    """However much a fit reads, the original is measured on the same text: the one that `evaluate` takes too."""
    text = tmp_path / "numbers.txt"
    text.write_text(" ".join(f"the {i} in {i * i}" for i in range(4000)), "utf-8")
    small = {"calibration__source": str(text), "calibration__seq_len": 32, "calibration__samples": 2}
    subjects = [
        prepare(resolve(str(model)), Recipe().with_(**small), torch.device("cpu"), Quiet(), max_tokens=most)
        for most in (64, 2000, None)
    ]
    assert {subject.held_out for subject in subjects} == {"last fifth of numbers"}
    assert len({len(subject.calibration_T) for subject in subjects}) == 3
    assert all(torch.equal(subject.held_out_NT, subjects[0].held_out_NT) for subject in subjects)
    held_out = text.with_name("held-out.txt")
    held_out.write_text(texts_of(str(text))[1].text, "utf-8")
    measured = spinfold.evaluate(model, text=str(held_out), seq_len=32, max_tokens=EVAL_TOKENS["cpu"], device="cpu")
    assert measured["perplexity"] == pytest.approx(subjects[0].quality.perplexity, rel=1e-6)


@pytest.mark.parametrize("length", [3, 50, 150])
def test_too_little_text_is_refused(length: int, model: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text(TEXT[:length])
    refused(lambda: quantize(model, tmp_path / "out", short), match="too short")
    assert tree(tmp_path) == {"short.txt"}


def test_a_fit_with_longer_windows_than_the_text_is_refused(model: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text(TEXT[:300])
    refused(lambda: quantize(model, tmp_path / "out", short, fit__seq_len=256), match="too short")
    assert tree(tmp_path) == {"short.txt"}


@pytest.mark.parametrize("asked", [{"seq_len": 0}, {"seq_len": 257}, {"seq_len": 64, "max_tokens": 63}])
def test_evaluate_refuses_windows_that_cannot_be(
    asked: dict[str, int], model: Path, text: Path, tmp_path: Path
) -> None:
    run = quantize(model, tmp_path / "run", text, method="none")
    for subject in (model, run.path):
        refused(lambda subject=subject: spinfold.evaluate(subject, text=str(text), **asked), match="can't be used")


def test_a_reference_must_have_the_same_vocabulary(model: Path, foreign: Path, text: Path) -> None:
    refused(
        lambda: spinfold.evaluate(model, text=str(text), seq_len=32, reference=str(foreign)),
        match="vocabular|tokenizer",
    )


def test_a_run_is_no_model_to_verify_or_rotate(model: Path, text: Path, tmp_path: Path) -> None:
    run = quantize(model, tmp_path / "run", text, method="none")
    refused(lambda: spinfold.verify(model, run.path, text=str(text)), match="quantized run")
    refused(lambda: spinfold.rotate(str(run.path), tmp_path / "out", recipe=recipe(text)), match="config.json")


@pytest.fixture(scope="module")
def finished(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(model, tmp_path_factory.mktemp("finished") / "run", text, method="quarot").path


NEEDED = ("run.json", "maps.json", "maps.safetensors", "model/config.json", "model/model.safetensors")


@pytest.mark.parametrize("file", [*NEEDED, "model/tokenizer.json", "outliers-before.npz"])
@pytest.mark.parametrize("harm", ["gone", "cut", "noise"])
def test_a_damaged_run_is_refused(file: str, harm: str, finished: Path, text: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    data = (run / file).read_bytes()
    (run / file).unlink()
    if harm != "gone":
        (run / file).write_bytes(data[: len(data) // 2] if harm == "cut" else b"\xf1\x00" * 999)
    if file == "outliers-before.npz":
        if harm != "gone":  # a page can do without
            refused(lambda: spinfold.report(run), match=file)
        return
    refused(lambda: spinfold.evaluate(run, text=str(text), seq_len=32), match=str(run))
    if file == "run.json":
        refused(lambda: spinfold.report(run), match=str(run))


def test_tensors_of_another_run_are_refused(model: Path, text: Path, tmp_path: Path) -> None:
    first, second = (
        quantize(model, tmp_path / f"{size}", text, method="none", rounding__method="rtn", group_size=size)
        for size in (8, 16)
    )
    tensors = "model/model.safetensors"
    (first.path / tensors).write_bytes((second.path / tensors).read_bytes())
    refused(lambda: spinfold.evaluate(first.path, text=str(text), seq_len=32), match="not this run's model")


def test_a_map_that_is_not_a_number_is_not_orthogonal() -> None:
    sound, broken = Orthogonal(torch.eye(4)), Orthogonal(torch.full((4, 4), math.nan))
    proof, gaps = prove_orthogonal(SiteMaps(value=(sound, broken, sound), down=(Hadamard(8),)))
    assert not proof.ok and math.isnan(gaps["value"]) and gaps["down"] < 1e-15
