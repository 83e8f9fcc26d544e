"""How conversations are rendered goes with the tokenizer, and an exported template renders so by itself."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.data.tokens.encode import encode, encode_all, encode_prompt
from lightning_sft.data.tokens.template_config import TemplateConfig, configure, configured, for_inference
from lightning_sft.demos import CHATML, tiny_model, tiny_tokenizer
from lightning_sft.export.folder import export
from lightning_sft.model.pretrained import load_tokenizer
from lightning_sft.types import Conversation
from tests.conformance import answer, templates, tokenizer_for, user
from tests.oracle.kinds import WEATHER, system

ASKED = [user("Hi")]
VARIABLES = {
    **{"enable_thinking": False, "reasoning_effort": "low", "thinking": True, "keep_cot": True},
    **{"custom": {"a": [1, None, 'it\'s "so"\n']}, "not-a-name": 1, "today": "2026-01-31"},
}
WITH_TONE = "  {{ tone }}, {{ today }}|" + CHATML


@pytest.mark.parametrize("name", templates())
def test_an_exported_template_is_told_by_default_what_the_training_told_it(name: str) -> None:
    """To the last blank: a template that begins with blanks or a comment writes them as before."""
    tokenizer = tokenizer_for(templates()[name])
    configure(tokenizer, TemplateConfig(VARIABLES))
    exported = for_inference(tokenizer)
    for tools in (None, [WEATHER]):
        for more in ({}, {"enable_thinking": True, "reasoning_effort": "medium", "thinking": False}):
            how: dict[str, Any] = {"tools": tools, "tokenize": False, "add_generation_prompt": True}
            told = VARIABLES | more
            assert exported.apply_chat_template(ASKED, **how, **more) == tokenizer.apply_chat_template(
                ASKED, **how, **told
            )
    assert for_inference(exported).chat_template == exported.chat_template
    assert tokenizer.chat_template == templates()[name]


def test_each_of_several_templates_has_the_defaults() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": WITH_TONE, "tool_use": "{{ tone }}!" + CHATML}
    configure(tokenizer, TemplateConfig({"tone": "kind"}))
    exported, how = for_inference(tokenizer), {"tokenize": False}
    assert exported.apply_chat_template(ASKED, **how).startswith("  kind, |")
    assert exported.apply_chat_template(ASKED, tools=[WEATHER], **how).startswith("kind!")


CONFIGS = [
    TemplateConfig(),
    TemplateConfig({"tone": "kind", "today": "2026-01-31"}, "as_is", "mask", (3, 5), "Be brief."),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["default", "own"])
def test_what_is_saved_with_a_tokenizer_is_read_again(config: TemplateConfig, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(WITH_TONE)
    configure(tokenizer, config)
    for_inference(tokenizer).save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert configured(again).different == config.different
    assert list(configured(again).stop_ids) == list(config.stop_ids)
    found = [encode_prompt(Conversation(ASKED), own).input_ids for own in (tokenizer, again)]
    assert found[0] == found[1]


ROWS = [{"prompt": "Hi", "completion": "<think>t</think>Yo"}]
OWN: dict[str, Any] = {"chat_template_kwargs": {"tone": "kind"}, "thoughts": "mask", "control_tokens": "as_is"}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A model exported by a run with settings of its own."""
    tokenizer = tiny_tokenizer(WITH_TONE)
    configure(tokenizer, TemplateConfig({"tone": "kind"}, "as_is", "mask", system="Be brief."))
    return str(export(tiny_model(), tokenizer, tmp_path / "folder"))


def data_of(pretrained: str, trainer: Any, **settings: Any) -> SFTDataModule:
    data = SFTDataModule(train=ROWS, **settings)
    trainer(max_steps=1).fit(SFTModule(pretrained), data)
    return data


def test_a_run_on_an_exported_folder_renders_as_its_training_did_and_says_so(
    folder: str, quiet_trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        data = data_of(folder, quiet_trainer)
    assert f"as in the training of {folder}: {{'variables': {{'tone': 'kind'}}, 'control_tokens'" in caplog.text
    tokenizer = tiny_tokenizer(WITH_TONE)
    turns = [system("Be brief."), user("Hi"), answer("<think>t</think>Yo")]
    config = TemplateConfig({"tone": "kind"}, "as_is", "mask")
    [expected] = encode(Conversation(turns, weights=[0, 0, 1]), tokenizer, config=config)
    [example] = data.splits["train"].examples
    assert list(example.input_ids) == list(expected.input_ids)
    assert list(example.target_weights) == list(expected.target_weights)
    assert data.state_dict()["template"]["system"] == "Be brief."


def test_settings_of_the_data_come_before_those_of_an_exported_folder(folder: str, quiet_trainer: Any) -> None:
    data = data_of(
        folder, quiet_trainer, chat_template_kwargs={"tone": "stern"}, thoughts="keep", system="", control_tokens="text"
    )
    assert data.template.different == {"variables": {"tone": "stern"}, "system": ""}
    assert "Be brief." not in data.tokenizer.decode(list(data.splits["train"].examples[0].input_ids))


def test_another_model_after_an_exported_folder_gets_nothing_of_it(
    folder: str, pretrained: str, quiet_trainer: Any
) -> None:
    data = data_of(folder, quiet_trainer)
    quiet_trainer(max_steps=1).fit(SFTModule(pretrained), data)
    assert data.template.different == {}
    assert data.reading.system is None


@pytest.mark.parametrize("name", ["unk_token", "pad_token", "sep_token"])
def test_a_special_token_that_is_an_empty_text_is_none(name: str, tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | {name: ""}
    file.write_text(json.dumps(config), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert (getattr(tokenizer, name), getattr(tokenizer, f"{name}_id")) == (None, None)
    assert tokenizer.convert_tokens_to_ids("no token") is None
    given = Conversation(
        [{"role": "user", "content": "Hi é\n"}, {"role": "assistant", "content": "Yo"}], weights=[0, 1]
    )
    [encoded], [usual] = (list(encode_all([given], each)) for each in (tokenizer, tiny_tokenizer()))
    assert not encoded.notes
    assert encoded.examples[0].input_ids.tolist() == usual.examples[0].input_ids.tolist()
