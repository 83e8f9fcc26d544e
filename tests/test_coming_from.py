"""The pages for those who come from elsewhere: options are real, and our configurations run and say what theirs say."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import callbacks as lightning_callbacks

from lightning_sft import SFTDataModule, callbacks
from lightning_sft.data.rows.messages import to_conversation
from lightning_sft.data.tokens.encode import encode
from lightning_sft.demos import tiny_tokenizer
from lightning_sft.main import main
from tests.helpers.pages import blocks, code, commands, is_key, options, page, tables

PEERS = ("TRL", "LitGPT", "Axolotl")
PAGES = {peer: page(f"howto/from_{peer.lower()}.md") for peer in PEERS}
PAGE = "\n".join([page("howto/coming_from.md"), *PAGES.values()])
IN_OTHER_UNITS = {
    "lr_warmup_steps",
    "evals_per_epoch",
    "per_device_train_batch_size",
    "micro_batch_size",
    "global_batch_size",
}


def rows(peer: str) -> Iterator[tuple[list[str], list[str], str]]:
    """Their options, our keys, and what differs."""
    for head, *body in tables(PAGES[peer]):
        assert head == [peer, "ours", "what differs"]
        yield from ((code(theirs), code(ours), remark) for theirs, ours, remark in body)


def test_every_key_of_ours_is_one_of_fit_or_of_a_callback() -> None:
    found = [key for peer in PEERS for _, ours, _ in rows(peer) for key in ours]
    assert len(set(found)) > 50
    for key in found:
        name, _, argument = key.partition(".")
        kind = getattr(callbacks, name, None) or getattr(lightning_callbacks, name, None)
        if kind is None:
            assert is_key(key), key
        else:
            assert argument in inspect.signature(kind).parameters, key
    assert not is_key("data.max_len")
    assert not is_key("model.lora.rank")


def fields(package: str, file: str, name: str) -> set[str]:
    """What a class in the source of an installed package has, by its annotations or by its ``__init__``."""
    [path] = [p for p in importlib.metadata.files(package) or [] if str(p) == f"{package}/{file}"]
    tree = ast.parse(Path(str(path.locate())).read_text(encoding="utf-8"))
    [found] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    init = [a.arg for f in found.body if isinstance(f, ast.FunctionDef) and f.name == "__init__" for a in f.args.args]
    return {n.target.id for n in found.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)} | {
        *init
    }


def test_options_of_trl_are_those_of_its_source_and_none_of_its_own_is_left_out() -> None:
    own = fields("trl", "trainer/sft_config.py", "SFTConfig") - {"_VALID_DICT_FIELDS"}
    known = own | fields("trl", "trainer/base_config.py", "_BaseConfig")
    known |= fields("trl", "trainer/sft_trainer.py", "SFTTrainer") | fields(
        "peft", "tuners/lora/config.py", "LoraConfig"
    )
    known |= fields("peft", "config.py", "PeftConfig")
    known |= fields("transformers", "training_args.py", "TrainingArguments")
    named = {name for theirs, _, _ in rows("TRL") for name in theirs}
    assert len(own) > 20
    assert not named - known
    assert not own - named


@pytest.mark.parametrize("peer", ["TRL", "Axolotl"])
def test_who_trains_adapters_is_told_what_to_install(peer: str) -> None:
    assert "lora" in our_config(peer)["model"]
    assert "pip install 'lightning-sft[peft]'" in PAGES[peer]


def test_options_that_people_look_for_are_there() -> None:
    looked_for = {"TRL": {"bias", "task_type"}, "Axolotl": {"wandb_project", "wandb_name", "wandb_entity"}}
    for peer, names in looked_for.items():
        assert names <= {name for theirs, _, _ in rows(peer) for name in theirs}, peer


def test_no_option_is_there_twice() -> None:
    for peer in PEERS:
        named = [name for theirs, _, _ in rows(peer) for name in theirs]
        assert len(named) == len(set(named)), peer


def their_settings(peer: str) -> dict[str, Any]:
    """Of their example, those that are plain values, under the names that the table has."""
    text = PAGES[peer]
    if peer == "TRL":
        calls = [node for node in ast.walk(ast.parse(blocks(text, "python")[0])) if isinstance(node, ast.Call)]
        words = [word for call in calls if ast.unparse(call.func) != "load_dataset" for word in call.keywords]
        return {w.arg: w.value.value for w in words if w.arg and isinstance(w.value, ast.Constant)}
    given = yaml.safe_load(blocks(text, "yaml")[0])
    found = {name: value for name, value in given.items() if not isinstance(value, (dict, list))}
    for part in ("train", "eval"):
        found |= {f"{part}.{name}": value for name, value in given.get(part, {}).items()}
    return found


def our_config(peer: str) -> dict[str, Any]:
    [config] = [yaml.safe_load(block) for block in blocks(PAGES[peer], "yaml")][-1:]
    assert isinstance(config, dict)
    return config


def value_of(config: dict[str, Any], key: str) -> Any:
    """Of a key with dots, or of a callback's argument."""
    name, _, argument = key.partition(".")
    if name[0].isupper():
        [own] = [c["init_args"] for c in config["trainer"]["callbacks"] if c["class_path"].endswith(f".{name}")]
        return own[argument]
    for part in key.split("."):
        config = config[part]
    return config


