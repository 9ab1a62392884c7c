"""A network: a Hugging Face causal LM seen through its family, with ops that can stand on its wires (`wires`).

Shapes: B batch, T tokens, D residual width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spinfold.compute import settle_vector_functions
from spinfold.errors import SpinfoldError
from spinfold.networks.family import family_of
from spinfold.networks.layer import Layer, Linear, parts_of
from spinfold.networks.norms import Fp64Norm, FusedNorm
from spinfold.networks.placement import Away, Store, put
from spinfold.networks.shards import SharedOut, Turns
from spinfold.networks.wired import WIRED

__all__ = ["Network"]


class _Noting(nn.Module):
    """Stands in for a layer: notes what it is called with and lets it pass."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = (layer,)  # in a tuple, so that it is no submodule
        self.x: Tensor | None = None
        self.kwargs: dict[str, Any] = {}

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        self.x, self.kwargs = x, kwargs
        return x

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"][0], name)


class Network:
    """A causal LM whose every parameter is accounted for. Raises `SpinfoldError` for one that is not understood.

    With a `store` the layers' weights are there, and on the device for their turns only: the model's layers have shapes
    and no memory (`placement.built_without_weights`), everything else is filled in here, in fp32. With `checkpointing`
    a layer's activations are computed again in the backward pass, rather than held.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        name: str = "",
        *,
        store: Store | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        settle_vector_functions()  # nothing is computed without a network
        self.checkpointing = False
        self.turns: Turns | None = None
        self.family = family_of(model.config.model_type)
        self.model, self.tokenizer, self.name = model, tokenizer, name or self.family.name
        self._check_coverage()
        model.config._attn_implementation = WIRED
        model.config._experts_implementation = WIRED
        model.requires_grad_(False).eval()
        decoder = model.base_model
        self.layers = [
            Layer(module, i, f"{model.base_model_prefix}.layers.{i}", self.family, model.config, decoder.rotary_emb)
            for i, module in enumerate(decoder.layers)
        ]
        if store is not None:
            self._fill(store, torch.device(device))

    def _fill(self, store: Store, device: torch.device) -> None:
        """Read all weights but the layers', and tell these where theirs are."""
        for layer in self.layers:
            layer.away = Away(store, layer.prefix, device)
        tied = self.head.weight is self.embedding.weight
        skipped = {"lm_head.weight"} if tied else set()
        inside = f"{self.model.base_model_prefix}.layers."
        names = [n for n, _ in self.model.named_parameters() if not n.startswith(inside) and n not in skipped]
        for key, tensor in store.read(names).items():
            put(self.model, key, tensor.to(device).to(torch.float32))
        if tied:
            self.head.weight = self.embedding.weight
        for module in self.model.modules():
            for key, buffer in module._buffers.items():
                module._buffers[key] = None if buffer is None else buffer.to(device)

    def _check_coverage(self) -> None:
        """Every parameter is one that the family names, or the model is not what we think it is."""
        family = self.family
        norms = [n for n in (family.attention_norm, family.mlp_norm, *family.post_norms) if n]
        known = {"embed_tokens.weight", "norm.weight", "lm_head.weight"}
        for i, layer in enumerate(self.model.base_model.layers):
            parts = parts_of(layer, family).values()
            names = [f"{part.module}.{kind}" for part in parts for kind in (part.attribute, "bias")]
            names += [f"{norm}.weight" for norm in norms] + list(family.untouched)
            known.update(f"layers.{i}.{name}" for name in names)
        prefix = self.model.base_model_prefix + "."
        for name, _ in self.model.named_parameters():
            if name.removeprefix(prefix) not in known:
                raise SpinfoldError(
                    f"The model has a parameter that the family {family.name!r} does not know: {name}.",
                    "If it reads or writes a wire that a map passes, the folded model would be another function.",
                    "Describe it in networks/family.py: as a linear, or as untouched with the reason.",
                )

    @property
    def config(self) -> Any:
        """The Hugging Face config."""
        return self.model.config

    @property
    def embedding(self) -> nn.Embedding:
        """Token embedding, `(V, D)`; a residual writer."""
        return cast(nn.Embedding, self.model.get_input_embeddings())

    @property
    def head(self) -> nn.Linear:
        """Language-model head, `(V, D)`; a residual reader."""
        return cast(nn.Linear, self.model.get_output_embeddings())

    @property
    def final_norm(self) -> nn.Module:
        """The norm before the head."""
        return cast(nn.Module, self.model.base_model.norm)

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self.config.hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the embedding is."""
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding."""
        return self.embedding.weight.dtype

    @property
    def linears(self) -> Iterator[Linear]:
        """All quantizable linears, layer by layer."""
        return (linear for layer in self.layers for linear in layer.linears.values())

    @property
    def norms(self) -> Iterator[nn.Module]:
        """Every norm module, query and key norms included."""
        return (m for m in self.model.modules() if type(m).__name__.endswith("RMSNorm"))

    def untie(self) -> None:
        """Give the head its own copy of a shared embedding, since the final gain is folded into the head alone."""
        if self.head.weight is self.embedding.weight:
            self.head.weight = nn.Parameter(self.head.weight.detach().clone(), requires_grad=False)
        self.config.tie_word_embeddings = False

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move in place. In fp64 the norms are computed in fp64 too, which Hugging Face's are not."""
        self.model.to(device=device, dtype=dtype)
        if dtype == torch.float64:
            for norm in self.norms:
                norm.register_forward_hook(Fp64Norm(self.family.gain_offset))
        return self

    def tensors(self, names: Collection[str]) -> dict[str, Tensor]:
        """The parameters and buffers of these names; those of layers that come and go as they are in their turns, on
        the host.
        """
        if self.resident:
            return {name: value for name, value in self.model.state_dict().items() if name in names}
        found: dict[str, Tensor] = {}
        for layer in self.layers:
            own = [name for name in names if name.startswith(f"{layer.prefix}.")]
            if own:
                with layer.present():
                    state = layer.module.state_dict(prefix=f"{layer.prefix}.")
                    found |= {name: state[name].cpu() for name in own}
        return found | {k: v for k, v in self.model.state_dict().items() if k in names and k not in found}

    def settle(self) -> None:
        """Keep all weights on the device for good."""
        for layer in self.layers:
            layer.settle()

    @property
    def resident(self) -> bool:
        """Are all weights on the device for good?"""
        return all(layer.away is None for layer in self.layers)

    def copy(self, *, share_ends: bool = False) -> Network:
        """An independent copy, ops on wires included. `share_ends`: of the layers alone, the rest is the same."""
        ends = (self.embedding, self.final_norm, self.head) if share_ends else ()
        return self._twin({id(p): p for end in ends for p in end.parameters()})

    @torch.no_grad()
    def held(self, dtype: torch.dtype, *, shared_out: bool = False) -> Network:
        """A copy to compute with, not to change: all on the device, linears and head in `dtype`, the rest shared.

        Under autocast to `dtype` it computes the same bits, without a cast at every use. With `shared_out` each process
        holds its part of the layers' linears (`shards`).
        """
        here = self.resident
        linears = {id(getattr(x.module, x.attribute)) for layer in self.layers for x in layer.foldable if here}
        linears |= {id(self.head.weight)} - {id(self.embedding.weight)}
        twin = self._twin(
            {
                id(p): nn.Parameter(p.to(dtype), requires_grad=False) if id(p) in linears else p
                for p in self.model.parameters()
            }
        )
        for layer in twin.layers:
            if layer.away is not None:
                layer.settle()
                for linear in layer.foldable:
                    weight = getattr(linear.module, linear.attribute)
                    put(linear.module, linear.attribute, weight.to(dtype))
            if shared_out:
                linears_of = {x.parameter.removeprefix(f"{layer.prefix}.") for x in layer.foldable}
                layer.away = SharedOut(layer.module, linears_of)
        if shared_out:
            twin.turns = Turns([layer.module for layer in twin.layers])
        if self.device.type == "cuda":
            for norm in twin.norms:
                norm.forward = FusedNorm(norm, self.family.gain_offset)
        return twin

    def _twin(self, memo: dict[int, Any]) -> Network:
        """A copy; `memo` has what stands in it for some objects, as in `copy.deepcopy`."""
        if self.turns:
            raise NotImplementedError("a network that is shared out is there to be computed with, not to be copied")
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model, memo)
        twin.layers = []
        for layer, module in zip(self.layers, twin.model.base_model.layers, strict=True):
            other = copy.copy(layer)
            other.module, other.wires = module, cast(nn.ModuleDict, module.wires)
            other.away = layer.away and layer.away.copy()
            other.foldable = [replace(x, module=twin.model.get_submodule(x.name)) for x in layer.foldable]
            names = (self.family.attention_norm, self.family.mlp_norm)
            other.attention_norm, other.mlp_norm = (n and module.get_submodule(n) for n in names)
            twin.layers.append(other)
        return twin

    def hidden(self, ids_BT: Tensor) -> Tensor:
        """What the head reads, `(B, T, D)`: the residual stream after the final norm."""
        if self.resident and not self.checkpointing:
            return cast(Tensor, self.model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state)
        x_BTD, kwargs_of = self.arguments(ids_BT)
        again = self.checkpointing and torch.is_grad_enabled()

        def run(x_BTD: Tensor) -> Tensor:
            for layer, kwargs in zip(self.layers, kwargs_of, strict=True):
                if again:  # nothing in a layer is random
                    x_BTD = checkpoint(layer, x_BTD, use_reentrant=False, preserve_rng_state=False, **kwargs)
                else:
                    x_BTD = layer(x_BTD, **kwargs)
            return x_BTD

        return cast(Tensor, self.final_norm(self.turns(run, x_BTD) if self.turns else run(x_BTD)))

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """The head and what the family does after it, `(B, T, V)`."""
        return self.finish(self.head(hidden_BTD))

    def finish(self, logits_BTV: Tensor) -> Tensor:
        """What the family does to the head's output: a divisor, a soft cap, or nothing."""
        if key := self.family.logits_divisor:
            logits_BTV = logits_BTV / getattr(self.config, key)
        if (key := self.family.logits_softcap) and (cap := getattr(self.config, key, None)):
            logits_BTV = torch.tanh(logits_BTV / cap) * cap
        return logits_BTV

    def __call__(self, ids_BT: Tensor) -> Tensor:
        return self.logits(self.hidden(ids_BT))

    def arguments(self, ids_BT: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """The first layer's input, `(B, T, D)`, and each layer's keyword arguments, such that
        `x = layer(x, **kwargs)` through all layers is the decoder. Those of one window hold for any number of them.
        """
        decoder = cast(Any, self.model.base_model)
        layers, notes = decoder.layers, [_Noting(layer.module) for layer in self.layers]
        decoder.layers = nn.ModuleList(notes)
        try:
            decoder(input_ids=ids_BT, use_cache=False)
        finally:
            decoder.layers = layers
        return cast(Tensor, notes[0].x), [note.kwargs for note in notes]
