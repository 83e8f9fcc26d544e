"""The command line, called in-process as the shell calls it."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser, OptimizerCallable
from torch.optim import SGD
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import SafeCheckpoint
from lightning_sft.demos import tiny_pretrained
from lightning_sft.main import VERBS, console, main
from lightning_sft.types import InputError
from tests.helpers.payload import Payload


class MyModule(SFTModule):
    """A user's own module."""


class MyFastModule(SFTModule):
    """A user's own module with an optimizer of its own."""

    def __init__(self, pretrained: str, optimizer: OptimizerCallable = lambda groups: SGD(groups, lr=0.7)) -> None:
        super().__init__(pretrained, optimizer=optimizer)


class MyData(SFTDataModule):
    """A user's own data module."""

    def __init__(self, path: str, k: int = 3) -> None:
        super().__init__(train=path)
        self.k = k


class MyTemplate(SFTDataModule):
    """A user's own data module with a template of its own."""

    def __init__(self, path: str, template: str) -> None:
        super().__init__(train=path, chat_template=template)


@pytest.fixture
def arguments(pretrained: str, jsonl: Any, rows: list[dict[str, str]], tmp_path: Path) -> list[str]:
    path = jsonl(rows)
    flags = {
        "model.pretrained": pretrained,
        "data.train": path,
        "data.val": path,
        "data.test": path,
        "data.predict": path,
        "model.max_new_tokens": 2,
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": tmp_path,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.logger": "lightning.pytorch.loggers.CSVLogger",
        "trainer.logger.save_dir": tmp_path,
    }
    return [text for key, value in flags.items() for text in (f"--{key}", str(value))]


def test_fit_validate_test_and_predict_run(arguments: list[str], tmp_path: Path, rows: list[dict[str, str]]) -> None:
    cli = main(["fit", *arguments])
    assert cli.trainer.global_step == 1  # one epoch by default
    assert {"train/loss", "val/loss", "lr"} <= cli.trainer.callback_metrics.keys()
    assert "val/loss" in main(["validate", *arguments]).trainer.callback_metrics
    assert "test/perplexity" in main(["test", *arguments]).trainer.callback_metrics
    main(["predict", *arguments])
    predictions = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [p["reference"] for p in predictions] == [row["completion"] for row in rows]


def test_the_resolved_config_is_saved_beside_the_run_and_runs_again(arguments: list[str], tmp_path: Path) -> None:
    first = main(["fit", *arguments, "--model.optimizer.lr", "1e-3"])
    saved = Path(first.trainer.log_dir) / "config.yaml"
    config = yaml.safe_load(saved.read_text())
    assert config["model"]["optimizer"]["init_args"]["lr"] == 1e-3
    assert config["data"]["packing"] == "packed"
    again = main(["fit", "--config", str(saved)])
    assert again.trainer.callback_metrics["val/loss"] == first.trainer.callback_metrics["val/loss"]