@pytest.mark.parametrize("peer", PEERS)
def test_our_configuration_says_what_theirs_says(peer: str) -> None:
    """For each option that is one key here, by the table."""
    one_to_one = {name: ours[0] for theirs, ours, _ in rows(peer) if len(ours) == 1 for name in theirs}
    compared = 0
    for name, value in their_settings(peer).items():
        if name in one_to_one and type(value) in (int, float, str) and name.rpartition(".")[2] not in IN_OTHER_UNITS:
            ours = value_of(our_config(peer), one_to_one[name])
            if isinstance(ours, dict):  # an optimizer or adapters, by a name
                continue
            if isinstance(value, str):
                assert ours in value, name  # HuggingFaceTB/… in checkpoints/HuggingFaceTB/…
            else:
                assert ours == value, name
            compared += 1
    assert compared >= 8


def write_data(folder: Path) -> None:
    chat = [
        {"messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": f"{i}."}]}
        for i in range(40)
    ]
    pairs = [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": f"Hello {i}"}]} for i in range(9)
    ]
    alpaca = [{"instruction": f"Say {i}", "output": f"{i}."} for i in range(40)]
    (folder / "data").mkdir()
    for name, rows_of_file in {"train": chat, "val": chat[:9], "chat": chat, "pairs": pairs}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of_file))
    for name in ("train", "val"):
        (folder / "data" / f"{name}.json").write_text(json.dumps(alpaca))
    (folder / "alpaca.jinja").write_text(blocks(PAGE, "jinja")[1])


@pytest.mark.parametrize("peer", PEERS)
def test_our_configuration_runs(peer: str, pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    config = our_config(peer)
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    here = {"model.pretrained": pretrained, "trainer.precision": "32-true", "trainer.accelerator": "cpu"}
    here |= {"trainer.max_steps": "2", "trainer.enable_progress_bar": "false", "data.cache": "null"}
    here |= {"data.max_length": "256", "data.tokens_per_batch": "256"}
    cli = main(["fit", "--config", "fit.yaml", *(word for key, value in here.items() for word in (f"--{key}", value))])
    assert cli.trainer.global_step >= 1
    assert cli.trainer.accumulate_grad_batches == config["trainer"]["accumulate_grad_batches"]
    assert any(isinstance(callback, callbacks.SafeCheckpoint) for callback in cli.trainer.callbacks)


def test_the_templates_of_the_page_render_what_the_peers_render() -> None:
    plain, alpaca = blocks(PAGE, "jinja")
    row = to_conversation({"prompt": "2 + 2 =", "completion": " 4"})
    tokenizer = tiny_tokenizer(plain)
    [example] = encode(row, tokenizer)
    assert tokenizer.decode(example.input_ids) == "2 + 2 = 4<|im_end|>"
    assert sum(example.target_weights) == len(" 4") + 1
    [example] = encode(row, tokenizer := tiny_tokenizer(alpaca))
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    )
    assert tokenizer.decode(example.input_ids) == f"{prompt}### Instruction:\n2 + 2 =\n\n### Response:\n 4<|im_end|>"


def test_commands_are_there() -> None:
    assert {verb for verb, _ in commands(PAGE)} == {"show"}
    assert all(options(verb) and set(flags) <= options(verb) for verb, flags in commands(PAGE))
    named = {words[1] for cell in PAGE.split("`") if len(words := cell.split()) == 2 and words[0] == "lightning-sft"}
    assert named >= {"show", "plan", "export", "test"}
    assert all(options(verb) for verb in named)


def test_defaults_of_ours_that_the_page_names_are_those_of_the_data_module() -> None:
    defaults = {name: p.default for name, p in inspect.signature(SFTDataModule).parameters.items()}
    assert (defaults["overflow"], defaults["packing"], defaults["seed"]) == ("drop", "packed", 0)
