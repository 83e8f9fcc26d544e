"""Two machines: two network namespaces of this one, joined by a cable of their own."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_sft.main import main
from tests.helpers.gradients import ROWS

ROOT = Path(__file__).parents[1]
TORCHRUN = ROOT / "configs" / "two_nodes" / "torchrun.sh"
NODES = {"sft-node0": "10.77.0.1", "sft-node1": "10.77.0.2"}


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """The names of two namespaces that reach each other by an interface ``eth``, and nothing else."""
    if shutil.which("ip") is None:
        pytest.skip("there is no ip command")
    first, second = NODES
    cable = ["link", "add", "eth", "netns", first, "type", "veth", "peer", "name", "eth", "netns", second]
    try:
        for name in NODES:
            ip("netns", "add", name)
        ip(*cable)
        for name, address in NODES.items():
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth")
            ip("-n", name, "link", "set", "eth", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield list(NODES)
    except PermissionError:
        pytest.skip("this machine does not allow network namespaces")
    finally:
        for name in NODES:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise PermissionError(done.stderr)


def flags(pretrained: str, folder: Path, devices: int, **others: Any) -> list[str]:
    given = {
        "model.pretrained": pretrained,
        "data.tokens_per_batch": 100,
        "trainer.accelerator": "cpu",
        "trainer.devices": devices,
        "trainer.strategy.compute_dtype": "null",
        "trainer.logger": "CSVLogger",
        "trainer.logger.save_dir": folder / "logs",
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        **others,
    }
    return [str(word) for key, value in given.items() for word in (f"--{key}", value)]


def losses(folder: Path) -> list[float]:
    [path] = (folder / "logs").rglob("metrics.csv")
    with path.open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.mark.slow
@pytest.mark.parametrize("context", [1, 2], ids=["data", "context"])
def test_two_nodes_take_the_steps_of_one_process(
    context: int, nodes: list[str], pretrained_for_two: str, tmp_path: Path
) -> None:
    """Each with rows of its own, or with half the tokens of every row."""
    for name in ("train", "val"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    alone, both = tmp_path / "alone", tmp_path / "both"
    of_one = {"trainer.accumulate_grad_batches": 2 // context, "trainer.num_nodes": 1}
    one = flags(pretrained_for_two, alone, 1, **of_one)
    two = flags(pretrained_for_two, both, 1, **{"trainer.strategy.context_parallel_size": context})
    command = [sys.executable, "-m", "lightning_sft", "fit", "--config", str(TORCHRUN.with_name("fit.yaml")), *one]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=200)
    environment |= {"MAIN": NODES[nodes[0]], "DEVICES": "1", "GLOO_SOCKET_IFNAME": "eth"}
    running = [
        subprocess.Popen(
            ["ip", "netns", "exec", node, str(TORCHRUN), *two],
            cwd=tmp_path,
            env={**environment, "NODE_RANK": str(rank)},
        )
        for rank, node in enumerate(nodes)
    ]
    try:
        assert [process.wait(timeout=200) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
    assert len(losses(both)) >= 3
    assert losses(both) == pytest.approx(losses(alone), rel=1e-5)


def test_the_job_of_slurm_is_a_script_whose_command_is_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = TORCHRUN.with_name("slurm.sbatch")
    subprocess.run(["bash", "-n", str(job)], check=True)
    [line] = [line for line in job.read_text().splitlines() if line.startswith("srun lightning-sft")]
    command = line.split()[2:]
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        main([*command, "--print_config"])
    assert not stop.value.code
    assert "num_nodes: 2" in capsys.readouterr().out
