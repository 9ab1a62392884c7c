"""What a run's page says before its figures: what was done, what came of it, the proofs, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spinfold.errors import SpinfoldError
from spinfold.recipe import Bits
from spinfold.report.tables import human_bytes, human_seconds, perplexity_text
from spinfold.report.values import Data, in_words, items, number, part

__all__ = [
    "environment_of",
    "lede_of",
    "measured_on",
    "proof_line",
    "sizes_of",
    "tiles_of",
    "uses_of",
    "what_would_load",
]

_RUN_IN = {
    "gguf": ("Exported, in llama.cpp", "llama-cli -m CHECKPOINT/FILE"),
    "compressed-tensors": ("Exported, in vLLM", "vllm serve CHECKPOINT"),
    "transformers": (
        "Exported, in Transformers",
        "import spinfold\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('CHECKPOINT')",
    ),
}
"""How an exported checkpoint is run, by target: where, and the lines."""


def lede_of(run: Data) -> str:
    """What was quantized, to what, and how, in a sentence or two."""
    recipe, model = part(run, "recipe"), part(run, "model")
    said = []
    if bits := _bits(recipe):
        widths = {"weights": bits.weights, "activations": bits.activations}
        same = bits.keys == bits.values
        widths |= {"KV cache": bits.kv} if same else {"keys": bits.keys, "values": bits.values}
        words = [f"{what} {'in floating point' if n == 16 else f'{n} bit'}" for what, n in widths.items()]
        said.append(f"{bits}: {', '.join(words)}.")
        if bits.kv < 16 and (cache := part(recipe, "kv").get("format", "int")) != "int":
            said.append(f"The cache in {str(cache).upper()}.")
    grid = "" if (name := recipe.get("format", "int")) == "int" else str(name).upper()
    if recipe.get("method"):
        sites = f" at {', '.join(map(str, sites))}" if (sites := items(recipe.get("sites"))) else ""
        said.append(f"Maps: {recipe['method']}{sites}.")
    if rounding := part(recipe, "rounding").get("method"):
        group = recipe.get("group_size")
        shared = f"one scale per {f'{group} inputs' if group else 'output row'}"
        said.append(f"Rounding: {str(rounding).upper()}{f' to {grid}' if grid else f', {shared}'}.")
    if (parameters := number(model.get("parameters"))) is not None:
        family = f", family {model['family']}" if model.get("family") else ""
        millions = parameters / 1e6
        said.append(
            f"{millions:,.0f} million parameters{family}."
            if millions >= 1
            else f"{parameters:,.0f} parameters{family}."
        )
    return " ".join(said)


def tiles_of(run: Data, rows: Sequence[Data]) -> list[tuple[str, str, str]]:
    """The result in a few numbers: (label, value, remark)."""
    method = part(run, "recipe").get("method")
    original = next((row for row in rows if row.get("name") == "original"), {})
    others = [row for row in rows if row.get("name") != "original"]
    result: Data = next((row for row in others if row.get("name") == method), others[-1] if others else {})
    tiles = []
    if (now := number(result.get("perplexity"))) is not None:
        was = number(original.get("perplexity"))
        remark = f"original {perplexity_text(was)}" if was else "lower is better"
        tiles.append(("perplexity", perplexity_text(now), remark))
    if (kl := number(result.get("kl"))) is not None:
        tiles.append(("KL to the original", f"{kl:.4f}", "nats per token"))
    if (top1 := number(result.get("top1"))) is not None:
        tiles.append(("first choice kept", f"{top1:.1%}", "of all tokens"))
    if sizes := sizes_of(run):
        tiles.append(("linear weights, packed", sizes[-1][1], f"{sizes[0][2] / sizes[-1][2]:.1f}× smaller"))
    seconds = [number(stage.get("seconds")) for stage in items(run.get("stages")) if isinstance(stage, Mapping)]
    if any(seconds):
        device = part(run, "device").get("name")
        tiles.append(("time", human_seconds(sum(s or 0 for s in seconds)), f"on {device}" if device else "all stages"))
    return tiles


def measured_on(run: Data) -> str:
    """Which text the figures come from, and how much of it."""
    text = part(run, "text")
    if not text.get("evaluation"):
        return ""
    tokens, seq_len = number(text.get("evaluation_tokens")), number(text.get("seq_len"))
    much = f", {tokens:,.0f} predicted tokens in windows of {seq_len:,.0f}" if tokens and seq_len else ""
    return f"{text['evaluation']}{much}"


def sizes_of(run: Data) -> list[tuple[str, str, float, float]]:
    """Label, size in words, in bytes, and as percentage of the original; empty unless both are known."""
    sizes = part(run, "sizes")
    before, after = (number(sizes.get(key)) for key in ("original_bytes", "quantized_bytes"))
    if not before or not after:
        return []
    bits = number(sizes.get("bits_per_weight"))
    label = "quantized" + (f", {bits:.2f} bits per weight" if bits else "")
    widest = max(before, after)
    return [
        ("original", human_bytes(before), before, 100 * before / widest),
        (label, human_bytes(after), after, 100 * after / widest),
    ]


def proof_line(proof: Data) -> dict[str, Any]:
    """A proof ready to be shown. It holds only if its numbers are there and in order, whatever it says of itself."""
    measured, tolerance = number(proof.get("measured")), number(proof.get("tolerance"))
    held = measured is not None and tolerance is not None and measured <= tolerance and proof.get("ok", True) is True
    shown = [f"{value:.2g}" if value is not None else "not a number" for value in (measured, tolerance)]
    text = f"{shown[0]} {'≤' if held else 'is not ≤'} {shown[1]}"
    return {"ok": held, "statement": proof.get("statement", ""), "text": text, "detail": proof.get("detail", "")}


def what_would_load(run: Data, folder: str) -> str:
    """Where no export has been proved: what would prove it."""
    said = [str(in_words(proof.get("statement"))) for proof in items(run.get("proofs")) if isinstance(proof, Mapping)]
    if not said or any(statement.startswith(f"{target}: ") for statement in said for target in _RUN_IN):
        return ""
    return f"spinfold export {_shell_word(folder)} --to TARGET -o CHECKPOINT"


def uses_of(run: Data, folder: str) -> list[tuple[str, str]]:
    """Where, and the lines that run it there."""
    uses = [
        (
            "In Python",
            f"from spinfold import evaluate\nquality = evaluate({folder!r}, text='my-text.txt')\nprint(quality)",
        ),
        ("In a shell", f"spinfold evaluate {_shell_word(folder)} --text my-text.txt"),
    ]
    for target, made in part(run, "exports").items():
        if isinstance(made, Mapping) and target in _RUN_IN:
            file = next((str(name) for name in part(made, "files") if str(name).endswith(".gguf")), "model.gguf")
            title, lines = _RUN_IN[target]
            uses.append((title, lines.replace("FILE", _shell_word(file))))
    return uses


def environment_of(run: Data) -> list[tuple[str, str]]:
    """Where the numbers come from, as pairs."""
    pairs: list[tuple[str, Any]] = [(key, run.get(key)) for key in ("spinfold", "created", "command", "schema_version")]
    for section in ("model", "device", "text"):
        pairs += [(f"{section}: {key}", value) for key, value in part(run, section).items()]
    pairs += [(key, value) for key, value in part(run, "metrics").items() if key != "rows"]
    return [(key.replace("_", " "), in_words(value)) for key, value in pairs if value not in (None, "", {}, [])]


def _bits(recipe: Data) -> Bits | None:
    try:
        return Bits.parse(str(recipe.get("bits")))
    except SpinfoldError:
        return None


def _shell_word(word: str) -> str:
    return word if all(c.isalnum() or c in "._-/" for c in word) else "'" + word.replace("'", "'\\''") + "'"
