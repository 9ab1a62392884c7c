"""A network: a Hugging Face causal LM seen through its family, with ops that can stand on its wires.

A *wire* is a named tensor inside a layer; whatever is put on it, an online map, a quantizer, passes every token:

    qkv_input      input of q, k, v            (B, T, D)
    query, key     after RoPE, per head        (B, heads, T, head_dim)
    value          per head                    (B, heads, T, head_dim)
    cache          both as they are attended   an `Attended`
    attention_out  input of o                  (B, T, heads * head_dim)
    mlp_input      input of gate, up           (B, T, D)     experts: (1, T, D), all tokens of the batch
    down           input of down               (B, T, F)     experts: (1, K, T, F), as if an expert were a head
    attention_skip the stream past attention   (B, T, D)
    mlp_skip       the stream past the MLP     (B, T, D)

A layer of experts has one wire for all of them. Its router stays in floating point and reads the norm's output itself,
before the wire: a quantizer on `mlp_input` does not change which experts a token meets.

Shapes: B batch, T tokens, D residual width, F MLP width, V vocabulary, O out features, I in features, K experts of a
token, E experts of a layer, S = T K rows sorted by expert.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.moe import ExpertsInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from spinfold.errors import SpinfoldError
from spinfold.networks.family import INPUT_WIRE, Family, Part, family_of
from spinfold.networks.placement import Away, Store, put
from spinfold.networks.rope import Rope
from spinfold.networks.shards import SharedOut

__all__ = ["SKIP_WIRES", "WIRES", "Attended", "Layer", "Linear", "Network", "Wire"]

SKIP_WIRES = ("attention_skip", "mlp_skip")
WIRES = ("qkv_input", "query", "key", "value", "cache", "attention_out", "mlp_input", "down", *SKIP_WIRES)


class Wire(nn.Module):
    """The ops on one wire, applied in order. A forward hook on a wire sees what the next linear reads.

    On the wires of experts it also sees, as the second argument, which K experts each token meets, `(T, K)`.

    An op may offer `with_next(op)`, one function that does both, or None; and `added_to(branch, x, factor)`, which is
    branch + (op(x) - x) / factor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops = nn.ModuleList()

    def forward(self, x: Tensor, experts_TK: Tensor | None = None) -> Tensor:
        ops = list[Any](self.ops)
        while ops:
            op = ops.pop(0)
            if ops and hasattr(op, "with_next") and (both := op.with_next(ops[0])) is not None:
                op, _ = both, ops.pop(0)
            x = op(x)
        return x

    def added_to(self, branch: Tensor, x: Tensor, factor: float) -> Tensor:
        """branch + (wire(x) - x) / factor."""
        if len(self.ops) == 1 and hasattr(self.ops[0], "added_to"):
            return cast(Any, self.ops[0]).added_to(branch, x, factor)
        return branch + (self(x) - x) / factor


class _Through:
    """A forward pre-hook that sends a module's first input through a wire.

    An object rather than a closure, so that a deep copy of the model refers to the copied wire.
    """

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": self.wire(kwargs["hidden_states"])}
        return (self.wire(args[0]), *args[1:]), kwargs


