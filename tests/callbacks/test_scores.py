from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lightning_sft.callbacks import ScoreAnswers
from lightning_sft.evaluation.answer_scores import scores
from lightning_sft.main import main
from lightning_sft.types import InputError
from tests.helpers.processes import torchrun


def flags(pretrained: str, path: str, out: Path) -> list[str]:
    keys = {"model.pretrained": pretrained, "data.test": path, "model.max_new_tokens": 3, "trainer.logger": "false"}
    keys |= {"trainer.accelerator": "cpu", "trainer.default_root_dir": str(out), "data.predict_batch_size": 2}
    keys |= {"trainer.callbacks+": "ScoreAnswers", "trainer.callbacks.rouge": "true", "model.sampling.temperature": 1}
    return [text for key, value in keys.items() for text in (f"--{key}", str(value))]


def conversation(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


def test_answers_of_two_processes_are_scored_once_each_in_the_order_of_the_data(
    pretrained: str, jsonl: Any, tmp_path: Path
) -> None:
    rows = [conversation("a" * n, str(n)) for n in (3, 9, 1, 4)]
    path = jsonl([*rows, conversation("x", "3", "y", "last")])
    one = main(["test", *flags(pretrained, path, tmp_path / "one")]).trainer.callback_metrics
    torchrun("lightning_sft", "test", *flags(pretrained, path, tmp_path / "two"), "--trainer.devices", "2")
    texts = [(tmp_path / name / "answers.jsonl").read_text() for name in ("one", "two")]
    assert texts[0] == texts[1]
    answers = [json.loads(line) for line in texts[0].splitlines()]
    assert [row["reference"] for row in answers] == ["3", "9", "1", "4", "last"]
    wanted = scores([row["prediction"] for row in answers], [row["reference"] for row in answers], rouge=True)
    assert {name: one[f"test/{name}"].item() for name in wanted} == pytest.approx(wanted)
    assert one["test/loss"] > 0


def test_rows_without_answers_and_expressions_without_a_group_are_refused(pretrained: str, jsonl: Any) -> None:
    with pytest.raises(InputError, match="must have one group"):
        ScoreAnswers(extract="####")


@pytest.mark.parametrize(
    ("extract", "message"), [("(", "is no regular expression"), ("a(b)(c)", "must have one group")]
)
def test_an_expression_that_is_none_is_refused_when_it_is_given(extract: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ScoreAnswers(extract=extract)


def test_an_expression_that_does_not_match_a_reference_is_refused_before_answers_are_generated(
    pretrained: str, jsonl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generated(*args: Any) -> Any:
        raise AssertionError("answers were generated")

    monkeypatch.setattr("lightning_sft.callbacks.scores.answer_all", generated)
    monkeypatch.setattr("lightning_sft.module.SFTModule.test_step", generated)
    path = jsonl([conversation("a", "it is 3"), conversation("b", "four")])
    with pytest.raises(InputError, match=r"train.jsonl:2: extract='is .*' does not match the reference 'four'"):
        main(["test", *flags(pretrained, path, tmp_path), r"--trainer.callbacks.extract=is (\d)"])


def test_the_expression_of_the_page_comes_through_the_command_line(pretrained: str, jsonl: Any, tmp_path: Path) -> None:
    """It begins with what YAML takes for a comment."""
    page = (Path(__file__).parents[2] / "docs" / "howto" / "evaluation.md").read_text(encoding="utf-8")
    [block] = [text for text in re.findall(r"```yaml\n(.+?)```", page, re.DOTALL) if "ScoreAnswers" in text]
    (tmp_path / "page.yaml").write_text(block.replace("rouge: true, bleu: true", "rouge: false"))
    path = jsonl([conversation("a", "#### 3")])
    config = ["--config", str(tmp_path / "page.yaml"), "--trainer.default_root_dir", str(tmp_path)]
    given = ["--model.pretrained", pretrained, "--model.max_new_tokens", "4", "--data.test", path]
    cli = main(["test", *config, *given, "--trainer.logger", "false"])
    assert cli.trainer.callback_metrics["test/extracted_match"] in (0, 1)