def test_a_config_that_cannot_be_written_whole_leaves_the_one_before(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = main(["fit", *arguments])
    saved = Path(first.trainer.log_dir) / "config.yaml"
    before, parser = saved.read_bytes(), first.parser
    monkeypatch.setattr(LightningArgumentParser, "save", _half_written)
    with pytest.raises(OSError, match="No space left"):
        parser.save(first.config, str(saved), overwrite=True)
    assert saved.read_bytes() == before
    assert not list(saved.parent.glob(".config*"))


def _half_written(parser: object, config: object, path: str, **settings: object) -> None:
    Path(path).write_text("model:")
    raise OSError(28, "No space left on device")


def test_help_is_flat_and_readable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for key in ("model.pretrained", "model.normalize", "data.train", "data.tokens_per_batch", "data.packing"):
        assert f"--{key} " in text
    assert "A hub name, a folder, or a GGUF file." in " ".join(text.split())


def test_print_config_is_complete_yaml(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", *arguments, "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["normalize"] == "token"
    assert config["trainer"]["max_epochs"] == 1


def test_one_part_of_the_optimizer_can_be_set_and_the_rest_keeps_its_default(arguments: list[str]) -> None:
    cli = main(["fit", *arguments, "--model.optimizer.lr", "0.25"])
    [group, *_] = cli.trainer.optimizers[0].param_groups
    assert (group["initial_lr"], group["fused"], group["weight_decay"]) == (0.25, True, 0.01)
    cli = main(["fit", *arguments, "--model.optimizer", "NAdam", "--model.optimizer.lr", "0.5"])
    assert isinstance(cli.trainer.optimizers[0], torch.optim.NAdam)


@pytest.mark.parametrize("own_class", [False, True])
def test_another_optimizer_takes_its_own_defaults_and_says_its_learning_rate(
    arguments: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, own_class: bool
) -> None:
    model = ["--model", f"{__name__}.MyModule"] if own_class else []

    def optimizer(*more: str) -> Any:
        return main(["fit", *model, *arguments, *more]).trainer.optimizers[0]

    found = optimizer("--model.optimizer", "NAdam").defaults
    assert (found["lr"], found["weight_decay"]) == (2e-3, 0)
    assert "NAdam with a learning rate of 0.002" in caplog.text
    settings: Any = {"optimizer": {"class_path": "torch.optim.Adafactor"}}
    if own_class:
        settings = {"class_path": f"{__name__}.MyModule", "init_args": settings}
    (tmp_path / "o.yaml").write_text(yaml.safe_dump({"model": settings}))
    found = main(["fit", "--config", str(tmp_path / "o.yaml"), *arguments]).trainer.optimizers[0]
    assert (type(found).__name__, found.defaults["lr"], found.defaults["eps"]) == ("Adafactor", 1e-2, (None, 1e-3))
    found = optimizer("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.5").defaults
    assert (found["lr"], found["weight_decay"]) == (0.5, 0)
    found = optimizer("--model.optimizer.weight_decay", "0.5").defaults
    assert (found["lr"], found["weight_decay"], found["fused"]) == (2e-5, 0.5, True)


def test_a_default_of_a_users_own_module_is_kept(arguments: list[str]) -> None:
    at = arguments.index("--model.max_new_tokens")
    rest = arguments[:at] + arguments[at + 2 :]
    found = main(["fit", "--model", f"{__name__}.MyFastModule", *rest]).trainer.optimizers[0]
    assert (type(found).__name__, found.defaults["lr"]) == ("SGD", 0.7)


def test_optimizers_of_several_classes_are_a_list_in_yaml(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "o.yaml").write_text(
        """
model:
  optimizers:
    - optimizer: {class_path: torch.optim.Muon, init_args: {lr: 0.02}}
      parameters: ["*_proj.weight"]
    - optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 3.0e-5}}
"""
    )
    cli = main(["fit", "--config", str(tmp_path / "o.yaml"), *arguments])
    assert [g["initial_lr"] for g in cli.trainer.optimizers[0].param_groups] == [0.02, 3e-5, 3e-5]
    main(["plan", "--config", str(tmp_path / "o.yaml"), *[a for a in arguments if a != "fit"]])


def test_a_user_brings_their_own_classes_by_path_or_in_yaml(
    arguments: list[str], tmp_path: Path, jsonl: Any, rows: list[dict[str, str]]
) -> None:
    trainer = arguments[arguments.index("--trainer.accelerator") :]
    mine = {"class_path": f"{__name__}.MyData", "init_args": {"path": jsonl(rows), "k": 5}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"data": mine}))
    model = ["--model.pretrained", arguments[1]]
    cli = main(["fit", "--config", str(tmp_path / "mine.yaml"), *model, *trainer])
    assert (type(cli.datamodule).__name__, cli.datamodule.k) == ("MyData", 5)
    flags = ["--data", f"{__name__}.MyData", "--data.path", mine["init_args"]["path"], "--data.k", "7"]
    cli = main(["fit", *flags, "--model", f"{__name__}.MyModule", *model, *trainer])
    assert cli.datamodule.k == 7
    assert type(cli.model).__name__ == "MyModule"


@pytest.mark.parametrize("verb", ["fit", "show"])
@pytest.mark.parametrize("place", ["before", "after", "in another config"])
def test_a_class_may_be_named_before_and_after_a_config_of_ours(
    arguments: list[str], tmp_path: Path, verb: str, place: str
) -> None:
    adam = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.25}}
    ours, own = tmp_path / "ours.yaml", tmp_path / "own.yaml"
    ours.write_text(yaml.safe_dump({"model": {"pretrained": arguments[1], "optimizer": adam, "warmup": 0.5}}))
    own.write_text(yaml.safe_dump({"model": {"class_path": f"{__name__}.MyModule", "init_args": {"chunk_size": 7}}}))
    config, named = ["--config", str(ours)], ["--model", f"{__name__}.MyModule", "--model.chunk_size", "7"]
    flags = {
        "before": [*named, *config],
        "after": [*config, *named],
        "in another config": [*config, "--config", str(own)],
    }[place]
    cli = main([verb, *flags, *arguments[2:], *(["--trainer.max_steps", "1"] if verb == "fit" else [])])
    assert isinstance(cli.model, MyModule)
    assert (cli.model.warmup, cli.model.chunk_size) == (0.5, 7)
    assert type(cli.model.optimizer([torch.nn.Parameter(torch.ones(2))])) is torch.optim.Adam


