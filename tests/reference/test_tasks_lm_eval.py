"""Zero-shot tasks against lm-evaluation-harness: its prompts, its log-likelihoods, its accuracies, item by item.

The harness runs its own task definitions and its own scorer on the same network. Only where a task's data come from
is changed: to a local file, which holds our items put back into the data set's original fields.

Needs `lm_eval`; `make test-tasks TASK_DATA=folder` installs it, and adds 30 items of each published task on SmolLM2.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
import zoo
from task_items import write_items, write_lines
from transformers import AutoTokenizer

from spinfold.evaluating import open_network
from spinfold.evaluation import tasks
from spinfold.evaluation.likelihood import log_likelihoods
from spinfold.evaluation.tasks import TASKS, evaluate_tasks, read_tasks
from spinfold.networks import Network

lm_eval = pytest.importorskip("lm_eval")

DEFINITIONS = {
    "boolq": "super_glue/boolq/default",
    "piqa": "piqa/piqa",
    "siqa": "siqa/siqa",
    "hellaswag": "hellaswag/hellaswag",
    "winogrande": "winogrande/default",
    "arc_easy": "arc/arc_easy",
    "arc_challenge": "arc/arc_challenge",
    "openbookqa": "openbookqa/openbookqa",
}

Record = dict[str, Any]


def lettered(record: Record) -> Record:
    letters = "ABCDE"[: len(record["choices"])]
    return {"choices": {"text": record["choices"], "label": list(letters)}, "answerKey": letters[record["gold"]]}


def arc(record: Record) -> Record:
    return lettered(record) | {"question": record["query"].removeprefix("Question: ")}


def openbookqa(record: Record) -> Record:
    return lettered(record) | {"question_stem": record["query"]}


def piqa(record: Record) -> Record:
    goal = record["query"].removeprefix("Question: ")[:-1]
    return {"goal": goal, "sol1": record["choices"][0], "sol2": record["choices"][1], "label": record["gold"]}


def boolq(record: Record) -> Record:
    passage, _, question = record["query"].rpartition("\nQuestion: ")
    return {"passage": passage.removeprefix("Passage: "), "question": question[:-1], "label": record["gold"]}


def winogrande(record: Record) -> Record:
    options = record["context_options"]
    common = os.path.commonprefix(options)  # noqa: RUF071  characters are meant
    first, second = (option[len(common) :] for option in options)
    sentence = f"{common}_ {record['continuation']}"
    return {"sentence": sentence, "option1": first, "option2": second, "answer": str(record["gold"] + 1)}


def labelled(record: Record) -> Record:
    return record | {"label": str(record["label"])}


ORIGINAL: dict[str, Callable[[Record], Record]] = {
    "boolq": boolq,
    "piqa": piqa,
    "siqa": labelled,
    "hellaswag": labelled,
    "winogrande": winogrande,
    "arc_easy": arc,
    "arc_challenge": arc,
    "openbookqa": openbookqa,
}


def records(name: str, folder: Path, limit: int) -> list[Record]:
    """The first lines of a task's file, labels included."""
    path = next(folder.glob(f"{TASKS[name].file}*.jsonl"))
    found = [json.loads(line) for line in itertools.islice(path.open(encoding="utf-8"), limit)]
    if (labels := folder / f"{TASKS[name].file}-labels.lst").is_file():
        found = [record | {"label": label} for record, label in zip(found, labels.read_text().split(), strict=False)]
    return found


def judge(network: Network, name: str, folder: Path, limit: int, work: Path) -> tuple[list[Record], Record]:
    """What the harness says of each item, in order, and of all of them."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    data = write_lines(work / "data.jsonl", map(ORIGINAL[name], records(name, folder, limit)))
    task = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / f"{DEFINITIONS[name]}.yaml"),
        "task": "local",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(data)}, "cache_dir": str(work)},
        "training_split": None,
        "test_split": None,
    }
    (work / "local.yaml").write_text(yaml.safe_dump(task))
    model = HFLM(pretrained=network.model, tokenizer=network.tokenizer, batch_size=4, device="cpu")
    manager = TaskManager(include_path=str(work), include_defaults=False)
    result = lm_eval.simple_evaluate(model, tasks=["local"], task_manager=manager, bootstrap_iters=1)
    samples = sorted(result["samples"]["local"], key=lambda sample: sample["doc_id"])
    return samples, result["results"]["local"]


def assert_agreement(network: Network, name: str, folder: Path, limit: int, work: Path) -> None:
    samples, figures = judge(network, name, folder, limit, work)
    items, scores = read_tasks([name], folder, limit)[name], []
    assert len(items) == len(samples) > 0

    def score(*args: Any, **options: Any) -> list[float]:
        scores.extend(log_likelihoods(*args, **options))
        return scores

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "log_likelihoods", score)
        ours = evaluate_tasks(network, [name], folder, limit=limit, compute="fp32")[name]
    assert [pair for item in items for pair in item.pairs] == [tuple(a) for s in samples for a in s["arguments"]]
    theirs = [float(score) for sample in samples for score, _ in sample["filtered_resps"]]
    assert scores == pytest.approx(theirs, rel=1e-4, abs=1e-3)
    rest = iter(scores)
    for item, sample in zip(items, samples, strict=True):
        one = tasks._result(TASKS[name], [item], [[next(rest) for _ in item.pairs]])
        assert (one.acc, one.acc_norm) == (sample["acc"], sample.get("acc_norm")), item
    assert (ours.items, ours.acc) == (len(samples), pytest.approx(figures["acc,none"]))
    assert ours.stderr == pytest.approx(figures["acc_stderr,none"])
    assert (ours.acc_norm is None) == ("acc_norm,none" not in figures)
    assert ours.acc_norm == pytest.approx(figures.get("acc_norm,none"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Network:
    tokenizer = AutoTokenizer.from_pretrained(zoo.write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    return Network(zoo.FAMILIES["llama"](), tokenizer)


@pytest.mark.parametrize("name", TASKS)
def test_our_own_items(name: str, tiny: Network, tmp_path: Path) -> None:
    assert_agreement(tiny, name, write_items(tmp_path / "items"), 10, tmp_path)


@pytest.fixture(scope="module")
def smollm2() -> Network:
    return open_network("smollm2", torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("SPINFOLD_TASK_DATA"), reason="SPINFOLD_TASK_DATA names no folder with tasks")
@pytest.mark.parametrize("name", TASKS)
def test_published_items_on_smollm2(name: str, smollm2: Network, tmp_path: Path) -> None:
    assert_agreement(smollm2, name, Path(os.environ["SPINFOLD_TASK_DATA"]), 30, tmp_path)
