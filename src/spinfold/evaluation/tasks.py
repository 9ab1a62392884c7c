"""Zero-shot tasks: of several choices, which one does a network find most likely?

    score       log-likelihood of a choice's continuation, given its context
    acc         share of items whose right choice has the highest score
    acc_norm    the same, each score divided by the number of characters of its choice

Prompts and figures are those of lm-evaluation-harness 0.4.13, item by item (`tests/reference/test_tasks_lm_eval.py`),
without examples before the question. WinoGrande has its choices in the context, and scores what follows them (partial
evaluation, Trinh & Le 2018, arXiv 1806.02847).

A task is a file of JSON lines in the user's folder: `piqa.jsonl`, or part of a split as `piqa-….jsonl`. Labels may
stand beside it instead, one a line, in `piqa-labels.lst`.

| class        | fields of a line                                             | tasks                           |
|--------------|--------------------------------------------------------------|---------------------------------|
| `Query`      | query, choices, gold                                         | boolq, piqa, arc_*, openbook_qa |
| `SocialIQA`  | context, question, answerA, answerB, answerC, label (1 to 3) | siqa                            |
| `HellaSwag`  | activity_label, ctx_a, ctx_b, endings, label                 | hellaswag                       |
| `WinoGrande` | context_options, continuation, gold                          | winogrande                      |
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from spinfold.errors import SpinfoldError
from spinfold.evaluation.likelihood import log_likelihoods
from spinfold.networks import Network
from spinfold.progress import Progress, Quiet

__all__ = ["TASKS", "Item", "Task", "TaskResult", "average", "evaluate_tasks", "read_tasks"]


# ---- the tasks ---------------------------------------------------------------------------------------------------


class Query(BaseModel):
    """A question that is half a prompt already."""

    query: str = Field(min_length=1)
    choices: list[str]
    gold: int

    @property
    def question(self) -> str:
        """Without the word before a passage and the line break behind a goal, which the harness has not."""
        return self.query.removeprefix("Passage: ").removesuffix("\n")


class SocialIQA(BaseModel):
    """A situation, a question about it, and three answers."""

    context: str
    question: str
    answerA: str
    answerB: str
    answerC: str
    label: int

    @property
    def choices(self) -> list[str]:
        """The answers."""
        return [self.answerA, self.answerB, self.answerC]

    @property
    def gold(self) -> int:
        """Labels count from 1."""
        return self.label - 1


class HellaSwag(BaseModel):
    """A beginning and its possible ends; those from WikiHow have its markup still in them."""

    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: list[str]
    label: int

    @property
    def beginning(self) -> str:
        """What the ends continue."""
        return self._plain(f"{self.activity_label}: {self.ctx_a} {self.ctx_b.capitalize()}")

    @property
    def choices(self) -> list[str]:
        """The ends."""
        return [self._plain(ending) for ending in self.endings]

    @property
    def gold(self) -> int:
        """Labels count from 0."""
        return self.label

    @staticmethod
    def _plain(text: str) -> str:
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


class WinoGrande(BaseModel):
    """A sentence up to a blank, filled in two ways, and its end."""

    context_options: list[str]
    continuation: str
    gold: int

    @property
    def choices(self) -> list[str]:
        """The beginnings."""
        return self.context_options


Line = Query | SocialIQA | HellaSwag | WinoGrande


@dataclass(frozen=True)
class Task:
    """How the lines of a file become items. In the templates `line` is one of them, `choice` one of its choices.

    `split_items` is how many the split has that is published; a file with fewer is a part of it.
    """

    file: str
    split_items: int
    fields: type[Line]
    context: str
    continuation: str = " {choice}"
    normalised: bool = True


TASKS = {
    "boolq": Task("boolq", 3270, Query, "{line.question}\nAnswer:", normalised=False),
    "piqa": Task("piqa", 1838, Query, "{line.question}\nAnswer:"),
    "siqa": Task("siqa", 1954, SocialIQA, "Q: {line.context} {line.question}\nA:", normalised=False),
    "hellaswag": Task("hellaswag", 10042, HellaSwag, "{line.beginning}"),
    "winogrande": Task("winogrande", 1267, WinoGrande, "{choice}", " {line.continuation}", normalised=False),
    "arc_easy": Task("arc_easy", 2376, Query, "{line.question}\nAnswer:"),
    "arc_challenge": Task("arc_challenge", 1172, Query, "{line.question}\nAnswer:"),
    "openbookqa": Task("openbook_qa", 500, Query, "{line.question}"),
}
"""The eight that the tables of SpinQuant (Liu et al. 2024, arXiv 2405.16406) average, in their order.

