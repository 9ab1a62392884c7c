"""Zero-shot tasks: a batch scores as its members alone do, prompts are the harness's, and bad files are refused."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from task_items import ITEMS, write_items, write_lines
from transformers import AutoTokenizer

from spinfold.errors import CheckFailed, SpinfoldError
from spinfold.evaluation import likelihood, tasks
from spinfold.evaluation.likelihood import log_likelihoods
from spinfold.evaluation.tasks import TASKS, TaskResult, average, evaluate_tasks, read_tasks
from spinfold.networks import Network
from spinfold.recipe import Recipe
from spinfold.runtime import quantize_wires

FAMILIES = ["llama", "mistral", "qwen3", "granite", "gemma2"]
PAIRS = [
    ("the rain in", " the theatre"),
    ("the rain in", " a"),
    ("x ", "y"),
    ("a  ", " b and a long end that goes on and on"),
    ("There is more than one window of sixteen tokens in this. " * 2, "Is there?"),
    ("q", "r"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(zoo.write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_items(tmp_path / "items")


def network_of(family: str, tokenizer: Any) -> Network:
    return Network(zoo.FAMILIES[family](1), tokenizer)


def one_at_a_time(network: Network, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """The definition: no batch, no padding, the head everywhere."""
    scores = []
    for context, continuation in pairs:
        ids = network.tokenizer(context + continuation)["input_ids"]  # type: ignore[misc]
        start = len(network.tokenizer(context.rstrip())["input_ids"])  # type: ignore[misc]
        logp_TV = network(torch.tensor([ids]))[0].log_softmax(-1)
        scores.append(sum(float(logp_TV[t - 1, ids[t]]) for t in range(start, len(ids))))
    return scores


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_scores_as_its_members_alone(family: str, tokenizer: Any) -> None:
    network = network_of(family, tokenizer)
    expected = one_at_a_time(network, PAIRS)
    assert max(expected) < 0
    assert log_likelihoods(network, PAIRS, compute="fp32") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tokens", [1, 70, 1 << 20])
@pytest.mark.parametrize("chunk", [1, 1000])
def test_neither_batches_nor_quantizers_mix_sequences(
    tokens: int, chunk: int, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = network_of("llama", tokenizer).to(dtype=torch.float64)
    plain = one_at_a_time(network, PAIRS)
    quantize_wires(network, Recipe(bits="W16A4KV4"))
    expected = one_at_a_time(network, PAIRS)
    assert expected != pytest.approx(plain, rel=1e-3), "nothing was quantized"
    monkeypatch.setattr(likelihood, "_TOKENS_PER_BATCH", {"cpu": tokens})
    monkeypatch.setattr(likelihood, "_TOKENS_PER_CHUNK", chunk)
    assert log_likelihoods(network, PAIRS, compute="fp32") == pytest.approx(expected, rel=1e-5)
    assert log_likelihoods(network, PAIRS[::-1], compute="fp32") == pytest.approx(expected[::-1], rel=1e-5)


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 100))
@settings(max_examples=100)
def test_batches_hold_every_sequence_once_and_no_more_than_they_may(lengths: list[int], tokens: int) -> None:
    batches = list(likelihood._batches(lengths, tokens))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= tokens for batch in batches)


def test_a_context_that_is_too_long_loses_its_beginning(tokenizer: Any) -> None:
    network = network_of("llama", tokenizer)
    network.config.max_position_embeddings = 12
    long, short = ("never mind what came before: twelve more", " tokens"), ("elve more", " tokens")
    tails = [tokenizer(context + rest)["input_ids"][-13:] for context, rest in (long, short)]
    assert tails[0] == tails[1]
    scores = log_likelihoods(network, [long, short], compute="fp32")
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_a_network_that_knows_nothing_prefers_what_is_short(tokenizer: Any, folder: Path) -> None:
    """With a head of zeros every token has probability 1 / V, and each choice that of its number of tokens."""
    network = network_of("llama", tokenizer)
    network.head.weight.zero_()
    pairs = [("Q", " abcd"), ("Q", " ab")]
    each = -math.log(zoo.VOCAB)
    assert log_likelihoods(network, pairs, compute="fp32") == pytest.approx([4 * each, 2 * each])  # " a" is one token
    write_lines(folder / "openbook_qa.jsonl", [{"query": "Q", "choices": ["zzzz", "z", "zz"], "gold": 1}] * 3)
    result = evaluate_tasks(network, ["openbookqa"], folder, compute="fp32")["openbookqa"]
    # Of k letters, (k + 1) tokens over k characters: normalised, the longest is best.
    assert result == TaskResult(3, 500, acc=1.0, stderr=0.0, acc_norm=0.0)


def test_the_figures_of_known_scores(tokenizer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [{"query": "Q", "choices": ["ab", "abcd"], "gold": gold} for gold in (0, 1, 1, 0, 0)]
    write_lines(folder / "arc_easy.jsonl", items)
    scores = [-2.0, -3.0, -2.0, -3.0, -5.0, -1.0, -1.0, -1.0, -1.0, -5.0]
    monkeypatch.setattr(tasks, "log_likelihoods", lambda *_, **__: scores)
    result = evaluate_tasks(network_of("llama", tokenizer), ["arc_easy"], folder)["arc_easy"]
    # Best: 0 1 1 0 0 when divided by 2 and 4, but 0 0 1 0 0 as they are; a tie goes to the first, as with argmax.
    assert (result.acc, result.acc_norm) == (4 / 5, 3 / 5)
    assert result.stderr == pytest.approx(math.sqrt(0.8 * 0.2 / 4))
    other = TaskResult(10, 20, acc=0.4, stderr=0.3, acc_norm=None)
    assert average({"a": result, "b": other}) == TaskResult(
        15, 2396, pytest.approx(0.6), pytest.approx(math.hypot(0.3, result.stderr) / 2), pytest.approx(0.5)
    )


PROMPTS = {
    "arc_easy": ("Question: What do bees make?\nAnswer:", " wax and honey", 13, 0),
    "openbookqa": ("A stone that falls into a lake will", " sink", 4, 0),
    "piqa": ("Question: open a jar\nAnswer:", " Turn its lid.", 13, 0),
    "boolq": ("Snow is white.\nQuestion: is snow white?\nAnswer:", " no", 2, 1),
    "winogrande": ("The cup was not in the bag as the cup", " was too large.", 37, 0),
    "hellaswag": ("Baking bread: How to bake. Take flour. Wait a bit. The baker", " kneads the dough.", 17, 0),
    "siqa": ("Q: Kim gave Lee her umbrella. How would Lee feel?\nA:", " angry at Kim", 12, 1),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name: str, folder: Path) -> None:
    context, continuation, length, gold = PROMPTS[name]
    item = read_tasks([name], folder)[name][0]
    assert item.pairs[0] == (context, continuation)
    assert (item.lengths[0], item.gold) == (length, gold)


def test_all_tasks_their_first_items_and_whole_files_before_parts(folder: Path) -> None:
    everything = read_tasks(["all"], folder)
    assert list(everything) == list(TASKS)
    assert [len(everything[name]) for name in ("arc_easy", "hellaswag", "siqa")] == [3, 2, 2]
    assert read_tasks(["arc_easy"], folder, limit=2)["arc_easy"] == everything["arc_easy"][:2]
    write_lines(folder / "hellaswag.jsonl", ITEMS["hellaswag-2"][1:])
    assert read_tasks(["hellaswag"], folder)["hellaswag"] == everything["hellaswag"][1:]


def refusal(call: Callable[[], Any]) -> SpinfoldError:
    with pytest.raises(SpinfoldError) as caught:
        call()
    assert caught.value.why and caught.value.fix
    return caught.value


def test_requests_that_are_refused(folder: Path, tmp_path: Path) -> None:
    assert "'pica'" in str(refusal(lambda: read_tasks(["piqa", "pica"], folder)))
    assert "--task-data" in str(refusal(lambda: read_tasks(["piqa"], None)))
    assert "limit of 0" in str(refusal(lambda: read_tasks(["piqa"], folder, limit=0)))
    assert "no piqa.jsonl" in str(refusal(lambda: read_tasks(["piqa"], tmp_path)))


GOOD = ITEMS["piqa"][0]
BAD = {
    "no JSON": ("{", "no JSON"),
    "no object": ("[1, 2]", "mapping"),
    "a field is missing": (json.dumps({"query": "Q", "choices": ["a", "b"]}), "gold: Field required"),
    "no choices": (json.dumps(GOOD | {"choices": "ab"}), "choices"),
    "a choice is a number": (json.dumps(GOOD | {"choices": ["a", 2]}), "choices: 1"),
    "gold is too large": (json.dumps(GOOD | {"gold": 2}), "number 2"),
    "gold is negative": (json.dumps(GOOD | {"gold": -1}), "number -1"),
    "an empty question": (json.dumps(GOOD | {"query": ""}), "query"),
    "half a character": (json.dumps(GOOD | {"query": "\ud800"}), "query"),
    "too deep": ("[" * 100_000, "recursion"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_malformed_line_is_named(case: str, folder: Path) -> None:
    line, reason = BAD[case]
    (folder / "piqa.jsonl").write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    error = refusal(lambda: read_tasks(["piqa"], folder))
    assert "piqa.jsonl" in error.what and "Line 3" in error.why and reason in error.why and "query" in error.fix


def test_files_that_hold_no_items(folder: Path) -> None:
    (folder / "piqa.jsonl").write_text("\n\n")
    assert "0 lines" in refusal(lambda: read_tasks(["piqa"], folder)).why
    (folder / "piqa.jsonl").write_bytes(b"\xff\xfe\xff")
    assert "UTF-8" in refusal(lambda: read_tasks(["piqa"], folder)).why
    (folder / "siqa-labels.lst").write_text("1\n")
    assert "has 1" in refusal(lambda: read_tasks(["siqa"], folder)).why
    (folder / "siqa-labels.lst").write_text("1\n4\n")
    assert "Line 2" in refusal(lambda: read_tasks(["siqa"], folder)).why


def test_networks_that_are_refused(tokenizer: Any) -> None:
    network = network_of("llama", None)
    assert "tokenizer" in refusal(lambda: log_likelihoods(network, PAIRS)).why
    network = network_of("llama", tokenizer)
    network.head.weight[5] = math.nan
    with pytest.raises(CheckFailed, match="6 of 6"):
        log_likelihoods(network, PAIRS, compute="fp32")


@pytest.mark.skipif(not os.environ.get("SPINFOLD_TASK_DATA"), reason="SPINFOLD_TASK_DATA names no folder with tasks")
def test_the_published_files_are_whole() -> None:
    for name, items in read_tasks(["all"], os.environ["SPINFOLD_TASK_DATA"]).items():
        expected = 1000 if name == "hellaswag" else TASKS[name].split_items
        assert len(items) in (expected, TASKS[name].split_items)
        choices = {len(item.pairs) for item in items}
        assert min(choices) >= 2 and len({item.gold for item in items}) == max(choices)
