"""docs/reference/families.md and configs/models/: each config runs on a tiny model of its architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from lightning_sft.data.rows.messages import Converter
from lightning_sft.data.tokens.encode import encode
from lightning_sft.data.tokens.template_config import TemplateConfig
from lightning_sft.demos import tiny_tokenizer
from lightning_sft.main import main
from tests.architectures.configs import save
from tests.helpers.pages import code, page, tables
from tests.helpers.processes import ROOT
from tests.helpers.slow import slow_but
from tests.oracle.templates import of_trl
from tests.oracle.vocabularies import tokenizer_for
from tests.test_configs import write_data

CHATML = "ChatML"
ROW = {"prompt": "Hi", "completion": "Hello!"}


class Family(NamedTuple):
    """A row of the page."""

    config: Path
    model_type: str
    template: str
    variables: list[str]
    stop: str
    adapted: list[str]

    @property
    def tokenizer(self) -> Any:
        return tiny_tokenizer() if self.template == CHATML else tokenizer_for(of_trl()[self.template])


def families() -> dict[str, Family]:
    [rows] = [rows for head, *rows in tables(page("reference/families.md")) if head[1] == "config"]
    found = {}
    for _, config, model_type, template, variables, stop, adapted in rows:
        path = (ROOT / "docs" / "reference" / config.partition("](")[2].rstrip(")")).resolve()
        texts = (
            *code(model_type),
            template.strip("`"),
            code(variables),
            stop.strip("`").replace(r"\|", "|"),
            code(adapted),
        )
        found[path.stem] = Family(path, *texts)
    return found


FAMILIES = families()


def test_each_config_has_a_row_of_the_page() -> None:
    assert sorted(family.config for family in FAMILIES.values()) == sorted((ROOT / "configs" / "models").glob("*.yaml"))


@pytest.mark.filterwarnings("ignore:In this model, documents packed into one row see each other")
@pytest.mark.parametrize("name", slow_but(["qwen3", "gpt_oss", "lfm2", "granite4"], FAMILIES))
def test_a_config_runs_on_a_tiny_model_of_its_architecture(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES[name]
    monkeypatch.chdir(tmp_path)
    write_data(family.config, tmp_path)
    pretrained = save(family.model_type, tmp_path / "model", torch.bfloat16, family.tokenizer)
    flags = {"model.pretrained": pretrained, "trainer.accelerator": "cpu", "trainer.max_steps": "2"}
    flags |= {"trainer.enable_progress_bar": "false", "trainer.logger": "false", "trainer.max_epochs": "2"}
    cli = main(
        ["fit", "--config", str(family.config), *(text for key, value in flags.items() for text in (f"--{key}", value))]
    )
    assert cli.trainer.global_step == 2
    names = [name for name, parameter in cli.model.model.named_parameters() if parameter.requires_grad]
    assert sorted({adapted_module(name) for name in names}) == family.adapted


def adapted_module(parameter: str) -> str:
    """The last name of a module that has an adapter."""
    parts = [part for part in parameter.partition(".lora_")[0].split(".") if part != "base_layer"]
    return parts[-1]


@pytest.mark.parametrize("name", FAMILIES)
def test_variables_and_the_stop_are_those_of_the_template(name: str) -> None:
    family = FAMILIES[name]
    variables: dict[str, Any] = yaml.safe_load(family.config.read_text())["data"].get("chat_template_kwargs", {})
    assert variables.keys() <= set(family.variables)
    tokenizer, conversation = family.tokenizer, Converter()(ROW, "f:1")
    [example] = encode(conversation, tokenizer, config=TemplateConfig(variables))
    assert family.stop == ("–" if family.template == CHATML else tokenizer.decode(int(example.input_ids[-1])))
    assert example.target_weights[-1] > 0
    for variable in family.variables:
        assert variable in tokenizer.chat_template
    for variable in variables:
        others = {"Hi"} if isinstance(variables[variable], str) else {not variables[variable]}
        prompts = {
            tokenizer.apply_chat_template(
                [{"role": "user", "content": "Hi"}],
                tokenize=False,
                add_generation_prompt=True,
                **variables | {variable: v},
            )
            for v in (variables[variable], *others)
        }
        assert len(prompts) == 2, f"{variable} changes nothing"
