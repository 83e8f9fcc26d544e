"""``lightning-sft show``: what it prints is what ``fit`` would train on."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet

from lightning_sft.data.inspect.audit import Thresholds
from lightning_sft.demos import tiny_tokenizer
from lightning_sft.main import main
from lightning_sft.types import InputError

GOOD = {"prompt": "Hi", "completion": "Yo"}
SHOWN = "<|im_start|>user⏎\nHi<|im_end|>⏎\n<|im_start|>assistant⏎\n«Yo<|im_end|>»\n"


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may read the weights of a model."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr("lightning_sft.model.pretrained.load_model", refuse)


@pytest.fixture
def config(pretrained: str, jsonl: Any, rows: list[dict[str, str]], tmp_path: Path) -> dict[str, Any]:
    """Of a machine with more GPUs than this one has."""
    return {
        "trainer": {"accelerator": "gpu", "devices": 2, "accumulate_grad_batches": 2, "precision": "bf16-mixed"},
        "model": {"pretrained": pretrained},
        "data": {"train": jsonl([*rows, GOOD]), "val": jsonl(rows[:2], "val.jsonl"), "tokens_per_batch": 64},
    }


@pytest.fixture
def show(config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command line with the config as a file: what it prints."""

    def run(*flags: str) -> str:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        main(["show", "--config", str(tmp_path / "config.yaml"), *flags])
        return capsys.readouterr().out

    return run


def test_the_tokens_of_the_micro_batches_are_shown_and_targets_are_marked(show: Any) -> None:
    text = show("--rows", "4")
    places = re.findall(r"train.jsonl:\d+  step \d, micro-batch (\d) of rank 0, \d+ tokens, \d+ targets", text)
    assert places == ["1", "2", "3", "4"]
    assert re.search(r"user⏎\nSay (\d+)<\|im_end\|>⏎\n<\|im_start\|>assistant⏎\n«\1 it is<\|im_end\|>»", text)
    assert SHOWN in show("--row", "train.jsonl:13")


def test_text_that_reads_like_a_control_token_is_marked(show: Any, config: dict[str, Any], jsonl: Any) -> None:
    config["data"] |= {"train": jsonl([{"prompt": "a<|im_end|>b", "completion": "c<|im_start|>"}]), "val": None}
    text = show("--rows", "1")
    assert "user⏎\na⟨<|im_end|>⟩b<|im_end|>⏎\n" in text
    assert "«c⟨<|im_start|>⟩<|im_end|>»" in text
    assert "⟨plain text that reads like a control token⟩" in text
    config["data"]["train"] = jsonl([GOOD])
    text = show("--rows", "1")
    assert "⟨" not in text
    assert text.startswith("/")  # the place of the row, without an empty line before it
    assert "Targets stand between" not in show("--rows", "0")


def test_the_plan_is_that_of_the_trainers_settings(show: Any, config: dict[str, Any]) -> None:
    said = show()
    assert "2 optimizer steps of 3 or 4 packed micro-batches of at most 64 tokens" in said
    assert ", filled up to 4 with empty ones." in " ".join(said.split())
    assert "4 optimizer steps of 1 or 2 packed" in show("--trainer.devices", "1")
    config["trainer"]["limit_train_batches"] = 2
    assert "1 optimizer step of 3 or 4 packed micro-batches of" in show()


def test_weights_are_shown_where_they_are_not_1(show: Any) -> None:
    assert "«Yo<|im_end|>»×0.333" in show("--row", "train.jsonl:13", "--model.normalize", "sequence")
    assert "×0" not in show("--row", "train.jsonl:13")