class _Skip:
    """Two hooks that send a skip connection through a wire, though the sum is out of a hook's reach.

    With the stream x noted where the branch leaves it, at its norm, the branch's last module is made to give
    b + (wire(x) - x) / f, which the layer adds up to x + f (b + (wire(x) - x) / f) = wire(x) + f b.

    An object rather than closures, for deep copies, as `_Through`. A wire without ops costs nothing.
    """

    def __init__(self, wire: Wire, factor: float) -> None:
        self.wire, self.factor = wire, factor
        self.x_BTD: Tensor | None = None

    def leave(self, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.x_BTD = args[0] if len(self.wire.ops) else None

    def join(self, writer: nn.Module, args: tuple[Tensor, ...], branch_BTD: Tensor) -> Tensor:
        if self.x_BTD is None:
            return branch_BTD
        x_BTD, self.x_BTD = self.x_BTD, None
        with torch.autocast(x_BTD.device.type, enabled=False):  # the stream is never rounded to 16 bits by autocast
            return self.wire.added_to(branch_BTD, x_BTD, self.factor)


class Attended(NamedTuple):
    """What `num_queries` queries attend to: keys and values `(B, heads, S, head_dim)`, and a mask, None if causal."""

    key_BHSN: Tensor
    value_BHSN: Tensor
    mask: Tensor | None
    num_queries: int


def _wired_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention behind the layer's query, key, value and cache wires."""
    wires = cast(nn.ModuleDict, module.wires)
    query, key, value = wires["query"](query), wires["key"](key), wires["value"](value)
    key, value, attention_mask, _ = wires["cache"](Attended(key, value, attention_mask, query.shape[2]))
    softcap, groups = kwargs.get("softcap"), query.shape[1] // key.shape[1]
    if softcap is None:
        if attention_mask is None and groups > 1 and _in_tf32(query) and query.shape[2] == key.shape[2]:
            # No fused attention in fp32 knows grouped queries: all scores would stand in memory, gigabytes of them.
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
            y = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=kwargs.get("scaling"))
            return y.transpose(1, 2).contiguous(), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.tanh(query @ key.transpose(2, 3) * (kwargs["scaling"] / softcap)) * softcap
    if attention_mask is None:
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        attention_mask = attention_mask.tril(scores.shape[-1] - scores.shape[-2])  # a cache has more keys than queries
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def _in_tf32(x: Tensor) -> bool:
    """Is x to be multiplied in the precision "tf32" of `compute.py`, on a GPU?"""
    plain = x.is_cuda and x.dtype == torch.float32 and not torch.is_autocast_enabled("cuda")
    return plain and torch.backends.cuda.matmul.allow_tf32


