"""Makes a folder to carry to a machine that has a GPU and its own torch, but no network.

    python -m benchmarks.gpu stage FOLDER [--python 3.12] [--data rows.jsonl]
    bash FOLDER/run.sh                      there; it takes the arguments of `python -m benchmarks.gpu`

It has the files of this checkout, the wheels that such a machine lacks, and the demo model's tokenizer where it has
been fetched (`lightning-sft fetch-demo-model`).
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from benchmarks.environments import ROOT
from benchmarks.gpu.facts import COMMIT, commit
from benchmarks.gpu.rows import write_tokenizer

_PINNED = {  # to the versions of our constraints
    *("accelerate", "datasets", "jsonargparse", "lightning", "peft", "tokenizers", "torchao", "torchmetrics"),
    *("transformers", "trl"),
}
_OTHERS = {
    *("dill", "docstring-parser", "huggingface-hub", "importlib-resources", "lightning-utilities", "multiprocess"),
    *("psutil", "safetensors", "typeshed-client", "xxhash", "liger-kernel==0.8.5"),
}
_BITSANDBYTES = "bitsandbytes"  # of its wheel, which has the kernels for every CUDA, only those for one are taken
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
_RUN = """#!/usr/bin/env bash
# Checks and measures lightning_sft on this machine's GPU, without a network: bash run.sh [arguments of benchmarks.gpu]
# Results: $OUT, by default out beside this file.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
site=${SITE:-/tmp/lightning-sft-site}
shopt -s nullglob
wheels=("$here"/wheels/*.whl)
if [ ${#wheels[@]} -gt 0 ] && [ ! -f "$site/.complete" ]; then
  rm -rf "$site"
  python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "${wheels[@]}"
  touch "$site/.complete"
fi
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
cd "$here/project"
exec python3 -m benchmarks.gpu --tokenizer "$here/tokenizer" DATA--out "${OUT:-$here/out}" "$@"
"""


def constraints() -> dict[str, str]:
    """Version of each package that our constraints pin."""
    lines = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if re.match(r"[\w-]+==", line))


def copy_project(folder: Path) -> None:
    """The files of the checkout that git knows, and their commit."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if name.split("/")[0] in ("lightning_sft", "benchmarks", "configs", ".ci", "pyproject.toml", "README.md"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / COMMIT).write_text(commit() + "\n", encoding="utf-8")


def download(folder: Path, python: str, cuda: str) -> None:
    """The wheels, for Linux on x86-64.

    Args:
        folder: Where to put them; those that are there are not downloaded again.
        python: Version of the other machine's Python.
        cuda: Version of its CUDA, as 130; bitsandbytes has a library for each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pins = constraints()
    wanted = sorted({f"{name}=={pins[name]}" for name in _PINNED} | _OTHERS)
    _pip_download(folder, python, *wanted)
    if not list(folder.glob("bitsandbytes-*")):
        with tempfile.TemporaryDirectory() as scratch:
            _pip_download(Path(scratch), python, f"{_BITSANDBYTES}=={pins[_BITSANDBYTES]}")
            [wheel] = Path(scratch).glob("*.whl")
            thin(wheel, folder / wheel.name, cuda)


def _pip_download(folder: Path, python: str, *wanted: str) -> None:
    for_machine = [f"--platform={name}" for name in _PLATFORMS]
    for_machine += [f"--python-version={python}", "--implementation=cp", "--only-binary=:all:"]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, *for_machine, "--dest", str(folder), *wanted], check=True)


def thin(wheel: Path, target: Path, cuda: str) -> None:
    """Copy a wheel without the libraries for other versions of CUDA, and for other makers' cards."""
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as copy:
        for name in source.namelist():
            library = re.search(r"libbitsandbytes_(\w+)\.so$", name)
            if library is None or library[1] in (f"cuda{cuda}", "cpu"):
                copy.writestr(source.getinfo(name), source.read(name))


def main(arguments: list[str]) -> int:
    """Make the folder, and return 0."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("benchmarks.gpu stage", description=__doc__, formatter_class=form)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version of the other machine's Python")
    parser.add_argument("--cuda", default="130", help="version of its CUDA")
    parser.add_argument("--data", type=Path, help="JSONL to carry along")
    parser.add_argument("--prompt", default="prompt", help="the data's column for the prompt")
    parser.add_argument("--completion", default="completion", help="the data's column for the answer")
    parser.add_argument("--no-wheels", action="store_true", help="without wheels: the other machine has all packages")
    given = parser.parse_args(arguments)
    folder = given.folder.resolve()
    for name in ("project", "tokenizer"):
        shutil.rmtree(folder / name, ignore_errors=True)
    copy_project(folder / "project")
    tokenizer = Path(write_tokenizer(folder / "tokenizer", None))
    if tokenizer != folder / "tokenizer":
        files = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
        (folder / "tokenizer").mkdir()
        for name in filter(lambda name: (tokenizer / name).exists(), files):
            shutil.copy(tokenizer / name, folder / "tokenizer" / name)
    data = ""
    if given.data:
        shutil.copy(given.data, folder / "rows.jsonl")
        data = f'--data "$here/rows.jsonl" --prompt {given.prompt} --completion {given.completion} '
    (folder / "run.sh").write_text(_RUN.replace("DATA", data), encoding="utf-8")
    (folder / "wheels").mkdir(exist_ok=True)
    if not given.no_wheels:
        download(folder / "wheels", given.python, given.cuda)
    print(f"{folder} is complete. On the other machine: bash {folder.name}/run.sh")
    return 0
