"""Conversion of a Hugging Face folder to GGUF with llama.cpp's converter, which is not a package: its path is given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Literal

from lightning_sft.types import InputError

GGUFType = Literal["f32", "f16", "bf16", "q8_0"]


def write_gguf(folder: Path, converter: str | Path, out_type: GGUFType) -> Path:
    """Write ``model-TYPE.gguf`` into the folder of a model.

    Args:
        folder: Folder of the model and its tokenizer.
        converter: Path of ``convert_hf_to_gguf.py`` in a checkout of llama.cpp.
        out_type: Storage type of the weights.

    Returns:
        Path of the GGUF file.

    Raises:
        InputError: When the converter does not exist, or fails.
    """
    check_converter(converter)
    out = folder / f"model-{out_type}.gguf"
    command = [sys.executable, str(converter), str(folder), "--outfile", str(out), "--outtype", out_type]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not out.is_file():
        said = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise InputError(f"{converter} could not convert the model:\n{said}")
    return out


def check_converter(converter: str | Path) -> None:
    """Refuse a converter that is not there.

    Raises:
        InputError: When there is no such file.
    """
    if not Path(converter).is_file():
        raise InputError(
            f"There is no converter {str(converter)!r}. Expected convert_hf_to_gguf.py in a checkout of llama.cpp "
            "(git clone https://github.com/ggml-org/llama.cpp)."
        )
