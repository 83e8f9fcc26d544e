"""A virtual environment for each system, made when it is not there: `python -m benchmarks.environments`.

Only the standard library is imported here: it runs before anything is installed. An environment is made anew when its
requirements change.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "bench"
_CONSTRAINTS = ["--constraint", str(ROOT / ".ci" / "constraints.txt")]  # the same torch and transformers as ours
REQUIREMENTS: dict[str, list[list[str]]] = {  # torch first: on some machines the index has several
    "ours": [[*_CONSTRAINTS, "torch"], [*_CONSTRAINTS, "--editable", f"{ROOT}[bench,gguf,tensorboard]"]],
    "trl": [[*_CONSTRAINTS, "torch"], [*_CONSTRAINTS, "trl==1.16.0"]],
    # it wants an older jsonargparse and huggingface-hub than ours: only what it shares with us is pinned; it writes its
    # settings with requests, which it does not ask for
    "litgpt": [["torch==2.13.0"], ["litgpt==0.5.13", "lightning==2.6.6", "requests"]],
    # its data path alone: what that imports, without the packages of its pages and of images and sound
    "llamafactory": [
        ["torch==2.13.0"],
        ["transformers<=5.6.0", "datasets<=4.0.0", "peft<=0.18.1", "trl<=0.24.0", "accelerate<=1.11.0"],
        [
            "omegaconf",
            "sentencepiece",
            "tiktoken",
            "pillow",
            "av",
            "einops",
            "pandas",
            "scipy",
            "protobuf",
            "hf-transfer",
        ],
        ["--no-deps", "llamafactory==0.9.5"],
    ],
}


def python(name: str) -> Path:
    """The interpreter of a system's environment."""
    return BUILD / name / "bin" / "python"


def make(name: str) -> None:
    """Make the environment of a system, unless it is there."""
    stamp, wanted = BUILD / name / "requirements", repr(REQUIREMENTS[name])
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return
    print(f"Making {BUILD / name}, which takes minutes.", flush=True)
    venv.create(BUILD / name, clear=True, with_pip=True)
    for requirements in REQUIREMENTS[name]:
        pip = [str(python(name)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *requirements], check=True)
    stamp.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    for system in sys.argv[1:] or REQUIREMENTS:
        make(system)
