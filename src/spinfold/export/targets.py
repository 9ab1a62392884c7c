"""What each target can run, as data: asked before any work (`choice`), printed by `spinfold export --list`.

A row says: this runtime, in this version, runs this kind of run, and how that is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from spinfold.formats import FLOAT_FORMATS

__all__ = ["BOUNDS", "ONLINE", "TARGETS", "Bounds", "Row", "either", "kinds_text", "sizes_text"]

ALL_BITS: Final = (2, 3, 4, 5, 6, 7, 8, 16)
ONLINE: Final = ("query_key", "down", "skip")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing that a target can run. `None` stands for "any"; a group of None is the whole row.

    `formats` are those of weights and activations, as a recipe names them; `symmetric` and `groups` are of integers.
    `online` are the ops that it applies at inference: maps at the sites query_key and down, changes of basis on the
    skip connections. `multiple` divides every width of every linear, `block` every group of weights, or row where that
    is the group. `online_bias`: may a linear with an online op on its input have a bias? `sliding`: can attention end
    before the context does? `mixed`: may each linear have a weight grid of its own? `parallel`: what is known of tensor
    parallelism. `established` says how all of this is known.
    """

    target: str
    runtime: str
    format: str
    weights: tuple[int, ...]
    formats: tuple[str, ...] = ("int",)
    symmetric: tuple[bool, ...] = (True, False)
    groups: tuple[int | None, ...] | None = None
    mixed: bool = False
    activations: tuple[int, ...] = (16,)
    activation_symmetric: tuple[bool, ...] = (True, False)
    activation_extras: bool = False
    kv: tuple[int, ...] = (16,)
    online: tuple[str, ...] = ()
    online_bias: bool = False
    multiple: int = 1
    block: int = 1
    families: tuple[str, ...] | None = None
    moe: bool = False
    sliding: bool = True
    parallel: str = "tensor parallelism not tried"
    established: str

    def cells(self) -> dict[str, str]:
        """The row in words, by column."""
        any_size = "any size" if self.block == 1 else f"any multiple of {self.block}"
        groups = sizes_text(self.groups) if self.groups else any_size
        weights, floats = bits_text(self.weights), "".join(f", {name}" for name in self.formats if name != "int")
        if self.weights != (16,):
            weights += f" {kinds_text(self.symmetric)}, groups of {groups}{floats}"
        activations = bits_text(self.activations)
        if self.activations != (16,):
            activations += f" {kinds_text(self.activation_symmetric)}{floats}"
        limits = {
            f"widths multiples of {self.multiple}": self.multiple > 1,
            ", ".join(self.families or ()): self.families is not None,
            "one weight grid for all linears": self.weights != (16,) and not self.mixed,
            "no experts": not self.moe,
            "the context ends with a sliding window": not self.sliding,
            "no bias after an online op": self.online and not self.online_bias,
            self.parallel: True,
        }
        return {
            "target": self.target,
            "runs in": self.runtime,
            "format": self.format,
            "weights": weights,
            "activations": activations,
            "KV": bits_text(self.kv),
            "online": ", ".join(self.online) or "-",
            "limits": "; ".join(text for text, applies in limits.items() if applies) or "-",
            "how it is known": self.established,
        }


_CT, _TRANSFORMERS = "compressed-tensors", "Transformers 5.23, compressed-tensors 0.20"
_VLLM_CPU, _VLLM_GPU = "vLLM 0.32 (CPU)", "vLLM 0.32 (GPU)"
_TESTED = "run: tests/contracts/test_export.py"
_W8A8: Final[dict[str, Any]] = {
    "format": "int-quantized",
    "weights": (8,),
    "symmetric": (True,),
    "groups": (None,),
    "activations": (8,),
    "activation_symmetric": (True,),
}
_sglang = partial(
    Row,
    target=_CT,
    runtime="SGLang 0.5.23 (GPU)",
    groups=(None, 32, 64, 128),
    families=("llama", "qwen2", "qwen3", "phi3", "granite", "gemma2", "olmo2"),
    established="read in the source; nothing was run",
)
_gguf = partial(
    Row,
    target="gguf",
    runtime="llama.cpp (llama-cpp-python 0.3.36)",
    families=("llama", "granite", "qwen2", "qwen3", "phi3"),
    block=32,
    sliding=False,
    established="run: tests/runtime/test_llama_cpp.py",
)

