"""What several processes must compute as one does, all in one program: `torchrun` starts it, or a test calls `compute`.

python several_processes.py FOLDER        of test_distributed.py, with llama/, experts/ and text.txt
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import weakref
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny_run
import torch
from stopped import Stopped, StopsAt, every_step_kept
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import spinfold
from spinfold import distributed as together
from spinfold.fitting.capture import capture
from spinfold.fitting.end_to_end import Schedule, fit_end_to_end
from spinfold.fitting.objectives import next_token_loss
from spinfold.folding import fold_norms
from spinfold.maps import CayleySGD, Orthogonal, SiteMaps, random_orthogonal
from spinfold.methods import spinquant
from spinfold.methods.base import FitTask
from spinfold.methods.quarot import hadamard_maps
from spinfold.methods.spinquant import learnable
from spinfold.networks import Network
from spinfold.networks.sources import resolve
from spinfold.networks.stream import hidden_in_batches
from spinfold.progress import Quiet, launched
from spinfold.recipe import Recipe
from spinfold.rotation import rotate_network
from spinfold.rounding import round_network
from spinfold.runtime import quantize_wires
from spinfold.subject import Subject, prepare

METHODS: Mapping[str, dict[str, Any]] = {
    "spinquant": {"fit__loss": "kl", "activations__clip": "learned"},
    "kurtail": {"fit__steps": 3},
    "optrot-plus": {"fit__steps": 3, "fit__batch": 1},
    "dfrot": {"fit__steps": 3},
    "spinout": {"fit__steps": 1, "fit__layers": "kurtosis"},
}
ROUNDINGS: Mapping[tuple[str, str], dict[str, Any]] = {
    ("llama", "gptaq"): {},
    ("llama", "autoround"): {"rounding__steps": 3, "rounding__batch": 3},
    ("llama", "budget"): {"rounding__method": "gptq", "budget": 4.0},
    ("experts", "gptq"): {},
}


def compute(folder: Path) -> dict[str, Any]:
    """Named results: tensors, numbers, and lists of them."""
    found: dict[str, Any] = {}
    recipe = tiny_run.recipe(
        folder / "text.txt", calibration__samples=5, fit__batch=3, compute="fp32", weights__clip_search=False
    )
    run = spinfold.quantize(str(folder / "llama"), folder / f"run-{launched()[1]}", recipe, device="cpu").data
    found["whole run"] = {
        "losses": run["fit"]["losses"],
        "figures": [row[name] for row in run["metrics"]["rows"] for name in ("perplexity", "kl") if row[name]],
        "errors": [one["error"] for one in run["rounding"]],
    }
    with together.joined():
        found["verbs"] = _verbs()
        subjects = {}
        for model in ("llama", "experts"):
            checkpoint = resolve(str(folder / model))
            subjects[model] = prepare(checkpoint, recipe, torch.device("cpu"), Quiet())
        subject = subjects["llama"]
        for name, changes in METHODS.items():
            rotated = rotate_network(subject, recipe.with_(**{"method": name} | changes), Quiet())
            maps = [one.matrix() for _, one in rotated.maps.each()]
            found[name] = {"losses": list(rotated.log.losses), "maps": maps, "clips": dict(rotated.log.clips)}
        found["shared out"] = _shared_out(subject, recipe)
        found["in fp64"] = {"fp64": _in_fp64(folder)}
        found["goes on"] = _goes_on(subject, recipe, folder / f"journal-{launched()[1]}")
        few = subject.windows(32, 1, 0)  # fewer than processes
        found["capture"] = capture(subject.network, few, ["down"], 7, 0)
        for (model, name), changes in ROUNDINGS.items():
            network, ids_NT = subjects[model].network.copy(), subjects[model].windows(128, 5, 0)
            layers = round_network(network, recipe.with_(**{"rounding__method": name} | changes), ids_NT)
            linears = [one for layer in layers for one in layer]
            weights = [one.weight.dequantize() for one in linears if one.layer == 0]
            found[f"{name} of {model}"] = {"weights": weights, "errors": [one.error for one in linears]}
    return found


def _shared_out(subject: Subject, recipe: Recipe) -> dict[str, Any]:
    """A network with whole weights in each process, and one with parts of them: the same hidden states, of one batch
    in one process and two in the other; the same fit, whose three passes they share likewise; parts before and after.

    With 8 bits, since 4 of so small a network make much of a difference in the last bit.
    """
    recipe, ids_NT = recipe.with_(bits="W8A8KV8"), subject.windows(32, 6, 0)
    own = ids_NT[: 1 + together.rank()]
    found: list[tuple[list[Any], list[float]]] = []
    for shared_out in (False, True)[: together.world()]:
        network = subject.network.held(torch.float32, shared_out=shared_out)
        assert network.resident is not shared_out
        held = sum(_bytes_held(layer.module) for layer in network.layers)
        hidden = [hidden_BTD.tolist() for hidden_BTD in hidden_in_batches(network, own, "fp32", 32)]
        task = FitTask(network, recipe, ("residual", "value"), lambda *_: ids_NT)
        maps, learned = learnable(hadamard_maps(task, random_value=True), network.device)
        quantize_wires(network, recipe, maps, scale_gradient=True)
        loss, schedule = partial(next_token_loss, network), Schedule(steps=3, batch=3, tokens_per_pass=32)
        log = fit_end_to_end(network, loss, [ids_NT], [CayleySGD(learned, 0.02)], schedule, "fp32")
        found.append((hidden, list(log.losses)))
        whole = sum(4 * p.numel() for layer in subject.network.layers for p in layer.module.parameters())
        assert held == sum(_bytes_held(layer.module) for layer in network.layers)
        assert held < (0.51 if shared_out else 1.01) * whole
    assert found[-1] == found[0]
    with pytest.raises(NotImplementedError, match="not to be") if together.world() > 1 else nullcontext():
        network.copy()
    return {"losses": found[-1][1], "recipe": {"losses": _by_the_recipe(subject, recipe)}}


def _by_the_recipe(subject: Subject, recipe: Recipe) -> list[float]:
    """SpinQuant's fit, and once more as if the network were too large: the same losses, the first layer in parts again
    while the last one computes, and nothing left of either copy."""
    asked = recipe.with_(method="spinquant", compute="bf16", fit__steps=3, fit__batch=3)
    losses, copies, in_parts = [], list[weakref.ref[Network]](), list[bool]()
    held = Network.held

    def noted(network: Network, dtype: torch.dtype, *, shared_out: bool = False) -> Network:
        twin = held(network, dtype, shared_out=shared_out)
        copies.append(weakref.ref(twin))
        first, last = twin.layers[0].linears["q"].module, twin.layers[-1].module
        if shared_out:
            last.register_forward_pre_hook(lambda *_: in_parts.append(isinstance(first.weight, DTensor)))
        return twin

    for shared_out in (False, True)[: together.world()]:
        with (
            mock.patch.object(spinquant, "_too_large", lambda _, answer=shared_out: answer),
            mock.patch.object(Network, "held", noted),
        ):
            losses.append(list(rotate_network(subject, asked, Quiet()).log.losses))
        assert len(copies) == len(losses)
        assert copies[-1]() is None
    assert losses[-1] == losses[0]
    assert in_parts[:1] == [True][: together.world() - 1]
    return losses[-1]


def _bytes_held(module: torch.nn.Module) -> int:
    """Of its parameters, in this process."""
    held = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
    return sum(one.untyped_storage().nbytes() for one in held)


def _in_fp64(folder: Path) -> dict[str, Any]:
    """Ten steps of SpinQuant in fp64, whose rounding is too small to tip a quantizer: what is left is the algorithm.

    With the published gradient: ours goes to a row's extremes, and where attention repeats quantized values, as at the
    first token, two of them are equal up to rounding, so that one or both have it.
    """
    network = Network(resolve(str(folder / "llama")).load_model().double(), name="fp64")
    network.untie()
    fold_norms(network)
    for module in network.model.modules():
        if isinstance(module, LlamaRMSNorm):  # Transformers' computes in fp32; its gain is 1 by now
            module.forward = lambda x: x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    sizes = [network.hidden_size, *(layer.head_dim for layer in network.layers)]
    learned = [random_orthogonal(size, seed).R_NN.requires_grad_() for seed, size in enumerate(sizes)]
    residual, *value = map(Orthogonal, learned)
    maps = SiteMaps(residual=residual, value=tuple(value))
    quantize_wires(network, Recipe(bits="W16A4KV4"), maps, scale_gradient=False)
    ids_NT = torch.randint(network.embedding.num_embeddings, (7, 32), generator=torch.Generator().manual_seed(0))

    def loss(ids_BT: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(network(ids_BT)[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())

    schedule = Schedule(steps=10, batch=3, tokens_per_pass=64)
    log = fit_end_to_end(network, loss, [ids_NT], [CayleySGD(learned, 0.05)], schedule, "fp32")
    return {"losses": list(log.losses), "maps": [R_NN.detach() for R_NN in learned]}


def _goes_on(subject: Subject, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Of a fit that is stopped and goes on, which has the bits of one that is not, the steps that were not made again
    are one at least.
    """
    recipe, whole, rest = recipe.with_(method="kurtail", fit__steps=3), StopsAt(), StopsAt(folder)
    expected = rotate_network(subject, recipe, Quiet(), journal=whole)
    with every_step_kept():
        with suppress(Stopped):
            rotate_network(subject, recipe, Quiet(), journal=StopsAt(folder, at=whole.seen))
        found = rotate_network(subject, recipe, Quiet(), journal=rest)
    assert rest.seen == 1 and found.log == expected.log
    maps = [[one.matrix() for _, one in rotated.maps.each()] for rotated in (expected, found)]
    assert all(map(torch.equal, *maps))
    return {"maps": maps[1]}


