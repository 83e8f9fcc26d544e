"""Measures the optimizer steps of any trainer: time and memory without waiting for the device, and then a profile."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import kinds
from benchmarks.limits import Work

_PEAKS = {  # dense bfloat16 FLOP/s of cards by a part of their name, from NVIDIA's data sheets; the first that matches
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "A10G": 70e12,
}


def peak_flops(name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a card; ``None`` where it is not known.

    >>> peak_flops("NVIDIA H100 80GB HBM3") / 1e12
    989.0
    """
    return next((peak for card, peak in _PEAKS.items() if card in name), None)


class Meter:
    """Counts and times optimizer steps: a warm-up, the measured steps, and a few under the profiler.

    The device is waited for where the measured steps begin and end, not between them.

    Args:
        device: ``cuda`` or ``cpu``.
        warmup: Steps before the measured ones; at least 1.
        steps: Steps that are measured.
        profiled: Steps under the profiler afterwards; 0 for none.
    """

    def __init__(self, device: str, warmup: int, steps: int, profiled: int) -> None:
        self.device, self.warmup, self.steps, self.profiled = device, warmup, steps, profiled
        self.done = 0
        self.marks: list[Any] = []  # the end of each step from the last of the warm-up on
        self.counts: list[tuple[int, int | Tensor, int]] = []  # tokens, targets and pairs of each measured step
        self.seconds = 0.0
        self.began = time.perf_counter()
        self.first_step_seconds = 0.0
        self._profiler: Any = None
        self._memory: dict[str, float] = {}
        self._kinds: dict[str, Any] = {}

    @property
    def total_steps(self) -> int:
        """Steps that the trainer has to take."""
        return self.warmup + self.steps + self.profiled

    @property
    def is_done(self) -> bool:
        """Whether all steps have been taken."""
        return self.done >= self.total_steps

    def begin(self) -> None:
        """Training begins: memory is watched from here, the optimizer's state and compiling included."""
        self.began = time.perf_counter()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def step(self, tokens: int, targets: int | Tensor, pairs: int) -> None:
        """An optimizer step has ended.

        Args:
            tokens: Its tokens, without padding.
            targets: Tokens that the loss is on; a tensor is not read before the end.
            pairs: Pairs of a token and itself or an earlier token of its document.
        """
        self.done += 1
        if self.done == 1:
            self._wait()
            self.first_step_seconds = time.perf_counter() - self.began
        if self.done < self.warmup:
            return
        if self.done == self.warmup:
            self._wait()
            self.began = time.perf_counter()
        elif self.done <= self.warmup + self.steps:
            self.counts.append((tokens, targets, pairs))
        if self.done <= self.warmup + self.steps:
            self._mark()
        if self.done == self.warmup + self.steps:
            self._end()
        elif self.is_done:
            self._end_profile()

    def result(self, work: Work, peak: float | None) -> dict[str, Any]:
        """The figures.

        Args:
            work: Floating-point operations that the steps need.
            peak: FLOP/s that the device could do at most, if known.
        """
        tokens, targets, pairs = (sum(int(c[i]) for c in self.counts) for i in range(3))
        flops = work.of_step(tokens, targets, pairs / tokens)
        found = {
            "steps": len(self.counts),
            "tokens_per_second": tokens / self.seconds,
            "targets_per_second": targets / self.seconds,
            "tokens_per_step": tokens / len(self.counts),
            "targets_per_step": targets / len(self.counts),
            "tflops": flops / self.seconds / 1e12,
            "mfu": None if peak is None else flops / self.seconds / peak,
            "step_ms": self._step_milliseconds(),
            "first_step_seconds": self.first_step_seconds,
        }
        return found | self._memory | ({"profile": self._kinds} if self._kinds else {})

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _mark(self) -> None:
        if self.device == "cuda":
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
            self.marks.append(mark)
        else:
            self.marks.append(time.perf_counter())

    def _step_milliseconds(self) -> list[float]:
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if self.device == "cuda":
            return [a.elapsed_time(b) for a, b in pairs]
        return [1000 * (b - a) for a, b in pairs]

    def _end(self) -> None:
        self._wait()
        self.seconds = time.perf_counter() - self.began
        if self.device == "cuda":
            peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            self._memory = {"allocated_gib": peaks[0] / 2**30, "reserved_gib": peaks[1] / 2**30}
        if self.profiled:
            activity = ProfilerActivity.CUDA if self.device == "cuda" else ProfilerActivity.CPU
            self._profiler = profile(activities=[activity])
            self._profiler.__enter__()

    def _end_profile(self) -> None:
        self._wait()
        self._profiler.__exit__(None, None, None)
        self._kinds = by_kind(self._profiler.events(), self.device, self.profiled)


def by_kind(events: Any, device: str, steps: int) -> dict[str, Any]:
    """What the profiler saw: milliseconds and kernels of a step by kind, and the kernels that took most.

    Args:
        events: Those of ``torch.profiler.profile.events()``.
        device: ``cuda`` for the kernels of a GPU, ``cpu`` for operators of torch.
        steps: How many steps were profiled.
    """
    wanted = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    times: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in events:
        if event.device_type == wanted and not event.is_user_annotation and not event.name.startswith("cuda"):
            time_us = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
            times[event.name] += time_us / 1000 / steps
            calls[event.name] += 1
    kind = {n: kinds.of_kernel(n) if device == "cuda" else _of_operator(n) for n in times}
    found = {k: {"ms": sum(times[n] for n in times if kind[n] == k)} for k in kinds.KINDS}
    for k, values in found.items():
        values["kernels"] = sum(calls[n] for n in times if kind[n] == k) / steps
    top = sorted(times, key=lambda name: -times[name])[:20]
    return {"kinds": found, "top": [{"name": n[:120], "ms": times[n], "kind": kind[n]} for n in top]}


def _of_operator(name: str) -> str:
    namespace, _, operator = name.partition("::")
    if namespace != "aten":
        return kinds.OTHER
    found = kinds.of_operator(operator)
    return kinds.OTHER if found == kinds.VIEW else found
