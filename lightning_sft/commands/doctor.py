"""``lightning-sft doctor``: versions, hardware, fast paths and why some are off, limits, and caches."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lightning_sft import __version__
from lightning_sft.io.errors import VerbParser
from lightning_sft.machine.compiler import compiler_missing
from lightning_sft.machine.terminal import Console
from lightning_sft.model.attention import gpu

State = Literal["good", "off", "bad", "plain"]
_MARKS = {"good": ("✓", "green"), "off": ("-", "dim"), "bad": ("!", "bold red"), "plain": ("", "")}
_NEEDED = (
    "torch",
    "lightning",
    "transformers",
    "tokenizers",
    "datasets",
    "safetensors",
    "gguf",
    "jsonargparse",
    "torchmetrics",
)
_OPTIONAL = {  # purpose, and the extra that installs it
    "peft": ("model.lora", "lightning-sft[peft]"),
    "bitsandbytes": ("model.quantize=4bit", "lightning-sft[quant]"),
    "torchao": ("model.quantize=8bit", "lightning-sft[quant]"),
    "deepspeed": ("trainer.strategy=deepspeed_stage_*", "lightning-sft[deepspeed]"),
    "tensorboard": ("curves in TensorBoard; CSV without it", "lightning-sft[tensorboard]"),
}
_MALICIOUS = ("2.6.2", "2.6.3")  # wheels of lightning, GHSA-w37p-236h-pfx3


@dataclass(frozen=True)
class Item:
    """One item of the report.

    Args:
        section: Section of the report.
        name: Name of the item.
        value: Value as shown.
        state: Assessment: ``good``, ``off``, ``bad``, or ``plain`` for items without one.
        remark: Reason for the state, and what to do.
    """

    section: str
    name: str
    value: str
    state: State = "plain"
    remark: str = ""


def run_doctor(args: Sequence[str] | None = None) -> list[Item]:
    """Print all items as a table, or as JSON with ``--json``.

    Args:
        args: Command-line arguments; by default those of the process.
    """
    parser = VerbParser(prog="lightning-sft doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    as_json = parser.parse_args(args).json
    found = facts()
    if as_json:
        print(json.dumps([asdict(fact) for fact in found], indent=2, ensure_ascii=False))
    else:
        show(found, Console())
    return found


def facts() -> list[Item]:
    """All items; this takes some seconds, since matmuls are timed and cache files counted."""
    return [*_versions(), *_machine(), *_devices(), *_fast_paths(), *_limits(), *_caches()]


def show(found: Sequence[Item], console: Console) -> None:
    """Print the items as a table."""
    table = Table("", "", "", box=SIMPLE_HEAD, show_header=False, pad_edge=False)
    section = ""
    for fact in found:
        if fact.section != section:
            section = fact.section
            table.add_row("", section, "", style="bold")
        value = Text.assemble(fact.value, (f"\n{fact.remark}" if fact.remark else "", "dim"))
        table.add_row(Text.assemble(_MARKS[fact.state]), fact.name, value)
    console.print(table)
    bad = sum(fact.state == "bad" for fact in found)
    console.print(f"{bad} problems, marked with !" if bad else "No problems found.", highlight=False)


def matmul_rate(dtype: torch.dtype, device: str = "cpu", size: int = 512) -> float:
    """FLOP/s of a ``size × size`` matmul: the best of those that run within a tenth of a second."""
    a, best, end = torch.ones(size, size, dtype=dtype, device=device), 0.0, time.perf_counter() + 0.1
    while not best or time.perf_counter() < end:
        begin = time.perf_counter()
        a @ a
        if device != "cpu":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best


def _versions() -> Iterator[Item]:
    yield Item("versions", "lightning-sft", __version__)
    yield Item("versions", "python", platform.python_version())
    for name in _NEEDED:
        version = _version(name)
        if version is None:
            yield Item("versions", name, "not installed", "bad", f"pip install {name}")
        elif name == "lightning" and version in _MALICIOUS:
            yield Item("versions", name, version, "bad", "A malicious wheel (GHSA-w37p-236h-pfx3): remove it.")
        else:
            yield Item("versions", name, version)
    for name, (purpose, extra) in _OPTIONAL.items():
        version = _version(name)
        how = f"for {purpose}: pip install '{extra}'"
        yield Item("optional", name, version or "not installed", "good" if version else "off", "" if version else how)


def _machine() -> Iterator[Item]:
    section, threads = "machine", torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Item(section, "system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    info = _read("/proc/cpuinfo")
    model = next((line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")), "?")
    yield Item(section, "processor", model)
    remark = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}" if "OMP_NUM_THREADS" in os.environ else ""
    is_few = threads < cores and not remark
    yield Item(section, "cores", f"{cores}, torch uses {threads}", "bad" if is_few else "plain", remark)
    yield Item(section, "instructions", _instructions(info))
    total, available = (_meminfo(key) for key in ("MemTotal", "MemAvailable"))
    yield Item(section, "memory", f"{_size(total)}, {_size(available)} available")
    in_float32, in_bfloat16 = matmul_rate(torch.float32), matmul_rate(torch.bfloat16)
    yield Item(section, "float32 matmuls", _rate(in_float32))
    is_slow = in_bfloat16 < 0.5 * in_float32
    remark = "Slow on this processor: use trainer.precision=32-true." if is_slow else ""
    yield Item(section, "bfloat16 matmuls", _rate(in_bfloat16), "off" if is_slow else "good", remark)


def _devices() -> Iterator[Item]:
    for number in range(torch.cuda.device_count()):
        own = torch.cuda.get_device_properties(number)
        in_bf16 = own.major >= 8
        what = f"{own.name}, {_size(own.total_memory)}, compute capability {own.major}.{own.minor}"
        remark = "" if in_bf16 else "It has no bfloat16: use trainer.precision=16-mixed."
        yield Item("devices", f"cuda:{number}", what, "good" if in_bf16 else "off", remark)
        if in_bf16:
            yield Item("devices", "  bfloat16 matmuls", _rate(matmul_rate(torch.bfloat16, f"cuda:{number}", 4096)))
    if torch.backends.mps.is_available():
        yield Item("devices", "mps", "Apple GPU", "good")
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield Item("devices", "GPU", "none", "off", f"{built}. Training runs on the processor.")


def _fast_paths() -> Iterator[Item]:
    section, on_gpu = "fast paths", torch.cuda.is_available()
    yield Item(section, "attention", "per document", "good", "Packed without padding; fit reports the path of a model.")
    is_taken = False
    for name, (reason, kernel) in gpu.kernels(torch.device("cuda", 0) if on_gpu else torch.device("cpu")).items():
        state: State = "off" if kernel is None or is_taken else "good"
        why = f": {reason}" if kernel is None else ": a preferred one is used" if is_taken else ""
        is_taken = is_taken or kernel is not None
        remark = f"All documents in one call, in half precision{why}."
        yield Item(section, f"  {name}", "on" if state == "good" else "off", state, remark)
    why = "Soft-caps and sinks on a GPU" + ("" if on_gpu else ": it needs a GPU visible to torch")
    yield Item(section, "  FlexAttention", "on" if on_gpu else "off", "good" if on_gpu else "off", f"{why}.")
    yield Item(section, "chunked likelihood", "on", "good", "The full logits never exist: model.chunk_size")
    fuses, why = on_gpu and bool(_version("triton")), "pip install triton" if on_gpu else "it needs a GPU"
    remark = "Softmax, metrics and gradient of a chunk in one kernel" + ("." if fuses else f": {why}")
    yield Item(section, "  fused softmax", "on" if fuses else "off", "good" if fuses else "off", remark)
    yield Item(section, "fused AdamW", "on", "good", "The default of model.optimizer.")
    yield _compiler(on_gpu)
    rust = os.environ.get("TOKENIZERS_PARALLELISM", "").lower()
    is_off = rust in ("false", "0", "off", "no", "n", "f")
    why = "TOKENIZERS_PARALLELISM is off: encoding uses one core per process." if is_off else ""
    yield Item(section, "tokenizers in parallel", "off" if is_off else "on", "off" if is_off else "good", why)
    given = [
        f"{key}={os.environ[key]}"
        for key in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "LD_PRELOAD")
        if os.environ.get(key)
    ]
    yield Item(section, "allocator", ", ".join(given) or "torch's default")


def _compiler(on_gpu: bool) -> Item:
    if missing := compiler_missing(on_gpu):
        return Item("fast paths", "torch.compile", "off", "off", f"For model.kernels=compiled {missing}.")
    path = shutil.which(os.environ.get("CXX") or "g++")
    remark = "For long runs, see model.kernels." if on_gpu else "Off unless model.kernels=compiled."
    return Item("fast paths", "torch.compile", path or "", "good", remark)


def _limits() -> Iterator[Item]:
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        is_small = free < 1 << 30
        remark = "Worker processes and NCCL need some: in Docker, --shm-size=8g." if is_small else ""
        yield Item("limits", "shared memory", f"{_size(free)} free", "bad" if is_small else "good", remark)
    with suppress(ImportError):  # on Windows
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        is_few, remark = soft < 1024, f"ulimit -n {hard}"
        yield Item("limits", "open files", f"{soft:,}", "bad" if is_few else "good", remark if is_few else "")
    free = shutil.disk_usage(".").free
    yield Item("limits", "disk here", f"{_size(free)} free")


def _caches() -> Iterator[Item]:
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    hub = Path(os.environ.get("HF_HOME", home / "huggingface")).expanduser()
    places = {
        "encoded data": (Path("~/.cache/lightning-sft/data").expanduser(), "data.cache"),
        "demo model": (home / "lightning-sft" / "SmolLM2-135M-Instruct", "lightning-sft fetch-demo-model"),
        "Hugging Face": (hub, "HF_HOME"),
    }
    for name, (path, remark) in places.items():
        size = _size(_bytes_below(path)) if path.exists() else "empty"
        yield Item("caches", name, f"{size}, {path}", "plain", remark)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _instructions(info: str) -> str:
    flags = set(next((line.split(":", 1)[1].split() for line in info.splitlines() if line.startswith("flags")), []))
    known = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return ", ".join([f"torch uses {torch.backends.cpu.get_cpu_capability()}", *known])


def _meminfo(key: str) -> int:
    """Bytes of an entry of ``/proc/meminfo``, or 0 if it does not exist."""
    line = next((line for line in _read("/proc/meminfo").splitlines() if line.startswith(f"{key}:")), "")
    return int(line.split()[1]) * 1024 if line else 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _bytes_below(path: Path) -> int:
    """Bytes of the files below a folder; links, as in the hub's cache, are not counted twice."""
    return sum((Path(root) / name).lstat().st_size for root, _, names in os.walk(path) for name in names)


def _size(number: float) -> str:
    """Bytes in readable units.

    >>> _size(93_000_000), _size(24 * 2**30)
    ('93 MB', '25.8 GB')
    """
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def _rate(number: float) -> str:
    return f"{number / 1e12:.1f} TFLOP/s" if number >= 1e12 else f"{number / 1e9:.0f} GFLOP/s"
