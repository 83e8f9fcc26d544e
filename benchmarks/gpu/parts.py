"""The parts of a run: which cases each has, and how they are run, each in a process that can be killed."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.environments import ROOT
from benchmarks.gpu import smoke
from benchmarks.gpu.shapes import ARCHITECTURES, SHAPES
from benchmarks.measure import Run, run

DEFAULT, COMPILED, LIGER, NONE = "default", "compiled", "liger", "none"
TRL, TRL_LIGER = "TRL, packed, FlashAttention 2", "TRL, packed, FlashAttention 2, Liger"
CORRECTNESS, KERNELS_KEY, RESUME, SMOKE, LONG = "correctness", "kernels", "resume", "smoke", "long"

_STAND_INS = ROOT / "benchmarks" / "gpu" / "stand_ins"
_CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # matmuls are deterministic with it


@dataclass(frozen=True)
class Part:
    """Cases that are run together, within a time.

    Args:
        name: On the command line and in the results.
        cases: In the order in which they start.
        at_once: How many run at the same time: one, where they are measured.
    """

    name: str
    cases: Sequence[Case]
    at_once: int = 1


def parts(device: str, quick: bool) -> dict[str, Part]:
    """All parts, by name, in the order in which they are run.

    Args:
        device: ``cuda`` or ``cpu``, which has no float16, no FlashAttention and no Liger.
        quick: Two steps of each, instead of ten.
    """
    on_gpu = device == "cuda"
    precisions = ["32-true", "bf16-mixed", *(["16-mixed"] if on_gpu else []), "bf16-true"]
    found = [
        Part(CORRECTNESS, [_correctness(name, precisions) for name in ARCHITECTURES], 4 if on_gpu else 1),
        Part(
            KERNELS_KEY,
            [
                _correctness(name, ["32-true", "bf16-mixed"], kernels, KERNELS_KEY)
                for kernels in (NONE, COMPILED, *([LIGER] if on_gpu else []))
                for name in ("llama", "qwen2", "qwen3")
            ],
            3 if on_gpu else 1,
        ),
        _resume(on_gpu),
        Part(SMOKE, [_smoke(name) for name in smoke.names()], 9 if on_gpu else 1),
    ]
    size = {"warmup": 1, "steps": 2, "profiled": 1} if quick else {"warmup": 4, "steps": 10, "profiled": 2}
    for slug in SHAPES:
        kernels = (DEFAULT, COMPILED, *([LIGER] if on_gpu else []), NONE)
        found.append(Part(slug, [_ours(slug, k, "short", slug, size) for k in kernels]))
        found.append(Part(f"trl-{slug}", _trl(slug, "short", f"trl-{slug}", size, on_gpu)))
    for slug in ("qwen2.5-0.5b", "llama-3.2-1b"):
        name = f"{LONG}-{slug}"
        found.append(
            Part(name, [_ours(slug, DEFAULT, "long", name, size), *_trl(slug, "long", name, size, on_gpu)[:1]])
        )
    return {part.name: part for part in found}


def _correctness(name: str, precisions: Sequence[str], kernels: str | None = None, part: str = CORRECTNESS) -> Case:
    settings = {"task": "correctness", "architecture": name, "precisions": precisions, "kernels": kernels}
    return Case(name if kernels is None else f"{name}, {kernels}", "gpu", part, settings)


def _resume(on_gpu: bool) -> Part:
    from benchmarks.gpu.resume import VARIANTS

    names = [name for name, variant in VARIANTS.items() if on_gpu or variant["precision"] != "16-mixed"]
    cases = [Case(name, "gpu", RESUME, {"task": "resume", "variant": name}, _CUBLAS) for name in names]
    return Part(RESUME, cases, 5 if on_gpu else 1)


def _smoke(name: str) -> Case:
    path = _flash_attention_2() if "flash_attention_2" in name else {}
    return Case(name, "gpu", SMOKE, {"task": "smoke", "name": name}, {**_CUBLAS, "COLUMNS": "150", **path})


def _ours(shape: str, kernels: str, documents: str, part: str, size: Mapping[str, int]) -> Case:
    chosen = None if kernels == DEFAULT else kernels
    settings = {"task": "ours", "shape": shape, "documents": documents, "kernels": chosen}
    return Case(kernels, "gpu", part, settings | size)


def _trl(shape: str, documents: str, part: str, size: Mapping[str, int], on_gpu: bool) -> list[Case]:
    settings = {"task": "trl", "shape": shape, "documents": documents, **size}
    if not on_gpu:
        return [Case("TRL, packed, sdpa", "gpu", part, {**settings, "attention": "sdpa", "liger": False})]
    path = _flash_attention_2()
    flash = {**settings, "attention": "flash_attention_2"}
    return [
        Case(TRL_LIGER, "gpu", part, {**flash, "liger": True}, path),
        Case(TRL, "gpu", part, {**flash, "liger": False}, path),
    ]


def _flash_attention_2() -> dict[str, str]:
    """Variables with which a case finds the package flash-attn: installed, or what stands in for it."""
    return {} if importlib.util.find_spec("flash_attn") else {"PYTHONPATH": _path(_STAND_INS)}


def _path(*others: Path) -> str:
    """``PYTHONPATH`` for a case: the project, what it was given, and others."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")]), *map(str, others)])


def run_part(
    part: Part,
    common: Mapping[str, Any],
    folder: Path,
    *,
    seconds: float,
    threads: int,
    done: Callable[[dict[str, Any]], None],
) -> None:
    """Run the cases of a part; one that fails, or has no time left, is a result too.

    Args:
        part: The part.
        common: Settings that all cases get.
        folder: For what the cases write.
        seconds: For the whole part: what still runs is killed.
        threads: Of each case's process.
        done: Takes the result of each case as plain values.
    """
    until = time.time() + seconds

    def one(case: Case) -> dict[str, Any]:
        left = until - time.time()
        where = folder / case.slug
        variables = {
            "PYTHONPATH": _path(),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **case.environment,
        }
        found = Run(time.time(), 0.0, 0, error="It was not started: the part had no time left.")
        if left > 0:
            settings = {**common, **case.settings}
            python = Path(sys.executable)
            found = run(python, "gpu", settings, where, threads=threads, environment=variables, timeout=left)
            if found.error and time.time() >= until:
                found.error = f"It was killed after {found.seconds:.0f} s: the part's time was up.\n{found.error}"
        return {"part": part.name, "case": case.name, "settings": dict(case.settings), **dataclasses.asdict(found)}

    with ThreadPoolExecutor(part.at_once) as pool:
        for future in as_completed([pool.submit(one, case) for case in part.cases]):
            done(future.result())
