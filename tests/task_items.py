"""A few items of each zero-shot task, ours, with what real ones have in them: markup, accents, braces, stray blanks.

write_items(folder)     the files that `spinfold evaluate --task-data` reads
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["ITEMS", "write_items", "write_lines"]

_ARC = [
    {"query": "Question: What do bees make?", "choices": ["wax and honey", "iron", "glass", "rain"], "gold": 0},
    {"query": "Question: Water boils at 100 °C. At what does it freeze?", "choices": ["0 °C", "50 °C"], "gold": 0},
    {"query": 'Question: In "{x}", what is {x}?', "choices": ["a letter", "a river", "a tree"], "gold": 0},
]
ITEMS: dict[str, list[dict[str, Any]]] = {
    "arc_easy": _ARC,
    "arc_challenge": _ARC[::-1],
    "openbook_qa": [
        {"query": "A stone that falls into a lake will", "choices": ["sink", "burn", "sing", "grow"], "gold": 0},
        {"query": "In winter a bear is most likely to be", "choices": ["asleep", "at sea", "in a tree"], "gold": 0},
    ],
    "piqa": [
        {"query": "Question: open a jar\n", "choices": ["Turn its lid.", "Turn its  label."], "gold": 0},
        {"query": "Question: make crêpes \n", "choices": ["Mix eggs and chalk.", "Mix eggs and flour."], "gold": 1},
    ],
    "boolq": [
        {"query": "Passage: Snow is white.\nQuestion: is snow white?", "choices": ["no", "yes"], "gold": 1},
        {"query": "Passage: A cat -- a pet.\nQuestion: is a cat a fish?", "choices": ["no", "yes"], "gold": 0},
    ],
    "winogrande": [
        {
            "context_options": [
                "The cup was not in the bag as the cup",
                "The cup was not in the bag as the bag",
            ],
            "continuation": "was too large.",
            "gold": 0,
        },
        {
            "context_options": ["Mary met Mark. Mary", "Mary met Mark. Mark"],
            "continuation": ", too.",
            "gold": 1,
        },
    ],
    "hellaswag-2": [
        {
            "activity_label": "Baking bread",
            "ctx_a": "[header] How to bake [title] Take flour. [step] Wait  a bit.",
            "ctx_b": "the baker",
            "endings": ["kneads the dough.", ", alone, sleeps.", "eats [substeps] a door.", " runs away. [title] Off"],
            "label": 0,
        },
        {
            "activity_label": "Rowing",
            "ctx_a": "Two men sit in a boat.",
            "ctx_b": "",
            "endings": ["They row.", "They fly to the moon and stay there.", "It barks.", "The boat reads."],
            "label": "0",
        },
    ],
    "siqa": [
        {
            "context": "Kim gave Lee her umbrella.",
            "question": "How would Lee feel?",
            "answerA": "angry at Kim",
            "answerB": "thankful",
            "answerC": "like a fish",
        },
        {
            "context": "Ann ran for an hour.",
            "question": "What will Ann want to do next?",
            "answerA": "drink",
            "answerB": "buy a piano",
            "answerC": "run for another nine hours",
        },
    ],
}
_LABELS = "2\n1\n"
"""Of `siqa`, counted from 1, in a file of their own."""


def write_items(folder: Path) -> Path:
    """Write all of them; returns `folder`."""
    folder.mkdir(exist_ok=True)
    for name, records in ITEMS.items():
        write_lines(folder / f"{name}.jsonl", records)
    (folder / "siqa-labels.lst").write_text(_LABELS)
    return folder


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """JSON lines; returns `path`."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path
