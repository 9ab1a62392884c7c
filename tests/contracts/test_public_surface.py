"""What users build on: verbs, options, names. Changing one means changing the list here, on purpose.

Additions belong here too: a name is public from the moment somebody can use it.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import spinfold
from spinfold.cli import app

GLOBAL_OPTIONS = {"--debug", "--version"}
VERBS = {
    "quantize": "model --output -o --method --sites --bits --format --group-size --rounding --calibration --samples "
    "--seq-len --steps --seed --device --recipe --resume --plan --quiet --json",
    "inspect": "model --output -o --bits --format --group-size --calibration --tokens --seed --device --recipe --quiet "
    "--json",
    "rotate": "model --output -o --method --sites --calibration --seed --dtype",
    "verify": "original other --text --json",
    "evaluate": "model --text --seq-len --max-tokens --tasks --task-data --limit --json",
    "export": "run --to --output -o --check --text --device --list",
    "compare": "model --output -o --methods --plan --bits --rounding --seeds --text --second-text --max-tokens --tasks "
    "--task-data --calibration --recipe --device --shard --seconds --merge --ray --resume --quiet",
    "report": "run",
    "methods": "--json",
}
NAMES = {
    "CheckFailed",
    "Comparison",
    "Exported",
    "Forecast",
    "Grid",
    "Inspection",
    "MethodInfo",
    "Proof",
    "Recipe",
    "Run",
    "SpinfoldError",
    "__version__",
    "compare",
    "evaluate",
    "export",
    "inspect",
    "methods",
    "predict",
    "quantize",
    "report",
    "rotate",
    "targets",
    "verify",
}
SIGNATURES = {
    "quantize": "model output recipe device resume evaluate_on baselines progress",
    "predict": "model output recipe device evaluate_on",
    "rotate": "model output method sites seed dtype recipe device progress",
    "inspect": "model output recipe tokens device progress",
    "verify": "original other text tolerance device tokens",
    "evaluate": "model text seq_len max_tokens reference tasks task_data limit device compute progress",
    "export": "run target output check device text progress",
    "targets": "",
    "compare": "model output grid recipe text second_text max_tokens tasks task_data device shard seconds merge ray "
    "resume on_cell progress",
    "report": "run",
    "methods": "",
}

GROUP = typer.main.get_command(app)


def options(command: object) -> set[str]:
    """Every argument and option string of a command, `--help` left out."""
    return {text for parameter in command.params for text in parameter.opts} - {"--help"}  # type: ignore[attr-defined]


def test_verbs_are_frozen() -> None:
    assert set(GROUP.commands) == set(VERBS)
    assert options(GROUP) == GLOBAL_OPTIONS


@pytest.mark.parametrize("verb", VERBS)
def test_options_are_frozen(verb: str) -> None:
    assert options(GROUP.commands[verb]) == set(VERBS[verb].split())


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_explains_itself(verb: str) -> None:
    command = GROUP.commands[verb]
    assert command.help and command.help.strip()[-1] in ".?"
    for parameter in command.params:
        if parameter.name != "help":
            assert parameter.help and parameter.help.endswith((".", "`.")), f"{verb} {parameter.name}"


def test_names_are_frozen() -> None:
    assert set(spinfold.__all__) == NAMES
    assert sorted(spinfold.__all__) == sorted(set(spinfold.__all__))


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_name_is_there(name: str) -> None:
    assert getattr(spinfold, name) is not None


@pytest.mark.parametrize("verb", SIGNATURES)
def test_signatures_are_frozen(verb: str) -> None:
    function = getattr(spinfold, verb)
    assert list(inspect.signature(function).parameters) == SIGNATURES[verb].split()
    assert inspect.getdoc(function)


def test_a_subpackage_does_not_hide_the_verb_of_its_name() -> None:
    import spinfold.export
    import spinfold.methods
    import spinfold.report

    assert callable(spinfold.export)
    assert callable(spinfold.methods)
    assert callable(spinfold.report)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="quantise"):
        spinfold.quantise  # noqa: B018


@pytest.mark.parametrize(
    "statement", ["import spinfold", "from spinfold.cli import main; main(['quantize', '--help'])"]
)
def test_help_does_not_wait_for_torch(statement: str) -> None:
    heavy = "{'torch', 'transformers', 'numpy'}"
    code = f"{statement}; import sys; sys.exit(bool({heavy} & set(sys.modules)))"
    env = os.environ | {"PYTHONPATH": str(Path(spinfold.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