`normalised` says whether the harness reports acc_norm.
"""


@dataclass(frozen=True)
class Item:
    """For each choice its context and continuation, and its length in characters; and which choice is right."""

    pairs: tuple[tuple[str, str], ...]
    lengths: tuple[int, ...]
    gold: int


@dataclass(frozen=True)
class TaskResult:
    """The figures of one network on `items` of the `split_items` of a task; `stderr` is that of `acc`."""

    items: int
    split_items: int
    acc: float
    stderr: float
    acc_norm: float | None


# ---- measuring ---------------------------------------------------------------------------------------------------


def evaluate_tasks(
    network: Network,
    tasks: Sequence[str],
    folder: str | Path | None,
    *,
    compute: str = "auto",
    progress: Progress | None = None,
    limit: int | None = None,
) -> dict[str, TaskResult]:
    """The figures of `network` on each task, the first `limit` items of it if given; files as in the module's table.

    Raises what `read_tasks` and `log_likelihoods` raise.
    """
    results = {}
    for name, items in read_tasks(tasks, folder, limit).items():
        pairs = [pair for item in items for pair in item.pairs]
        with (progress or Quiet()).stage(f"evaluate {name}", total=len(pairs)) as bar:
            scores = iter(log_likelihoods(network, pairs, compute=compute, bar=bar))
        results[name] = _result(TASKS[name], items, [[next(scores) for _ in item.pairs] for item in items])
    return results


def average(results: Mapping[str, TaskResult]) -> TaskResult:
    """The mean over tasks, each with the same weight; where a task has no acc_norm, its acc stands in."""
    each = list(results.values())
    return TaskResult(
        items=sum(r.items for r in each),
        split_items=sum(r.split_items for r in each),
        acc=sum(r.acc for r in each) / len(each),
        stderr=math.hypot(*(r.stderr for r in each)) / len(each),
        acc_norm=sum(r.acc if r.acc_norm is None else r.acc_norm for r in each) / len(each),
    )


def _result(task: Task, items: Sequence[Item], scores: Sequence[Sequence[float]]) -> TaskResult:
    n = len(items)
    per_character = [
        [x / length if length else -math.inf for x, length in zip(s, item.lengths, strict=True)]
        for item, s in zip(items, scores, strict=True)
    ]
    acc, acc_norm = (
        sum(_best(s) == item.gold for item, s in zip(items, kind, strict=True)) / n for kind in (scores, per_character)
    )
    stderr = math.sqrt(acc * (1 - acc) / (n - 1)) if n > 1 else math.nan
    return TaskResult(n, task.split_items, acc, stderr, acc_norm if task.normalised else None)


def _best(scores: Sequence[float]) -> int:
    """The first of the highest."""
    return max(range(len(scores)), key=scores.__getitem__)


# ---- reading -----------------------------------------------------------------------------------------------------


def read_tasks(names: Sequence[str], folder: str | Path | None, limit: int | None = None) -> dict[str, list[Item]]:
    """The items of each task, the first `limit` of them if given.

    The name `all` stands for every task. Raises `SpinfoldError` for an unknown task, a missing file, and a line that
    is not as the module's table says.
    """
    names, known = list(TASKS) if "all" in names else names, ", ".join(TASKS)
    if unknown := [name for name in names if name not in TASKS]:
        raise SpinfoldError(
            f"There is no task {unknown[0]!r}.", "Its name is not known.", f"Use all, or some of {known}."
        )
    if folder is None:
        raise SpinfoldError(
            "The tasks have no data.", "Their questions don't come with spinfold.", "Name a folder with --task-data."
        )
    if limit is not None and limit < 1:
        raise SpinfoldError(f"A limit of {limit} items can't be used.", "Nothing is left.", "Give --limit at least 1.")
    return {name: _items(name, _file(name, Path(folder)), limit) for name in names}


def _file(name: str, folder: Path) -> Path:
    """A task's file: the whole split if it is there, else the first part of it."""
    stem = TASKS[name].file
    for path in (folder / f"{stem}.jsonl", *sorted(folder.glob(f"{stem}-*.jsonl"))):
        if path.is_file():
            return path
    raise SpinfoldError(
        f"The task {name} has no data.",
        f"There is no {stem}.jsonl in {folder}.",
        f"Put it there: JSON lines with the fields {', '.join(TASKS[name].fields.model_fields)}.",
    )


def _items(name: str, path: Path, limit: int | None) -> list[Item]:
    task, beside = TASKS[name], path.with_name(f"{TASKS[name].file}-labels.lst")
    what, fields = f"{path} can't be used as the task {name}.", ", ".join(task.fields.model_fields)
    lines = _lines(path, what)
    labels = _lines(beside, what) if beside.is_file() else None
    if not lines or (labels is not None and len(labels) != len(lines)):
        counts = f"It has {len(lines)} lines" + ("." if labels is None else f", {beside.name} has {len(labels)}.")
        raise SpinfoldError(what, counts, "There must be a line for each item.")
    items = []
    for i, (number, text) in enumerate(lines[:limit]):
        try:
            record = {**json.loads(text)} if labels is None else {**json.loads(text), "label": labels[i][1]}
            items.append(_item(task, task.fields.model_validate(record)))
        except (ValueError, TypeError, RecursionError) as error:
            why = f"Line {number} is not what it should be: {_reason(error)}."
            raise SpinfoldError(what, why, f"Each line must be a JSON object with the fields {fields}.") from None
    return items


def _item(task: Task, line: Line) -> Item:
    choices = line.choices
    if not 0 <= line.gold < len(choices):
        raise ValueError(f"of {len(choices)} choices, it names number {line.gold}, counted from 0")
    words = [{"line": line, "choice": choice} for choice in choices]
    pairs = tuple((task.context.format(**w), task.continuation.format(**w)) for w in words)
    return Item(pairs, tuple(map(len, choices)), line.gold)


def _lines(path: Path, what: str) -> list[tuple[int, str]]:
    """The lines that are not empty, with their numbers."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpinfoldError(what, f"Byte {error.start} of {path.name} is not UTF-8.", "Save it as UTF-8.") from None
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _reason(error: Exception) -> str:
    """One line of an exception, without pydantic's address and class."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return ": ".join([*map(str, first["loc"]), first["msg"]])
    if isinstance(error, json.JSONDecodeError):
        return "no JSON"
    return str(error)