TARGETS: Final[tuple[Row, ...]] = (
    Row(
        target=_CT,
        runtime=_TRANSFORMERS,
        format="pack-quantized",
        weights=(4, 8),
        symmetric=(True,),
        established=_TESTED,
    ),
    Row(
        target=_CT,
        runtime=_TRANSFORMERS,
        format="pack-quantized",
        weights=(4, 8),
        symmetric=(False,),
        established=_TESTED + "; load with CompressedTensorsConfig(dequantize=True)",
    ),
    Row(
        target=_CT,
        runtime=_TRANSFORMERS,
        format="int-quantized",
        weights=(8,),
        symmetric=(True,),
        groups=(None,),
        activations=(8,),
        established=_TESTED,
    ),
    Row(
        target=_CT,
        runtime=_TRANSFORMERS,
        format="int-quantized",
        weights=(4,),
        symmetric=(True,),
        activations=(8,),
        activation_symmetric=(True,),
        established=_TESTED,
    ),
    Row(
        target=_CT,
        runtime=_VLLM_CPU,
        format="pack-quantized",
        weights=(4,),
        multiple=32,
        established="run: tests/runtime/test_vllm.py, groups of 32; of 128 by hand; sizes read in the source",
    ),
    Row(
        target=_CT,
        runtime=_VLLM_CPU,
        **_W8A8,
        established="run: tests/runtime/test_vllm.py",
    ),
    Row(
        target=_CT,
        runtime=_VLLM_CPU,
        format="int-quantized",
        weights=(4,),
        symmetric=(True,),
        groups=(None, 128),
        activations=(8,),
        activation_symmetric=(True,),
        multiple=32,
        established="run: tests/runtime/test_vllm.py, whole rows; groups of 128 by hand",
    ),
    Row(
        target=_CT,
        runtime=_VLLM_GPU,
        format="pack-quantized",
        weights=(4, 8),
        symmetric=(True,),
        groups=(None, 32, 64, 128),
        online=("down",),
        multiple=64,
        parallel="no tensor parallelism",
        established="the file run in vLLM's CPU build, the map's missing kernel replaced; the GPU kernels read",
    ),
    Row(
        target=_CT,
        runtime=_VLLM_GPU,
        **_W8A8,
        online=("down",),
        parallel="no tensor parallelism",
        established="the file run in vLLM's CPU build, the map's missing kernel replaced; the GPU kernels read",
    ),
    _sglang(format="pack-quantized", weights=(4, 8), symmetric=(True,), multiple=128),
    _sglang(format="pack-quantized", weights=(4,), symmetric=(False,), multiple=128),
    _sglang(**_W8A8, multiple=16),
    _gguf(format="F16", weights=(16,)),
    _gguf(format="Q8_0", weights=(5, 6, 7, 8), symmetric=(True,)),
    _gguf(format="Q4_0", weights=(2, 3, 4), symmetric=(True,)),
    _gguf(format="Q4_1", weights=(2, 3, 4), symmetric=(False,)),
    Row(
        target="transformers",
        runtime="Transformers 5.23 + spinfold",
        format="spinfold",
        weights=ALL_BITS,
        formats=("int", *FLOAT_FORMATS),
        mixed=True,
        activations=ALL_BITS,
        activation_extras=True,
        kv=ALL_BITS,
        online=ONLINE,
        online_bias=True,
        moe=True,
        parallel="no tensor parallelism",
        established="run: tests/contracts/test_plugin.py",
    ),
)


@dataclass(frozen=True)
class Bounds:
    """How far a target's logits may be from those of the run in memory, as means over the predicted tokens.

    `top1` is the least share of tokens with the same best guess, `kl` the most nats from the run's distribution to the
    target's, `perplexity` the largest relative change of perplexity.
    """

    top1: float
    kl: float
    perplexity: float


BOUNDS: Final[dict[str, Bounds]] = {
    # Scales, embedding and head are rounded to 16 bits, and Transformers computes in that dtype: SmolLM2 in bfloat16 is
    # 0.002 nats away, and with activations of 8 bits, some of which then go the other way, 0.006.
    "compressed-tensors": Bounds(top1=0.9, kl=1e-2, perplexity=0.01),
    # llama.cpp rounds activations to 8 bits before products with quantized weights.
    "gguf": Bounds(top1=0.93, kl=1e-2, perplexity=0.02),
    "transformers": Bounds(top1=0.99, kl=1e-5, perplexity=1e-3),
}


def bits_text(bits: tuple[int, ...]) -> str:
    """`2-8, 16` for all of them."""
    return "2-8, 16" if bits == ALL_BITS else ", ".join(map(str, bits))


def sizes_text(sizes: tuple[int | None, ...]) -> str:
    """`32, 128 or a row`."""
    return either(tuple(size or "a row" for size in sizes))


def either(values: tuple[Any, ...]) -> str:
    """`4, 8 or 16`."""
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last


def kinds_text(symmetric: tuple[bool, ...]) -> str:
    """`symmetric or asymmetric`."""
    return " or ".join("symmetric" if one else "asymmetric" for one in symmetric)