@pytest.mark.parametrize("settings", [{}, {"PYTHONSAFEPATH": "1"}])
def test_the_console_script_finds_classes_of_the_current_folder_but_nothing_there_hides_a_package(
    arguments: list[str], tmp_path: Path, settings: dict[str, str]
) -> None:
    (tmp_path / "losses.py").write_text("from lightning_sft import SFTModule\n\n\nclass Mine(SFTModule): ...\n")
    (tmp_path / "yaml.py").write_text("raise SystemExit('not the package')")
    script = tmp_path / "elsewhere" / "lightning-sft"
    script.parent.mkdir()
    script.write_text("from lightning_sft.main import console\nconsole()\n")
    where = {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, str(script), "fit", "--model", "losses.Mine", *arguments, "--print_config"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, **where, **settings}
    )
    if settings:
        assert "losses" in done.stderr
        assert done.returncode != 0
    else:
        assert "class_path: losses.Mine" in done.stdout


def test_columns_of_other_names_are_mapped_in_yaml(arguments: list[str], tmp_path: Path, jsonl: Any) -> None:
    path = jsonl([{"question": f"What is {i}?", "answer": f"{i} it is"} for i in range(4)], "questions.jsonl")
    data = {"train": path, "columns": {"prompt": "question", "completion": "answer"}}
    (tmp_path / "columns.yaml").write_text(yaml.safe_dump({"data": data}))
    trainer = arguments[arguments.index("--trainer.accelerator") :]
    cli = main(["fit", "--config", str(tmp_path / "columns.yaml"), "--model.pretrained", arguments[1], *trainer])
    assert cli.trainer.global_step == 1
    examples = cli.datamodule.splits["train"].examples
    assert [cli.datamodule.tokenizer.decode(example.input_ids) for example in examples] == [
        f"<|im_start|>user\nWhat is {i}?<|im_end|>\n<|im_start|>assistant\n{i} it is<|im_end|>" for i in range(4)
    ]


def test_the_tokenizer_is_the_models_unless_another_is_named(arguments: list[str], pretrained: str) -> None:
    assert main(["validate", *arguments]).datamodule.tokenizer.name_or_path == pretrained
    with pytest.raises(InputError, match=r"No tokenizer can be loaded from '/nowhere'"):
        main(["validate", *arguments, "--data.tokenizer", "/nowhere"])


def last_checkpoint(cli: Any) -> str:
    """The checkpoint that a run resumes from."""
    [path] = (saver.best_model_path for saver in cli.trainer.checkpoint_callbacks if isinstance(saver, SafeCheckpoint))
    return str(path)


def test_a_checkpoint_never_overrides_the_command_line(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = last_checkpoint(main(["fit", *arguments, "--model.optimizer.lr", "0.5"]))

    def no_reading(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the pretrained weights were read although a checkpoint was given")

    monkeypatch.setattr("lightning_sft.model.pretrained.load_model", no_reading)
    flags = ["--model.chunk_size", "7", "--trainer.max_epochs", "2", "--ckpt_path", path]
    cli = main(["fit", *arguments, *flags, "--model.schedule", "constant"])
    assert cli.model.chunk_size == 7
    assert cli.model.schedule == "constant"
    assert cli.trainer.global_step == 2


def test_the_checkpoint_of_a_model_of_another_shape_is_refused(arguments: list[str], tmp_path: Path) -> None:
    path = last_checkpoint(main(["fit", *arguments]))
    other = tiny_pretrained(tmp_path / "other", hidden_size=32)
    same = tiny_pretrained(tmp_path / "moved")
    for verb in ("fit", "test"):
        with pytest.raises(InputError, match=r"is of a model with hidden_size=16, and model.pretrained=.*other has 32"):
            main([verb, *arguments, "--model.pretrained", other, "--ckpt_path", path])
    assert main(["test", *arguments, "--model.pretrained", same, "--ckpt_path", path]).trainer.ckpt_path == path


def test_a_checkpoint_runs_no_code(arguments: list[str], tmp_path: Path) -> None:
    path = main(["fit", *arguments]).trainer.checkpoint_callback.best_model_path
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, "trap": Payload(tmp_path / "sprung")}, tmp_path / "evil.ckpt")
    for verb in ("fit", "validate"):
        with pytest.raises((InputError, pickle.UnpicklingError)):
            main([verb, *arguments, "--ckpt_path", str(tmp_path / "evil.ckpt")])
    assert not (tmp_path / "sprung").exists()