def _verbs() -> dict[str, Any]:
    """What the verbs give that does not depend on how many processes there are."""
    seven = list(range(7))
    mine = torch.tensor(seven[together.share(7)], dtype=torch.float64)
    x = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    value = together.total((together.spread(x) ** 3 * mine).sum())
    value.backward()
    strided = torch.ones(2, 3)[:, together.share(3)].sum(1).repeat(2, 1).T
    together.add_up([strided])
    return {
        "shares": [i for part in together.everyones(seven[together.share(7)]) for i in part],
        "objective": value.detach(),
        "gradient": x.grad,
        "strided": strided,
        "by key": together.summed({key: torch.tensor([1.0]) for key in "abc"[together.share(3)]}),
        "alike": together.alike({"bits": torch.tensor([True, False]), "rank": together.rank()}),
        "dealt": together.dealt(range(5), lambda i: torch.tensor(i, dtype=torch.bfloat16)),
        "first": together.on_first(together.rank),
    }


def launch(command: list[str], count: int) -> list[subprocess.Popen[bytes]]:
    """`command` in `count` processes, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    common["PYTHONPATH"] = os.pathsep.join(sys.path)  # where pytest has found this program's neighbours
    own = [{"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(count)]
    return [subprocess.Popen(command, env=os.environ | common | one) for one in own]


if __name__ == "__main__":
    torch.save(compute(Path(sys.argv[1])), Path(sys.argv[1]) / f"results-{os.environ['RANK']}.pt")
