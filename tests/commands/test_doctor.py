"""What doctor says is so on this machine, and it says what to do."""

from __future__ import annotations

import io
import json
import resource
from importlib.metadata import version
from pathlib import Path

import pytest

from lightning_sft import __version__
from lightning_sft.commands import doctor
from lightning_sft.commands.doctor import Item
from lightning_sft.machine.terminal import Console
from lightning_sft.main import main
from lightning_sft.training.checks import bfloat16_is_slow


def named(name: str) -> Item:
    [found] = [fact for fact in doctor.facts() if fact.name == name]
    return found


def test_json_has_every_fact_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {fact["name"]: fact["value"] for fact in found}.items() >= {
        ("lightning-sft", __version__),
        ("torch", version("torch")),  # torch.__version__ may name a build too, as +cu130
    }
    sections = ["versions", "optional", "machine", "devices", "fast paths", "limits", "caches"]
    assert list(dict.fromkeys(fact["section"] for fact in found)) == sections
    console = Console(width=80, record=True, file=io.StringIO())
    doctor.show([Item(**fact) for fact in found], console)
    text = console.export_text()
    assert all(fact["name"] in text for fact in found)
    assert all(len(line) <= 80 for line in text.splitlines())


def test_the_speed_of_bfloat16_is_measured_and_said() -> None:
    fact = named("bfloat16 matmuls")
    assert (fact.state == "off") is bfloat16_is_slow()
    assert ("32-true" in fact.remark) is bfloat16_is_slow()


def test_what_is_missing_comes_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    known = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("peft", "torchmetrics") else known(name))
    assert (named("peft").state, named("peft").remark) == ("off", "for model.lora: pip install 'lightning-sft[peft]'")
    assert (named("torchmetrics").state, named("torchmetrics").remark) == ("bad", "pip install torchmetrics")


def test_malicious_wheels_and_narrow_limits_are_marked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "2.6.3")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 4096))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert named("lightning").state == "bad"
    assert (named("open files").state, named("open files").remark) == ("bad", "ulimit -n 4096")
    assert named("tokenizers in parallel").value == "off"
    main(["doctor"])
    assert "2 problems" in capsys.readouterr().out


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no no-such-compiler" in named("torch.compile").remark


def test_sizes_of_caches_count_links_once(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"x" * 1000)
    (tmp_path / "snapshot").symlink_to(tmp_path / "blob")
    assert 1000 <= doctor._bytes_below(tmp_path) < 1500
