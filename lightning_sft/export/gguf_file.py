"""A Hugging Face folder to a GGUF file, by the converter of llama.cpp, which is no package and has to be at hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Literal

from lightning_sft.types import InputError

GGUFType = Literal["f32", "f16", "bf16", "q8_0"]


def write_gguf(folder: Path, converter: str | Path, out_type: GGUFType) -> Path:
    """Write ``model-TYPE.gguf`` into a folder of a model.

    Args:
        folder: Of the model and its tokenizer.
        converter: ``convert_hf_to_gguf.py`` in a checkout of llama.cpp.
        out_type: How weights are stored.

    Raises:
        InputError: When there is no converter, or it fails.
    """
    if not Path(converter).is_file():
        raise InputError(
            f"There is no converter {str(converter)!r}. Expected convert_hf_to_gguf.py in a checkout of llama.cpp "
            "(git clone https://github.com/ggml-org/llama.cpp)."
        )
    out = folder / f"model-{out_type}.gguf"
    command = [sys.executable, str(converter), str(folder), "--outfile", str(out), "--outtype", out_type]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not out.is_file():
        said = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise InputError(f"{converter} could not convert the model. It said:\n{said}")
    return out
