"""The pictures of these pages, made anew from real runs: ``python docs/screenshots.py --model SmolLM2``.

Commands run in a terminal of their own; what is left on its screen becomes an SVG. Pages are opened in chromium, in
light and dark, through its driver (Debian: ``apt-get install chromium chromium-driver``).
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from lightning_sft.demos.data import write_demo_data  # noqa: E402 - this repository's, by the path above
from lightning_sft.demos.pretrained import fetch_demo_model  # noqa: E402 - this repository's, by the path above
from tests.helpers.browsing import Browser, started  # noqa: E402 - this repository's, by the path above

WIDTH = 104  # columns of the terminal
FORMAT = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)  # fonts would come from the web
CONTROL = re.compile(r"(\r\n|\n|\r|\x1b\[[?\d;]*[A-Za-ln-z])")  # all but colors
CONFIG = {
    "trainer": {
        "max_epochs": 2,
        "precision": "32-true",
        "accelerator": "cpu",
        "gradient_clip_val": 1.0,
        "num_sanity_val_steps": -1,
        "log_every_n_steps": 1,
        "default_root_dir": "runs",
        "callbacks": [
            {"class_path": "lightning_sft.callbacks.DriftMonitor", "init_args": {"sequences": 4}},
            {
                "class_path": "lightning_sft.callbacks.SampleGenerations",
                "init_args": {"prompts": 1, "max_new_tokens": 40},
            },
        ],
    },
    "model": {
        "pretrained": "SmolLM2",
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 5.0e-4, "weight_decay": 0.01}},
        "max_new_tokens": 32,
    },
    "data": {"train": "train.jsonl", "val": "test.jsonl", "tokens_per_batch": 256},
}
COMMANDS = {  # and which lines of the screen are shown
    "doctor": (["doctor"], slice(66)),
    "show": (["show", "--config", "fit.yaml", "--rows", "2"], slice(60)),
    "plan": (["plan", "--config", "fit.yaml", "--memory", "2"], slice(60)),
    "verify": (["verify", "--config", "fit.yaml", "--samples", "4", "--tokens", "192"], slice(60)),
    "fit": (["fit", "--config", "fit.yaml"], slice(-60, None)),
}
HEIGHTS = {"show": 900, "report": 1300}


def pictures(model: str, out: Path, rows: int, only: list[str]) -> None:
    """Run it on so many rows, and write the pictures; those of the report need ``fit``."""
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_demo_data(folder, rows, max(4, rows // 10))
        (folder / "SmolLM2").symlink_to(Path(model).resolve())
        (folder / "fit.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
        for picture in [name for name in COMMANDS if name in only]:
            arguments, lines = COMMANDS[picture]
            left = screen(typed(arguments, folder)).strip("\n").splitlines()
            drawn(left[lines], " ".join(["lightning-sft", *arguments]), out / f"{picture}.svg")
        typed(["show", "--config", "fit.yaml", "--rows", "0", "--check", "--html", "show.html"], folder)
        if "fit" in only:
            typed(["report", "runs", "--out", "report.html"], folder)
        with started(folder) as browser:
            for page, height in HEIGHTS.items():
                if not (folder / f"{page}.html").exists():
                    continue
                for scheme in ("light", "dark"):
                    browser.show((folder / f"{page}.html").as_uri(), scheme)
                    taken(browser, out / f"{page}-{scheme}.png", height)


def typed(arguments: list[str], folder: Path) -> str:
    """What a terminal gets from a command, with all that is written over later."""
    environment = {**os.environ, "HOME": str(folder), "PYTHONPATH": str(ROOT), "COLUMNS": str(WIDTH), "LINES": "60"}
    environment |= {"TERM": "xterm-256color", "COLORTERM": "truecolor", "HF_HUB_OFFLINE": "1"}
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "lightning_sft", *arguments]
    with subprocess.Popen(command, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        read = b""
        try:
            while more := os.read(ours, 1 << 16):
                read += more
        except OSError:  # the other end is closed
            pass
        os.close(ours)
    text = read.decode(errors="replace")
    if process.returncode not in (0, 1) or "Traceback" in text:  # 1: it does not fit, or does not pass
        raise SystemExit(f"{' '.join(command)} failed:\n{text}")
    return text


def screen(output: str) -> str:
    r"""What is left on the screen where progress bars have gone back and written lines anew.

    >>> screen("Loading 1\rLoading 2\r\nstep 1\r\n\x1b[1A\x1b[2Kstep 2\r\n")
    'Loading 2\nstep 2\n'
    """
    lines, row, is_at_start = [""], 0, False
    for part in CONTROL.split(output):
        if part in ("\n", "\r\n"):
            row, is_at_start = row + 1, False
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            is_at_start = True
        elif part.startswith("\x1b[") and CONTROL.fullmatch(part):
            if part[-1] == "A":
                row = max(0, row - int(part[2:-1] or 1))
            elif part[-1] == "K":
                lines[row] = ""
        elif part:
            lines[row] = part if is_at_start else lines[row] + part
            is_at_start = False
    return "\n".join(lines)


def drawn(lines: list[str], title: str, path: Path) -> None:
    """Lines of a terminal as an SVG that loads nothing."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi("\n".join(lines) + "\n"))
    svg = console.export_svg(title=title, code_format=FORMAT, unique_id=path.stem)
    path.write_text(re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE), encoding="utf-8")


def taken(browser: Browser, path: Path, height: int) -> None:
    """The upper part of the page that is open."""
    clip = {"x": 0, "y": 0, "width": 1160, "height": height, "scale": 1}
    shot = browser.command("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
    path.write_bytes(base64.b64decode(shot["data"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="A folder; by default the demo model, which is fetched.")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("images"))
    parser.add_argument("--rows", type=int, default=200, help="Of the training data.")
    parser.add_argument("--only", nargs="*", choices=COMMANDS, default=list(COMMANDS), help="These commands alone.")
    given = parser.parse_args()
    if shutil.which("chromedriver") is None:
        parser.error("chromedriver is not here: apt-get install chromium chromium-driver")
    pictures(given.model or str(fetch_demo_model()), given.out, given.rows, given.only)
