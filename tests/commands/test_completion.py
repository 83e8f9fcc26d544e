"""bash completes verbs, options, choices and files."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from lightning_sft.main import main

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="completion is for bash")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "lightning-sft"
    path.write_text(str(main(["completion"])))
    return path


def completed(script: Path, *words: str) -> list[str]:
    """What bash offers for the last word."""
    given = " ".join(f"'{word}'" for word in ("lightning-sft", *words))
    code = f'source {script}; COMP_WORDS=({given}); COMP_CWORD={len(words)}; _lightning_sft; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_verbs_are_offered_first(script: Path) -> None:
    assert {"fit", "show", "verify", "doctor", "init", "chat", "export"} <= set(completed(script, ""))
    assert completed(script, "ver") == ["verify"]
    assert completed(script, "e") == ["export"]


def test_options_of_the_verb_are_offered(script: Path) -> None:
    assert completed(script, "fit", "--data.pack") == ["--data.packing"]
    assert "--model.pretrained" in completed(script, "fit", "--config", "a.yaml", "--model.p")
    assert completed(script, "chat", "--comp") == ["--compare"]
    assert completed(script, "export", "--model.p") == []


def test_choices_are_offered_and_else_files(script: Path) -> None:
    assert completed(script, "fit", "--data.packing", "") == ["packed", "padded"]
    assert completed(script, "verify", "--in_float64", "t") == ["true"]
    assert completed(script, "fit", "--config", "a") == []  # so bash offers files
    assert "complete -o default" in script.read_text()