def test_a_config_that_fit_has_saved_can_be_shown(
    show: Any, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--model.pretrained", config["model"]["pretrained"], "--print_config"])
    saved = yaml.safe_load(capsys.readouterr().out)
    assert "ckpt_path" in saved
    data = saved["data"] | config["data"]
    config |= saved | {"data": data}
    assert "7 optimizer steps of 1 packed micro-batch of" in show()


def test_all_refused_rows_are_listed_although_fit_would_stop(show: Any, config: dict[str, Any], jsonl: Any) -> None:
    config["data"]["train"] = jsonl(
        [GOOD, {"prompt": "a", "completion": 7}, {"promt": "[/b]"}, {"prompt": "x" * 300, "completion": "y"}]
    )
    del config["data"]["tokens_per_batch"]
    text = show()
    assert re.search(r"1 refused: 'completion' must be a string.*\n  \S*train.jsonl:2\n", text)
    assert re.search(r"1 refused: the keys.*\n  \S*train.jsonl:3\n", text)
    assert re.search(r"1 left out, longer than data.max_length\n  \S*train.jsonl:4 \(\d+ tokens\)\n", text)
    rows, sequences = (
        "the refused rows: data.invalid_rows is 'error'.",
        "the sequences left out: data.overflow is 'error'.",
    )
    stops = {("error", "drop"): [rows], ("error", "error"): [rows, sequences]}
    stops |= {("skip", "error"): [sequences], ("skip", "drop"): []}
    for (invalid_rows, overflow), said in stops.items():
        text = show("--data.invalid_rows", invalid_rows, "--data.overflow", overflow)
        assert re.findall(r"fit stops at (.*)", text) == said


def test_rows_without_a_line_of_their_own_are_listed_and_the_clean_file_has_the_others(
    show: Any, config: dict[str, Any], jsonl: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": f"Say {i}", "completion": 7 if i % 3 == 1 else f"{i} it is"} for i in range(9)]
    whole, lines = json.dumps(rows), [", ".join(map(json.dumps, part)) for part in (rows[:4], rows[4:])]
    files = [
        jsonl(whole, "one.json"),
        jsonl("[" + ",\n".join(lines) + "]", "two.json"),
        jsonl(whole[1:-1].replace("}, {", "} {"), "three.json"),
    ]
    tables = [
        {
            "messages": [{"role": "user", "content": r["prompt"]}]
            + [{"role": "assistant", "content": "x"}] * (r["completion"] != 7)
        }
        for r in rows
    ]
    parquet.write_table(pa.Table.from_pylist(tables), tmp_path / "four.parquet")
    config["data"]["train"] = [*files, str(tmp_path / "four.parquet")]
    text = show("--clean", str(tmp_path / "out.jsonl"))
    assert (
        len(re.findall(r"9 refused: 'completion' must be a string.*\n  \S*one.json:row 2, \S*one.json:row 5", text))
        == 1
    )
    assert re.search(r"two.json:row 2, \S*two.json:row 5, \S*two.json:row 8, \S*three.json:row 2", text)
    assert re.search(r"3 refused: the row has no answer.*\n  \S*four.parquet:row 2, \S*four.parquet:row 5", text)
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [json.loads(line)["messages"][0]["content"] for line in lines]
    assert kept == [f"Say {i}" for i in range(9) if i % 3 != 1] * 4


def test_a_row_that_is_not_used_says_why(show: Any, config: dict[str, Any], jsonl: Any) -> None:
    config["data"]["train"] = jsonl([GOOD, {"prompt": "a", "completion": 7}])
    with pytest.raises(InputError, match=r"The row is not used. .*train.jsonl:2: 'completion' must be a string"):
        show("--row", "train.jsonl:2")
    with pytest.raises(
        InputError, match=r"There is no row 'train.jsonl:3' among the 2 rows of data.train and \d+ rows? of data.val\."
    ):
        show("--row", "train.jsonl:3")


def test_a_row_may_be_named_by_its_number(show: Any, config: dict[str, Any], jsonl: Any) -> None:
    rows = [GOOD, {"prompt": "a", "completion": 7}, {"prompt": "Who?", "completion": "I"}]
    config["data"] |= {"train": jsonl(json.dumps(rows), "one.json"), "val": None}
    for asked in ("3", "row 3", "one.json:3", "one.json:row 3"):
        text = show("--row", asked)
        assert text.count("one.json:row 3  step") == 1
        assert "«I<|im_end|>»" in text
        assert "refused:" not in text
    with pytest.raises(InputError, match=r"The row is not used. \S*one.json:row 2: 'completion' must be a string"):
        show("--row", "2")
    with pytest.raises(InputError, match=r"There is no row '4' .*or the number of the row"):
        show("--row", "4")
    config["data"]["train"] = [config["data"]["train"], jsonl(rows, "two.jsonl")]
    with pytest.raises(InputError, match=r"The row 3 is there in several files. Name one: \S+ or \S+:"):
        show("--row", "3")
    with pytest.raises(InputError, match="in several files"):
        show("--row", "2")
    assert "two.jsonl:3  step" in show("--row", "two.jsonl:3")


def test_rows_that_are_refused_are_listed_once(
    show: Any, config: dict[str, Any], jsonl: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config["data"]["train"] = jsonl([GOOD, {"prompt": "a", "completion": 7}, GOOD])
    with pytest.raises(SystemExit):
        show("--check")
    text = capsys.readouterr().out
    assert text.count("'completion' must be a string") == 1
    assert re.search(r"refused +1 +\d+ .*FAILS", text)
    assert "duplicated:\n" in text


@pytest.mark.parametrize("flags", [["--check", "true"], ["--check=true"], ["--rows", "1", "--check", "True"]])
def test_a_check_may_be_asked_for_with_true_and_left_out_with_false(
    show: Any, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):  # validation rows are in training
        show(*flags)
    assert "FAILS" in capsys.readouterr().out
    assert "FAILS" not in show("--check", "false")


def test_another_value_of_check_says_what_is_expected(show: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        show("--check", "0.1")
    assert "--check is 0.1; expected its settings, as check.max_" in capsys.readouterr().err


def test_a_check_that_fails_exits_with_1(show: Any, config: dict[str, Any], jsonl: Any) -> None:
    assert "FAILS" not in show("--data.val", "null", "--check")
    with pytest.raises(SystemExit) as stop:  # validation rows are in training
        show("--check")
    assert stop.value.code == 1
    show("--check.max_overlap", "1")
    config["check"] = {"max_overlap": 1.0}
    assert re.search(r"validation rows in training +2 +2 +100.00% +≤ 100.00% +passes", show("--check"))
    assert "passes" in show()  # the section asks for the check
    with pytest.raises(SystemExit):
        show("--check", "--check.min_targets", "0.99")


def test_tools_that_the_template_does_not_show_fail_the_check(show: Any, config: dict[str, Any], jsonl: Any) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    config["data"]["train"] = jsonl([{"messages": turns, "tools": tools}, {"messages": turns}], "tools.jsonl")
    config["data"]["val"] = None
    text = show("--check.max_not_shown", "0.5", "--check.max_duplicated", "1")
    assert re.search(r"tools not shown +1 +2 +50.00% +≤ 50.00% +passes", text)
    with pytest.raises(SystemExit):
        show("--check")


def test_a_duplicate_is_named_with_what_it_repeats(
    show: Any, config: dict[str, Any], jsonl: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"Say {i % 60}", "completion": f"{i % 60}"} for i in range(80)]
    config["data"] |= {"train": jsonl(rows), "val": None}
    with pytest.raises(SystemExit):
        show("--check")
    named = re.findall(r"train.jsonl:(\d+) \(repeats \S*train.jsonl:(\d+)\)", capsys.readouterr().out)
    assert len(named) == 20
    assert all(abs(int(a) - int(b)) == 60 for a, b in named)


def test_an_unknown_threshold_is_refused_with_its_name(show: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        show("--check.max_refusd", "0.1")
    assert stop.value.code == 2
    assert "max_refusd" in capsys.readouterr().err


def test_the_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["show", "--help"])
    text = capsys.readouterr().out
    for flag in (
        "--rows ",
        "--row ",
        "--html ",
        "--html_rows ",
        "--check ",
        "--clean ",
        "--overwrite ",
        "--data.train ",
        "--model.normalize ",
    ):
        assert flag in text


def test_a_page_holds_the_ids_and_weights_of_all_batches(show: Any, config: dict[str, Any], tmp_path: Path) -> None:
    show("--html", str(tmp_path / "new" / "page.html"), "--model.normalize", "sequence")
    page = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert len(data["rows"]) == 13
    [row] = [row for row in data["rows"] if row["where"].endswith("train.jsonl:13")]
    ids = [i for number in row["pieces"] for i in data["pieces"][number][1]]
    assert tiny_tokenizer().decode(ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>"
    assert row["weights"] == [[len(ids) - 3, 0.0], [3, 1 / 3]]


def test_the_page_may_have_fewer_rows_and_has_the_chosen_one_first(show: Any, tmp_path: Path) -> None:
    show("--html", str(tmp_path / "page.html"), "--html_rows", "4", "--row", "train.jsonl:13")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    rows = json.loads(page.partition('id="data">')[2].partition("</script>")[0])["rows"]
    assert [row["where"].rpartition("/")[2] for row in rows].index("train.jsonl:13") == 0
    assert len({row["where"] for row in rows}) == 4


def test_a_data_module_of_another_kind_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text(
        yaml.safe_dump({"data": {"class_path": "lightning.pytorch.demos.boring_classes.BoringDataModule"}})
    )
    with pytest.raises(InputError, match=r"show needs an SFTDataModule or a subclass, got BoringDataModule"):
        main(["show", "--model.pretrained", config["model"]["pretrained"], "--config", str(tmp_path / "other.yaml")])


def test_the_thresholds_of_the_page_are_the_defaults() -> None:
    page = (Path(__file__).parents[3] / "docs" / "howto" / "show.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert yaml.safe_load(example)["check"] == asdict(Thresholds())


def test_a_mixture_is_shown_with_its_realized_shares_and_audited_row_by_row(
    show: Any, config: dict[str, Any], jsonl: Any
) -> None:
    a, b = (jsonl([{"prompt": f"{name} {i}", "completion": "Yo"} for i in range(8)], f"{name}.jsonl") for name in "ab")
    parts = {"maths": {"source": a, "share": 1}, "[chat]": {"source": b, "share": 7, "weight": 0.5}}
    config["data"] |= {"train": {"parts": parts}, "val": None}
    text = show("--check")
    assert re.search(r"maths +8 +0.25 +12.5% +12.5% +1 *\n", text)
    assert re.search(r"\[chat\] +8 +1.75 +87.5% +87.5% +0.5 *\n", text)
    assert re.search(r"duplicated +0 +16 ", text)


def test_clean_writes_the_usable_rows_and_says_what_is_left_out(
    show: Any, config: dict[str, Any], jsonl: Any, tmp_path: Path
) -> None:
    config["data"]["train"] = jsonl(
        [GOOD, {"prompt": "a", "completion": 3}, {"prompt": "x" * 300, "completion": "y"}, {**GOOD, "weight": 2}]
    )
    del config["data"]["tokens_per_batch"]
    out = tmp_path / "new" / "out.jsonl"
    text = show("--clean", str(out))
    assert f"Usable rows: 2 in {out}" in text
    assert "Left out: 1 refused, 1 too long" in text
    first, second = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    assert first == {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
    assert second["messages"][1] == {"role": "assistant", "content": "Yo", "weight": 2.0}
    with pytest.raises(InputError, match=r"clean needs all rows, .* set data\.streaming=false"):
        show("--clean", str(out), "--data.streaming", "true")


def test_clean_and_html_write_over_no_data(show: Any, config: dict[str, Any], jsonl: Any, tmp_path: Path) -> None:
    config["data"]["train"] = jsonl([GOOD, {"prompt": "a", "completion": 3}])
    train, other = Path(config["data"]["train"]), tmp_path / "other.jsonl"
    before = train.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(train)
    other.write_text("mine")
    for name in (config["data"]["train"], config["data"]["val"], str(tmp_path / "link.jsonl")):
        with pytest.raises(InputError, match="is one of the files that are read"):
            show("--clean", name, "--overwrite", "true")
        with pytest.raises(InputError, match="would be a page with the name of a data file"):
            show("--html", name)
    with pytest.raises(InputError, match=r"other.jsonl already exists. Give another file .*--overwrite true"):
        show("--clean", str(other))
    with pytest.raises(InputError, match=r"give a name that ends in .jsonl"):
        show("--clean", str(tmp_path / "out.jsonl.gz"))
    assert (train.read_bytes(), other.read_text()) == (before, "mine")
    assert f"Usable rows: 1 in {other}" in show("--clean", str(other), "--overwrite", "true")


def test_of_a_stream_the_first_rows_are_shown(show: Any, config: dict[str, Any]) -> None:
    text = show("--data.streaming", "true", "--data.buffer_rows", "5")
    assert re.search(r"rows +5 ", text)
    assert "these are the first 5 rows of each data set" in text
    assert SHOWN not in text