def _wired_experts(module: nn.Module, x_TD: Tensor, experts_TK: Tensor, share_TK: Tensor) -> Tensor:
    """Each token through its K experts, behind the layer's wires, and their outputs added up by the router's shares.

    Like `_wired_attention` it gives what Transformers' own forward gives, from the same parameters.
    """
    wires, act = cast(nn.ModuleDict, module.wires), cast(nn.Module, module.act_fn)
    # Read once: with a parametrization on them, every access would compute them anew.
    gate_up_EOD, down_EDF = cast(Tensor, module.gate_up_proj), cast(Tensor, module.down_proj)
    num_tokens, per_token = experts_TK.shape
    by_expert_S = experts_TK.flatten().argsort(stable=True)
    by_token_S = by_expert_S.argsort()
    counts_E = experts_TK.flatten().bincount(minlength=len(down_EDF)).tolist()

    def linear(x_SI: Tensor, w_EOI: Tensor) -> Tensor:
        pairs = zip(x_SI.split(counts_E), w_EOI, strict=True)
        return torch.cat([F.linear(x_NI, w_OI) for x_NI, w_OI in pairs])

    x_TD = wires["mlp_input"](x_TD[None], experts_TK)[0]
    gate_SF, up_SF = linear(x_TD[by_expert_S // per_token], gate_up_EOD).chunk(2, dim=-1)
    h_TKF = (act(gate_SF) * up_SF)[by_token_S].unflatten(0, (num_tokens, per_token))
    h_TKF = wires["down"](h_TKF.transpose(0, 1)[None], experts_TK)[0].transpose(0, 1)
    y_SD = linear(h_TKF.flatten(0, 1)[by_expert_S], down_EDF)
    y_TKD = y_SD[by_token_S].unflatten(0, (num_tokens, per_token))
    return (y_TKD * share_TK[..., None]).sum(1).to(x_TD.dtype)


AttentionInterface.register("spinfold", _wired_attention)
AttentionMaskInterface.register("spinfold", sdpa_mask)
ExpertsInterface.register("spinfold", _wired_experts)


@dataclass(frozen=True)
class Linear:
    """One named linear of a layer: rows of a parameter, the experts' rows one after the other if it has three axes."""

    role: str
    layer: int
    name: str
    module: nn.Module
    rows: slice
    attribute: str = "weight"
    expert: int | None = None

    @property
    def key(self) -> str:
        """Its name in the layer: the role, such as `down`, of an expert `down@5`."""
        return self.role if self.expert is None else f"{self.role}@{self.expert}"

    @property
    def parameter(self) -> str:
        """The name of the parameter that holds it."""
        return f"{self.name}.{self.attribute}"

    @property
    def weight_OI(self) -> Tensor:
        """A view of the weight; write through it with `copy_`."""
        weight = cast(Tensor, getattr(self.module, self.attribute)).data
        return weight.view(-1, weight.shape[-1])[self.rows]

    @property
    def bias_O(self) -> Tensor | None:
        """A view of the bias, or None."""
        bias = cast(Tensor | None, getattr(self.module, "bias", None))
        return None if bias is None else bias.data[self.rows]


def _parts_of(layer: nn.Module, family: Family) -> dict[str, Part]:
    """The layer's linears by role: a router and experts, if it has a router."""
    sparse = family.experts and family.experts["router"].module in dict(layer.named_modules())
    return dict(family.linears) | (dict(family.experts) if sparse else {})


class Layer:
    """One decoder layer: its linears, norms, wires and head layout. Its weights may be `away` (see `placement`).

    `foldable` are all linears. The router is one that is not quantized: it is small, and it decides which experts a
    token meets.
    """

    def __init__(
        self, module: nn.Module, index: int, prefix: str, family: Family, config: Any, rotary: nn.Module
    ) -> None:
        self.module, self.index, self.prefix = module, index, prefix
        self.away: Away | None = None
        attention, mlp = module.get_submodule(family.attention), module.get_submodule(family.mlp)
        self.head_dim: int = int(cast(int, attention.head_dim))
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        parts = _parts_of(module, family)
        self.foldable = [linear for role, part in parts.items() for linear in self._linears(role, part)]
        norms = [family.attention_norm, family.mlp_norm]
        self.attention_norm, self.mlp_norm = (n and module.get_submodule(n) for n in norms)

        self.wires = nn.ModuleDict({name: Wire() for name in WIRES})
        module.wires = self.wires
        attention.wires = self.wires
        rope = Rope(rotary, getattr(attention, "layer_type", None))
        cast(Any, module).rope = rope
        attention.register_forward_pre_hook(rope.note, with_kwargs=True)
        o, down = (module.get_submodule(parts[role].module) for role in ("o", "down"))
        through = [(attention, "qkv_input"), (o, "attention_out")]
        if "router" in parts:
            down.wires = self.wires
        else:
            through += [(mlp, "mlp_input"), (down, "down")]
        for target, wire in through:
            target.register_forward_pre_hook(_Through(self.wire(wire)), with_kwargs=True)
        if not family.post_norms:  # a norm between a branch and the stream leaves no place to join it
            factor = getattr(config, family.residual_factor) if family.residual_factor else 1.0
            norms_and_writers = (self.attention_norm, o), (self.mlp_norm, mlp)
            for name, (norm, writer) in zip(SKIP_WIRES, norms_and_writers, strict=True):
                skip = _Skip(self.wire(name), factor)
                cast(nn.Module, norm).register_forward_pre_hook(skip.leave)
                writer.register_forward_hook(skip.join)

    def _linears(self, role: str, part: Part) -> Iterator[Linear]:
        module = self.module.get_submodule(part.module)
        weight = cast(Tensor, getattr(module, part.attribute))
        height = weight.shape[-2]
        queries, keys, half = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, height // 2
        sizes = {"q": queries, "k": keys, "v": keys, "gate": half, "up": half}
        first = sum(sizes[other] for other in part.fused[: part.index])
        last = first + sizes[role] if part.fused else height
        name = f"{self.prefix}.{part.module}"
        for expert in range(len(weight)) if weight.ndim == 3 else [None]:
            rows = slice(first, last) if expert is None else slice(expert * height + first, expert * height + last)
            yield Linear(role, self.index, name, module, rows, part.attribute, expert)

    @property
    def linears(self) -> dict[str, Linear]:
        """The linears that are quantized, by key."""
        return {linear.key: linear for linear in self.foldable if linear.role != "router"}

    @property
    def groups(self) -> dict[str, list[Linear]]:
        """The linears by the wire that they read, in the order in which a token meets them."""
        groups: dict[str, list[Linear]] = {}
        for linear in self.linears.values():
            groups.setdefault(INPUT_WIRE[linear.role], []).append(linear)
        return groups

    @property
    def mlp_width(self) -> int:
        """F, the inputs of the down projection, of each expert's if there are some."""
        return self.groups["down"][0].weight_OI.shape[1]

    @property
    def rope(self) -> Rope:
        """RoPE as its keys meet it."""
        return cast(Rope, self.module.rope)

    def wire(self, name: str) -> Wire:
        """The wire of that name."""
        return cast(Wire, self.wires[name])

    @contextmanager
    def present(self) -> Iterator[Layer]:
        """Its weights are on the device, at least within this block."""
        away = self.away
        if away is None:
            yield self
            return
        try:
            self._fetch(away)
            yield self
        finally:
            away.users -= 1
            if not away.users:
                away.forget(self.module)

    def _fetch(self, away: Away) -> None:
        away.users += 1
        if away.users == 1:
            away.fetch(self.module)
            for do in away.changes:
                do(self)

    def settle(self) -> None:
        """Keep the weights on the device for good."""
        if self.away is not None:
            self._fetch(self.away)
            self.away = None

    def change(self, do: Callable[[Layer], None]) -> None:
        """Let `do(layer)` change the weights, for good."""
        if self.away is not None:
            self.away.changes.append(do)
        if self.away is None or self.away.users:
            do(self)

    def __call__(self, x_BTD: Tensor, **kwargs: Any) -> Tensor:
        with self.present():
            out = self.module(x_BTD, **kwargs)
        return out[0] if isinstance(out, tuple) else out


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
        self.checkpointing = False
        self.family = family_of(model.config.model_type)
        self.model, self.tokenizer, self.name = model, tokenizer, name or self.family.name
        self._check_coverage()
        model.config._attn_implementation = "spinfold"
        model.config._experts_implementation = "spinfold"
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
            parts = _parts_of(layer, family).values()
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
                norm.register_forward_hook(_Fp64Norm(self.family.gain_offset))
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
        if self.device.type == "cuda":
            for norm in twin.norms:
                norm.forward = _FusedNorm(norm, self.family.gain_offset)
        return twin

    def _twin(self, memo: dict[int, Any]) -> Network:
        """A copy; `memo` has what stands in it for some objects, as in `copy.deepcopy`."""
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
        for layer, kwargs in zip(self.layers, kwargs_of, strict=True):
            if again:  # nothing in a layer is random
                x_BTD = checkpoint(layer, x_BTD, use_reentrant=False, preserve_rng_state=False, **kwargs)
            else:
                x_BTD = layer(x_BTD, **kwargs)
        return cast(Tensor, self.final_norm(x_BTD))

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


class _FusedNorm:
    """An RMSNorm's forward as one kernel, for fp32; x / rms(x) * gain."""

    def __init__(self, norm: nn.Module, gain_offset: int) -> None:
        self.norm, self.plain, self.gain_offset = norm, norm.forward, gain_offset

    def __call__(self, x: Tensor) -> Tensor:
        weight = cast(Tensor, self.norm.weight)
        if x.dtype != weight.dtype:
            return cast(Tensor, self.plain(x))
        eps = getattr(self.norm, "variance_epsilon", None) or self.norm.eps
        return F.rms_norm(x, (x.shape[-1],), weight + self.gain_offset, cast(float, eps))


class _Fp64Norm:
    """A forward hook that replaces an RMSNorm's fp32 arithmetic by fp64: x / rms(x) * gain."""

    def __init__(self, gain_offset: int) -> None:
        self.gain_offset = gain_offset

    def __call__(self, norm: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x = args[0]
        eps = getattr(norm, "variance_epsilon", None) or norm.eps
        gain = cast(Tensor, norm.weight) + self.gain_offset
        return F.rms_norm(x, (x.shape[-1],), gain, cast(float, eps)) if x.dtype == torch.float64 else out