def test_export_writes_what_plain_transformers_loads(arguments: list[str], tmp_path: Path) -> None:
    cli = main(["fit", *arguments, "--model.optimizer.lr", "0.1"])
    out = main(["export", "--ckpt", cli.trainer.checkpoint_callback.best_model_path, "--out", str(tmp_path / "out")])
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(ids).logits, cli.model.model.eval()(ids).logits)
    with pytest.raises(InputError, match=r"There is no checkpoint 'nowhere.ckpt'"):
        main(["export", "--ckpt", "nowhere.ckpt", "--out", str(tmp_path / "other")])


def test_the_shell_gets_one_message_and_no_traceback(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-sft", "fit", *arguments, "--data.train", "nowhere.jsonl"])
    with pytest.raises(SystemExit, match=r"^lightning-sft: There is no data file 'nowhere.jsonl'"):
        console()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("data:\n  train: &a [*a]\n", "an alias stands for what it is in"),
        ("data: &a\n  train: {x: *a}\n", "an alias stands for what it is in"),
        ("a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)), "stand for"),
        ("[" * 5000 + "]" * 5000, "nested too deeply"),
    ],
)
@pytest.mark.parametrize("verb", ["fit", "show"])
def test_a_config_that_does_not_end_is_one_error(verb: str, config: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(config)
    with pytest.raises(InputError, match=message):
        main([verb, "--config", str(tmp_path / "a.yaml")])


def test_an_unknown_key_is_refused_with_its_name(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", *arguments, "--data.tokens_per_bach", "5"])
    assert "tokens_per_bach" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["lightning-sft"], [sys.executable, "-m", "lightning_sft"]])
def test_both_ways_to_call_it_work(command: list[str]) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [*command, "--version"], capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
    )
    assert done.stdout.strip() == "0.1.0"


def test_the_bare_command_says_which_verbs_there_are_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for verb in VERBS:
        [line] = [line for line in lines if line.startswith(f"  {verb} ")]
        assert line.split(maxsplit=1)[1].endswith(".")
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("usage: lightning-sft ")
    assert {"--version", "--debug"} <= set("\n".join(lines).split())


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], [], ["shwo"]], ids=str)
def test_what_runs_no_verb_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import atexit, sys\n"
        "heavy = {'torch', 'lightning', 'transformers', 'numpy', 'jsonargparse'}\n"
        "atexit.register(lambda: print('imported:', sorted(heavy & set(sys.modules))))\n"
        "from lightning_sft.main import console\n"
        "console()"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.stdout.endswith("imported: []\n"), done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_what_the_table_of_verbs_names_is_there(verb: str) -> None:
    module, _, name = VERBS[verb][0].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_the_command_line_of_fit_is_found_under_its_public_name() -> None:
    from lightning_sft import main as module
    from lightning_sft.commands.fit import SFTCLI

    assert module.SFTCLI is SFTCLI
    with pytest.raises(AttributeError, match="has no attribute 'CLI'"):
        _ = module.CLI


def test_an_export_has_the_chat_template_it_was_trained_with_also_with_the_users_data_module(
    arguments: list[str], tmp_path: Path, jsonl: Any, rows: list[dict[str, str]]
) -> None:
    from lightning_sft.demos import CHATML

    template = tmp_path / "mine.jinja"
    template.write_text(CHATML.replace("system", "sys") + "{# mine #}")
    trainer = arguments[arguments.index("--trainer.accelerator") :]
    mine = ["--data", f"{__name__}.MyTemplate", "--data.path", jsonl(rows), "--data.template", str(template)]
    cli = main(["fit", *mine, "--model.pretrained", arguments[1], *trainer])
    out = main(["export", "--ckpt", last_checkpoint(cli), "--out", str(tmp_path / "out")])
    assert AutoTokenizer.from_pretrained(out).chat_template.endswith("{# mine #}")


def test_a_broken_yaml_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("model: [")
    monkeypatch.setattr(sys, "argv", ["lightning-sft", "fit", "--config", str(tmp_path / "broken.yaml")])
    with pytest.raises(SystemExit, match=r"^lightning-sft: "):
        console()
