"""The online transforms on a GPU beside a copy of the same bytes, an elementwise kernel, a dense product, and peers.

    python benchmarks/transforms.py OUT [--seconds 480] [--peers FOLDER] [--as-measured]
    python benchmarks/transforms.py OUT --markdown docs/performance.md

The first writes OUT/transforms.json and prints the tables; the second puts the tables of that file between the marks of
a page. FOLDER holds the sources of the peers, which are compiled on the spot: `fht/csrc` of Dao-AILab's
fast-hadamard-transform, `hadacore` of meta-pytorch/applied-ai's kernels/cuda/inference/hadamard_transform.

Method: a CUDA graph of many launches is replayed five times, the median counts, divided by the launches. From 4096
tokens on, inputs and outputs rotate among buffers that together exceed the L2 cache three times; below, they stay in
it, as they do behind the layer that wrote them. Copies, elementwise kernels, products and peers are timed in the
same way. Every way to cut the work (`kernels.tilings`) is measured first, with one format for each kind of result;
--as-measured takes the best ones of an earlier run instead, which `kernels.tilings` has as a table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from clocks import DEVICE, ON_GPU, Work, clock, clock_copy, copies_of
from torch import Tensor

from spinfold.formats import FLOAT_FORMATS, Format, IntFormat
from spinfold.kernels import tilings
from spinfold.maps import Hadamard
from spinfold.runtime import transforms

SIZES = (576, 1536, 3072, 4096, 5120, 8192, 9728, 11008, 14336, 18944)
TOKENS = (1, 4, 16, 4096, 16384)
NVFP4 = replace(FLOAT_FORMATS["nvfp4"], outer="row")
FORMATS: dict[str, tuple[Format | None, bool]] = {
    "map only": (None, False),
    "INT4 in bf16": (IntFormat(4, False), False),
    "MXFP4 in bf16": (FLOAT_FORMATS["mxfp4"], False),
    "INT4": (IntFormat(4, False), True),
    "INT8": (IntFormat(8, True), True),
    "FP8": (FLOAT_FORMATS["fp8"], True),
    "MXFP4": (FLOAT_FORMATS["mxfp4"], True),
    "NVFP4": (NVFP4, True),
}
"""The format, and whether its codes are packed rather than turned into numbers again."""
STANDS_FOR: dict[tilings.Kind, str] = {
    "map": "map only",
    "groups": "MXFP4 in bf16",
    "rows": "INT4 in bf16",
    "group codes": "MXFP4",
    "row codes": "INT4",
    "row bytes": "FP8",
    "few": "INT4 in bf16",
}
"""The format that stands for others of its kind in the search."""
DTYPE = torch.bfloat16 if ON_GPU else torch.float16
BEGIN, END = "<!-- transforms -->", "<!-- /transforms -->"


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--peers", type=Path, default=Path("peers"))
    parser.add_argument("--as-measured", action="store_true")
    parser.add_argument("--sizes", type=lambda text: tuple(map(int, text.split(","))), default=SIZES)
    parser.add_argument("--tokens", type=lambda text: tuple(map(int, text.split(","))), default=TOKENS)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    path = args.out / "transforms.json"
    if args.markdown:
        put_in_page(args.markdown, tables(json.loads(path.read_text())))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(path, args)
    for part in (run.tune, run.measure, run.check, run.measure_low_rank, run.measure_heads, run.measure_peers):
        try:
            part()
        except Exception:
            run.note(part.__name__, traceback.format_exc(limit=-3))
        run.save()
    for child in multiprocessing.active_children():
        child.terminate()
    print("\n".join(run.results["errors"]))
    print(tables(run.results))


class Run:
    """What has been measured so far, and the time that is left."""

    def __init__(self, path: Path, args: argparse.Namespace) -> None:
        self.path, self.args = path, args
        self.end = time.monotonic() + args.seconds
        self.results: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if ON_GPU else "CPU, interpreted",
            "torch": torch.__version__,
            "check": [],
            "tuning": {},
            "cells": [],
            "heads": [],
            "low_rank": [],
            "errors": [],
        }
        self.peers = start_building(args.peers) if args.peers.is_dir() and ON_GPU else None
        self.pool: ProcessPoolExecutor | None = None
        if ON_GPU:
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(max(1, min(16, os.cpu_count() or 2) - 2), mp_context=context)

    def note(self, what: str, error: str) -> None:
        """Keep an error and go on."""
        self.results["errors"].append(f"{what}: {error.strip()[-600:]}")

    def save(self) -> None:
        """Write all that is known."""
        self.path.write_text(json.dumps(self.results, indent=1))

    def late(self, reserve: float = 0) -> bool:
        """Is the time up, but for `reserve` seconds?"""
        return time.monotonic() > self.end - reserve

    def compile(self, jobs: Iterable[Any], reserve: float = 30) -> Callable[[], None]:
        """Fill Triton's cache, on all cores at once; the function that is returned waits for it."""
        if self.pool is None:
            return lambda: None
        try:
            waiting = [self.pool.submit(compiled, job) for job in jobs]
        except BrokenProcessPool as error:
            self.note("compile", repr(error))
            return lambda: None

        def wait() -> None:
            begin, errors = time.monotonic(), []
            try:
                with suppress(TimeoutError):
                    done = as_completed(waiting, timeout=max(1, self.end - time.monotonic() - reserve))
                    errors += (one.result() for one in done)
            except BrokenProcessPool as error:
                self.note("compile", repr(error))
            for one in waiting:
                one.cancel()
            spent, failed = time.monotonic() - begin, [error for error in errors if error]
            print(f"compiled {len(errors)} of {len(waiting)}, {len(failed)} in vain, waited {spent:.0f} s", flush=True)
            if failed:
                self.note("compile", failed[0])

        return wait

    def check(self) -> None:
        """The kernels beside their definitions on the CPU, for an odd number of tokens."""
        for size in self.args.sizes:
            x = random(33, size)
            map = Hadamard(size)
            y = map.apply(x.cpu().float() if ON_GPU else x.float())
            for name, (fmt, packed) in FORMATS.items():
                try:
                    self.results["check"].append({"size": size, "format": name, **differences(x, y, map, fmt, packed)})
                except Exception as error:
                    self.note(f"check {size} {name}", repr(error))
        for size in (64, *self.args.sizes):
            x = random(33, size)
            y = Hadamard(size).apply(x.cpu().double())
            error = float((in_fp32(33, size)(x).cpu().double() - y).norm() / y.norm())
            self.results["check"].append({"size": size, "format": "fp32", "relative_error_of_fp32": error})
        worst: dict[str, float] = {
            key: max((row.get(key, 0.0) for row in self.results["check"]), default=0.0)
            for key in ("relative_error", "relative_error_of_fp32", "codes_off", "numbers_off")
        }
        print(f"{len(self.results['check'])} checks, worst {worst}", flush=True)

    def tune(self) -> None:
        """The fastest tiling for each size and kind of result; from here on it is used."""
        if self.args.as_measured:
            return
        candidates = {size: tilings.tilings(Hadamard(size).orders) for size in self.args.sizes}
        many = 8192 if ON_GPU else 4
        cuts = sorted({(size, t._replace(programs=1)) for size, ts in candidates.items() for t in ts})
        jobs = ((4 if kind == "few" else 400, size, name, t) for size, t in cuts for kind, name in STANDS_FOR.items())
        self.compile(((transform, job) for job in jobs), reserve=100)()
        for size, ways in candidates.items():
            if self.late(80):
                break
            for kind, name in STANDS_FOR.items():
                found = []
                inputs = inputs_of(4 if kind == "few" else many, size)
                for tiling in ways if kind != "few" else {t._replace(num_stages=1, programs=1) for t in ways}:
                    try:
                        us = clock(transform(size, name, tiling), inputs, quick=True)
                        found.append((us, *tiling))
                    except Exception as error:
                        self.note(f"tiling {size} {tuple(tiling)}", repr(error)[:200])
                found.sort()
                self.results["tuning"].setdefault(str(size), {})[kind] = found[:8]
                if found:
                    tilings.MEASURED.setdefault(size, {})[kind] = tilings.Tiling(*found[0][1:])
                    print(f"{size} {kind}: " + ", ".join(f"{us:.2f} {t}" for us, *t in found[:3]), flush=True)
            self.save()

    def measure(self) -> None:
        """The table: each size, number of tokens and format."""
        wait = self.compile(
            (
                (transform, (n, size, name, tiling_of(size, name, n)))
                for n in (4096, 4)
                for size in self.args.sizes
                for name in FORMATS
            ),
            reserve=70,
        )
        self.compile((in_fp32, (33, size)) for size in (64, *self.args.sizes))
        self.compile(
            (low_rank_work, (n, *shape, kind, *cut))
            for n in (4, 4096, 16384)
            for shape in RESIDUALS
            for kind in SUMS
            for cut in cuts_of_sum(n, kind)
        )
        self.compile(
            (heads_work, (n, head, *kind, *cut))
            for n, cuts in ((4, FEW_HEADS), (16384, MANY_HEADS))
            for head in HEADS
            for kind in KINDS
            for cut in cuts
        )
        wait()
        for size in self.args.sizes:
            for num_tokens in self.args.tokens:
                if self.late(25):
                    self.note("measure", f"no time left for {size} x {num_tokens}")
                    return
                inputs = inputs_of(num_tokens, size)
                cell: dict[str, Any] = {"size": size, "tokens": num_tokens, "formats": {}}
                cell["elementwise_us"] = clock(lambda x: x * 2, inputs)
                for name in FORMATS:
                    try:
                        us = clock(transform(size, name), inputs)
                        copy_us = clock_copy(bytes_of(size, num_tokens, name))
                        cell["formats"][name] = {"us": us, "copy_us": copy_us}
                    except Exception as error:
                        self.note(f"{size} x {num_tokens} {name}", repr(error)[:300])
                self.results["cells"].append(cell)
            self.save()

    def measure_peers(self) -> None:
        """The dense product, and the peers."""
        peers = finish_building(self.peers, self) if self.peers else {}
        H_NN, size = torch.empty(0), 0
        for cell in self.results["cells"]:
            if self.late(5):
                return
            if cell["size"] != size:
                size = cell["size"]
                H_NN = dense(size)
            inputs = inputs_of(cell["tokens"], size)
            for name, work in {"matmul": _dense_product(H_NN), **peers}.items():
                if (one := work(size)) is not None:
                    try:
                        cell[f"{name}_us"] = clock(one, inputs)
                    except Exception as error:
                        self.note(f"{name} {size} x {cell['tokens']}", repr(error)[:300])

    def measure_heads(self) -> None:
        """Queries and keys of 32 and 8 heads through RoPE, a rotation and their quantizer."""
        kinds = [(head, *kind) for head in HEADS for kind in KINDS]
        for num_tokens in self.args.tokens:
            for head, heads, name in kinds:
                if self.late(10):
                    return
                inputs = inputs_of(num_tokens, heads * head)
                row = {"tokens": num_tokens, "head": head, "heads": heads, "format": name}
                cuts = MANY_HEADS if num_tokens > 64 else FEW_HEADS
                row |= self.fastest(heads_work, (num_tokens, head, heads, name), cuts, inputs)
                row["copy_us"] = clock_copy(
                    num_tokens * heads * (2 * head + (head // 2 + 5 if name in PACKED else 2 * head))
                )
                row["elementwise_us"] = clock(lambda x: x * 2, inputs)
                self.results["heads"].append(row)

    def measure_low_rank(self) -> None:
        """The correction of the stream and the residual sum."""
        for size, rank in RESIDUALS:
            for num_tokens in self.args.tokens:
                if self.late(3):
                    return
                inputs = inputs_of(num_tokens, 2 * size)
                row = {"size": size, "rank": rank, "tokens": num_tokens, "copy_us": clock_copy(num_tokens * size * 6)}
                for kind in SUMS:
                    cuts = cuts_of_sum(num_tokens, kind)
                    row[kind] = self.fastest(low_rank_work, (num_tokens, size, rank, kind), cuts, inputs)
                row["torch_us"] = clock(low_rank_work(num_tokens, size, rank, "torch"), inputs)
                row["elementwise_us"] = clock(lambda both: torch.add(*both.view(2, -1)), inputs)
                self.results["low_rank"].append(row)

    def fastest(self, work: Any, of: tuple[Any, ...], cuts: list[Any], inputs: list[Tensor]) -> dict[str, Any]:
        """The time of the best of some ways to cut the work."""
        found = []
        for cut in cuts:
            try:
                found.append((clock(work(*of, *cut), inputs, quick=True), cut))
            except Exception as error:
                self.note(f"{work.__name__} {of} {cut}", repr(error)[:200])
        return {"us": min(found)[0], "cut": min(found)[1], "all": sorted(found)} if found else {}


def in_fp32(num_tokens: int, size: int) -> Work:
    """The map of an fp32 input."""
    return lambda x: Hadamard(size).apply(x.float())


HEADS = (64, 128)
KINDS = ((32, "RoPE and map"), (8, "RoPE, map and INT4 in bf16"), (8, "RoPE, map and INT4"))
FEW_HEADS = [(16, 8, 1, 8)]
MANY_HEADS = [(64, 4, 1, 8)]
RESIDUALS = [(4096, 32), (4096, 64), (8192, 64)]
SUMS = ("after another", "by itself", "without x")
"""x U known from the sum before, and the next one made; x U made first; the same, where the model adds up x itself."""
FEW_SUMS: list[tuple[int, ...]] = [()]
MANY_SUMS: list[tuple[int, ...]] = [()]
if ON_GPU:
    FEW_HEADS += [(16, 2, 1, 8), (16, 4, 1, 8)]
    MANY_HEADS += [(64, 4, 1, n, 1) for n in (2, 3, 4, 6, 8, 64)] + [(64, 4, 1, 3), (64, 4, 2, 3, 1), (128, 8, 1, 2, 1)]
    FEW_SUMS += [(tokens, 128, parts, 8, 2) for tokens in (4, 8, 16) for parts in (32, 64)] + [(16, 128, 32, 8, 3)]
    MANY_SUMS += [(64, 128, 2, 4, 2), (64, 128, 2, 4, 3), (64, 128, 4, 4, 2), (64, 64, 2, 4, 4)]
else:
    RESIDUALS = [(576, 16)]
PACKED = ("RoPE, map and INT4",)


def heads_work(num_tokens: int, head: int, heads: int, name: str, *cut: int) -> Work:
    """Heads through RoPE, a rotation and perhaps a quantizer."""
    from spinfold.kernels.heads import Cut, rotate_heads, split_matrix

    angle = torch.rand(1, num_tokens, head // 2, device=DEVICE)
    cos, sin = angle.cos().to(DTYPE), angle.sin().to(DTYPE)
    R_NN = torch.linalg.qr(torch.randn(head, head, generator=torch.Generator().manual_seed(0)))[0]
    matrix = split_matrix(R_NN).to(DEVICE)
    grid: Any = None if name == "RoPE and map" else transforms.numbers(IntFormat(4, False, head))
    options = {"cos": cos, "sin": sin, "grid": grid, "packed": name in PACKED, "cut": Cut(*cut)}
    return lambda x: rotate_heads(x.view(1, num_tokens, heads, head), matrix, **options)


def cuts_of_sum(num_tokens: int, kind: str) -> list[tuple[int, ...]]:
    """Ways to cut the sum, the one in use first; one that is not after another is x U's as well."""
    cuts = MANY_SUMS if num_tokens > 64 else FEW_SUMS
    return cuts if kind == SUMS[0] else cuts[:1]


def low_rank_work(num_tokens: int, size: int, rank: int, kind: str, *cut: int) -> Work:
    """The residual sum of both halves of a tensor, by the kernel cut in some way, or by torch."""
    from spinfold.kernels.low_rank import Cut, inner_product, low_rank_sum

    U_NR, V_RN = random(size, rank), random(rank, size)
    way = Cut(*cut) if cut else None
    before = random(num_tokens, size)
    _, inner = low_rank_sum(before, before, inner_product(before, U_NR), V_RN, next_U_NR=U_NR, cut=way)

    def work(both: Tensor) -> Any:
        x, branch = both.view(2, num_tokens, size)
        if kind == "torch":
            return branch + (x + (x @ U_NR) @ V_RN)
        if kind == SUMS[0]:
            return low_rank_sum(x, branch, inner, V_RN, next_U_NR=U_NR, cut=way)
        return low_rank_sum(x, branch, inner_product(x, U_NR), V_RN, with_x=kind == SUMS[1])

    return work


def inputs_of(num_tokens: int, size: int) -> list[Tensor]:
    """More than the cache holds for many tokens, two for few."""
    return [random(num_tokens, size) for _ in range(copies_of(2 * size * num_tokens) if num_tokens >= 1024 else 2)]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(DTYPE)


def transform(size: int, name: str, tiling: Any = None) -> Work:
    """The work of a cell, with a given tiling or with the best one known."""
    fmt, packed = FORMATS[name]
    map = Hadamard(size)
    if tiling is not None:
        grid = fmt and transforms.numbers(fmt)
        return lambda x: map.by_kernel(x, grid=grid, packed=packed, tiling=tiling)
    if fmt is None:
        return map.apply if ON_GPU else map.by_kernel
    if not ON_GPU:
        return lambda x: map.by_kernel(x, grid=transforms.numbers(fmt), packed=packed)
    return lambda x: (transforms.encode_through if packed else transforms.fake_quantize_through)(x, map, fmt)


def tiling_of(size: int, name: str, num_tokens: int) -> Any:
    """The best tiling known in this process."""
    fmt, packed = FORMATS[name]
    kind = tilings.kind_of(fmt and transforms.numbers(fmt), packed)
    return tilings.best_tiling(Hadamard(size).orders, (fmt and fmt.group_size) or 0, num_tokens, kind=kind)


def compiled(job: tuple[Any, tuple[Any, ...]]) -> str:
    """Run a kernel once; the error, if there is one."""
    work, of = job
    try:
        if work is transform:
            num_tokens, *rest = of
            transform(*rest)(random(num_tokens, rest[0]))
        else:
            num_tokens, *rest = of
            width = rest[0] * rest[1] if work is heads_work else 2 * rest[0]
            work(*of)(random(num_tokens, width))
        torch.cuda.synchronize()
    except Exception as error:
        return repr(error)
    return ""


def differences(x: Tensor, y: Tensor, map: Hadamard, fmt: Format | None, packed: bool) -> dict[str, float]:
    """How far a kernel's result on x is from the definition's on the exactly rotated y."""
    grid = None if fmt is None else transforms.numbers(fmt)
    if fmt is not None and not map.has_kernel(x, fmt.group_size or 0):
        return {}
    mine = map.by_kernel(x, grid=grid, packed=packed)
    if not packed:
        expected = y if fmt is None else transforms.fake_quantize(y, fmt)
        error = mine.float().cpu() - expected
        off = error.abs() > 0.02 * expected.abs().clamp(min=expected.abs().mean())
        if fmt is None:
            return {"relative_error": float(error.norm() / y.norm())}
        return {"numbers_off": float(off.float().mean())}
    expected = transforms.encode(y, fmt)
    return {"codes_off": float((mine.codes.cpu() != expected.codes).float().mean())}


def bytes_of(size: int, num_tokens: int, name: str) -> int:
    """What a cell reads and writes."""
    fmt, packed = FORMATS[name]
    if fmt is None or not packed:
        return 4 * size * num_tokens
    return round((2 + fmt.bits_per_number(size) / 8) * size * num_tokens)


# ── peers ──────────────────────────────────────────────────────────────────────────────────────────────────

PEERS = {
    "dao": ("fht/csrc", ["fast_hadamard_transform.cpp", "fast_hadamard_transform_cuda.cu"]),
    "hadacore": ("hadacore", ["hadamard_transform.cpp", "hadamard_transform_cuda.cu"]),
}
_BUILD = """
import sys
from torch.utils.cpp_extension import load
name, folder, *sources = sys.argv[1:]
flags = ["-O3", "--expt-relaxed-constexpr", "--expt-extended-lambda"] + [
    f"-U__CUDA_NO_{kind}_{part}__" for kind in ("HALF", "BFLOAT16") for part in ("OPERATORS", "CONVERSIONS")
]
flags += ["--use_fast_math"] * (name == "dao")
load(name, sources, extra_cuda_cflags=flags, extra_include_paths=[folder], build_directory=sys.argv[2])
"""


def start_building(folder: Path) -> dict[str, subprocess.Popen[bytes]]:
    """Compile the peers in the background."""
    environment = os.environ | {"TORCH_CUDA_ARCH_LIST": "9.0", "MAX_JOBS": "4"}
    started = {}
    for name, (place, sources) in PEERS.items():
        where = (folder / place).resolve()
        command = [sys.executable, "-c", _BUILD, name, str(where), *(str(where / source) for source in sources)]
        with (where / "build.log").open("wb") as log:
            started[name] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    return started


def finish_building(started: dict[str, subprocess.Popen[bytes]], run: Run) -> dict[str, Callable[[int], Work | None]]:
    """What each peer does for a size: None where it does not support it."""
    from importlib.util import module_from_spec, spec_from_file_location

    peers = {}
    for name, process in started.items():
        where = (run.args.peers / PEERS[name][0]).resolve()
        try:
            process.wait(timeout=max(1, run.end - time.monotonic() - 20))
            spec = spec_from_file_location(name, where / f"{name}.so")
            assert spec is not None and spec.loader is not None
            module = module_from_spec(spec)
            spec.loader.exec_module(module)
            peers[name] = _dao(module) if name == "dao" else _hadacore(module)
        except Exception as error:
            process.kill()
            run.note(f"building {name}", f"{error!r} {(where / 'build.log').read_text()[-500:]}")
    return peers


def dense(size: int) -> Tensor:
    """The map as a matrix."""
    from spinfold.maps.hadamard_orders import factorise, hadamard_matrix

    H_NN = torch.ones(1, 1, device=DEVICE)
    for order in factorise(size) or ():
        H_NN = torch.kron(H_NN, torch.tensor(hadamard_matrix(order), device=DEVICE, dtype=H_NN.dtype))
    return (H_NN * size**-0.5).to(DTYPE)


def _dense_product(H_NN: Tensor) -> Callable[[int], Work | None]:
    return lambda size: lambda x: x @ H_NN


def _dao(module: Any) -> Callable[[int], Work | None]:
    def work(size: int) -> Work | None:
        scale = size**-0.5
        if size & (size - 1) == 0:
            return lambda x: module.fast_hadamard_transform(x, scale)
        for factor in (12, 20, 28, 40):
            rest, left = divmod(size, factor)
            if left == 0 and rest & (rest - 1) == 0 and rest >= 4:
                function = getattr(module, f"fast_hadamard_transform_{factor}N")
                return lambda x: function(x, scale)
        return None

    return work


def _hadacore(module: Any) -> Callable[[int], Work | None]:
    return lambda size: (lambda x: module.hadamard_transform(x, False)) if size & (size - 1) == 0 else None


# ── tables ─────────────────────────────────────────────────────────────────────────────────────────────────


def tables(results: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    parts = [f"{results['device']}, torch {results['torch']}."]
    many = [cell for cell in results["cells"] if cell["tokens"] >= 1024]
    few = [cell for cell in results["cells"] if cell["tokens"] < 1024]
    head = "| size | tokens | " + " | ".join(FORMATS) + " | copy of bf16, µs | bf16 matmul | Dao-AILab | HadaCore |"
    line = "|" + "---|" * (len(FORMATS) + 6)

    def others(cell: dict[str, Any]) -> str:
        return " | ".join(f"{cell[k]:.1f}" if k in cell else "–" for k in ("matmul_us", "dao_us", "hadacore_us"))

    if many:
        parts += [
            "Microseconds, and the share of the speed at which a device copy moves the same bytes:",
            "",
            head,
            line,
        ]
        for cell in many:
            shown = [
                f"{one['us']:.1f} ({one['copy_us'] / one['us']:.0%})" if one else "–"
                for one in map(cell["formats"].get, FORMATS)
            ]
            copy = cell["formats"].get("map only", {}).get("copy_us", float("nan"))
            parts.append(f"| {cell['size']} | {cell['tokens']} | {' | '.join(shown)} | {copy:.1f} | {others(cell)} |")
    if few:
        head = head.replace("copy of bf16, µs", "elementwise, µs")
        parts += ["", "Microseconds, and how much longer than an elementwise kernel:", "", head, line]
        for cell in few:
            base = cell["elementwise_us"]
            shown = [
                f"{one['us']:.1f} (+{one['us'] - base:.1f})" if one else "–"
                for one in map(cell["formats"].get, FORMATS)
            ]
            parts.append(f"| {cell['size']} | {cell['tokens']} | {' | '.join(shown)} | {base:.1f} | {others(cell)} |")
    if results["heads"]:
        parts += ["", "| queries or keys | tokens | µs | share of a copy | elementwise, µs |", "|---|---|---|---|---|"]
        for row in results["heads"]:
            if "us" in row:
                what = f"{row['heads']} heads of {row['head']}, {row['format']}"
                share = row["copy_us"] / row["us"]
                parts.append(
                    f"| {what} | {row['tokens']} | {row['us']:.1f} | {share:.0%} | {row['elementwise_us']:.1f} |"
                )
    if results["low_rank"]:
        kinds = " | ".join(f"{kind}, µs" for kind in SUMS)
        parts += ["", f"| residual sum, size | rank | tokens | {kinds} | torch, µs | sum alone, µs |"]
        parts += ["|" + "---|" * (len(SUMS) + 5)]
        for row in results["low_rank"]:
            shown = [f"{row[k]['us']:.1f} ({row['copy_us'] / row[k]['us']:.0%})" if row[k] else "–" for k in SUMS]
            parts.append(
                f"| {row['size']} | {row['rank']} | {row['tokens']} | {' | '.join(shown)} "
                f"| {row['torch_us']:.1f} | {row['elementwise_us']:.1f} |"
            )
    return "\n".join(parts)


def put_in_page(page: Path, text: str) -> None:
    """Replace what stands between the page's marks."""
    before, rest = page.read_text().split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
