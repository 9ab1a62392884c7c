"""Where kernels are tested: on a CUDA device, or else in Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
NARROW = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter truncates to bf16 where devices round
direct = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs CUDA, or runs in the interpreter")
elsewhere = pytest.mark.skipif(
    DEVICE == "cuda" or INTERPRETED or find_spec("triton") is None,
    reason="the kernels are tested directly, or Triton is not installed",
)


def passes_in_the_interpreter(file: str) -> None:
    """Run a test file once more with kernels interpreted."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:]


def compiles_instead_of_running(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """From here on a kernel's launch, on tensors of the host, compiles it for an H100: the PTX of each.

    The interpreter lets pass what the compiler refuses.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    compiled: list[str] = []
    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", float: "fp32", int: "i32"}

    def run(self: Any, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        options = {name: given.pop(name) for name in list(given) if name not in self.arg_names}
        fixed = {param.name for param in self.params if param.is_constexpr}
        signature, constants, attributes = {}, {}, {}
        for i, name in enumerate(self.arg_names):
            value = given[name]
            if name in fixed:
                signature[name], constants[i,] = "constexpr", value
                continue
            signature[name] = types[value.dtype if isinstance(value, Tensor) else type(value)]
            if isinstance(value, Tensor) or value % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
        source = ASTSource(self, signature, constants, attributes)
        compiled.append(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])

    monkeypatch.setattr(triton.JITFunction, "run", run)
    return compiled


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
