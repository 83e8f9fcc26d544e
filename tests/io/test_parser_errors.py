"""A wrong argument is one short message: what was given, what is expected, what may be meant."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lightning_sft.io.parser_errors import refusal
from lightning_sft.main import main


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--trainer.precision bf16-mxied", "--trainer.precision is bf16-mxied; expected 64, 32, 16, .* bf16-mixed\\?"),
        ("--model.schedule cosin", "--model.schedule is cosin; expected cosine, linear, .* Did you mean cosine\\?"),
        ("--model.optimizer.lr abc", "--model.optimizer.lr is abc; expected a number"),
        ("--model.lora.r x", "--model.lora.r is x; expected an integer"),
        ("--model.lora true", "--model.lora is True; expected its settings, as model.lora.r, or null"),
        ("--model.lora.rr 4", "--model.lora.rr is not known: Lora has r, alpha, .* Did you mean r\\?"),
        ("--model.lora.rank 4", "--model.lora.rank is not known: .* Did you mean r\\?"),
        ("--model.lora.lora_alpha 4", "--model.lora.lora_alpha is not known: .* Did you mean alpha\\?"),
        ("--trainer.max_epochs abc", "--trainer.max_epochs is abc; expected an integer or null"),
        ("--model.optimizer AdamWW", "--model.optimizer is AdamWW; .* a class of Optimizer, .* Did you mean AdamW\\?"),
        ("--model.optimizer nowhere.Adam", "--model.optimizer is nowhere.Adam; .* No package nowhere is installed"),
        ("--trainer.callbacks+=EarlyStoping", "--trainer.callbacks is EarlyStoping; .* Did you mean EarlyStopping\\?"),
        ("--trainer.callbacks+=EarlyStopping --trainer.callbacks.patiens=3", "EarlyStopping has monitor, .*patience"),
        ("--model.optimizer.lr -x", "--model.optimizer.lr has no value. If -x .*, write --model.optimizer.lr=-x"),
        ("--model.optimizer.lr --model.warmup 0", "--model.optimizer.lr has no value"),
        ("--dry-run", "--dry-run.* Did you mean --dry_run\\?"),
        ("--config nowhere.yaml", "--config is .*nowhere.yaml; there is no such file"),
        ("--model.optimizers '[{optimizer: {class_path: AdamWW}}]'", "AdamWW; expected the path of a class"),
    ],
)
def test_a_wrong_argument_is_one_short_message(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit", "--model.pretrained", "x", *shlex.split(flags)])
    told = capsys.readouterr().err
    assert end.value.code == 2
    assert re.search(message, told)
    assert len(told.splitlines()) == 1
    assert len(told) < 450
    assert not re.search("Union|Subtypes|typing|<class|Namespace", told)


@pytest.mark.parametrize("verb", ["fit", "show", "predict"])
def test_a_config_without_its_option_is_told_it(verb: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "d.yaml").write_text("data: {seed: 1}")
    with pytest.raises(SystemExit):
        main([verb, str(tmp_path / "d.yaml")])
    assert f"Did you mean --config {tmp_path / 'd.yaml'}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("{source: a.jsonl, share: 70%}", r"maths.share is 70%; expected a number or null\. Write 0\.7\."),
        ("{path: a.jsonl, share: 1}", "maths.path is not known: Part has source, share"),
        ("3", "maths is 3; expected a string or a path"),
    ],
)
def test_what_is_wrong_with_a_part_of_a_mixture_names_the_part_and_its_key(
    part: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "a.yaml"
    config.write_text(f"data:\n  train:\n    parts:\n      chat: b.jsonl\n      maths: {part}\n")
    with pytest.raises(SystemExit):
        main(["fit", "--model.pretrained", "x", "--config", str(config)])
    assert re.search(rf"a.yaml:5: data.train.parts.{message}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("verb", "flag", "option"),
    [
        ("fit", "--trainer.max_ep=3", "--trainer.max_epochs"),
        ("fit", "--data.tokens=100", "--data.tokens_per_batch"),
        ("plan", "--model.warm=0.1", "--model.warmup"),
        ("show", "--model.warm=0.1", "--model.warmup"),
        ("export", "--ck=x", "--ckpt"),
    ],
)
def test_an_abbreviated_option_is_refused_with_the_whole_one(
    verb: str, flag: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([verb, *(["--model.pretrained", "x"] if verb != "export" else []), flag])
    assert end.value.code == 2
    assert re.search(f"{flag}. Did you mean {option}\\? All options: ", capsys.readouterr().err)


def test_a_missing_argument_points_to_the_help_of_its_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("fit", "plan"):
        with pytest.raises(SystemExit):
            main([verb])
        assert f"lightning-sft {verb}: " in (told := capsys.readouterr().err)
        assert f"--model.pretrained. All options: lightning-sft {verb} --help" in told


def test_a_negative_number_in_scientific_notation_is_a_value(tmp_path: Path) -> None:
    for value in ("-1e-4", "-2.5E+3", "-1", "-.5"):
        with pytest.raises(Exception, match=rf"model.warmup is {float(value)}; expected a number >= 0 and <= 1"):
            main(["fit", "--model.pretrained", "x", "--model.warmup", value])


def test_a_message_of_unknown_words_stays_as_it_is() -> None:
    assert refusal("the words of another version", {}, []) is None
    assert refusal('Parser key "model.warmup": no words that are known', {}, []) is None
