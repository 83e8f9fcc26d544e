"""A model in the terminal says what it says in ``predict``, wherever its weights come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_sft.commands.chat import Session, Talk
from lightning_sft.commands.chat_model import Speaker, printable
from lightning_sft.data.batches.loader import PromptBatch
from lightning_sft.data.tokens.chat_template import ChatTemplate
from lightning_sft.data.tokens.encode import encode_prompt
from lightning_sft.demos import CHATML
from lightning_sft.evaluation import generation
from lightning_sft.evaluation.generation import Sampling
from lightning_sft.export.adapter_folder import save_adapter
from lightning_sft.export.convert import export_checkpoint
from lightning_sft.model.tuning.adapters import Lora
from lightning_sft.types import Conversation, InputError
from tests.conformance import templates, tokenizer_for
from tests.helpers.exporting import trained

OPTIMIZER_KEY = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "question 1"}]


def said(speaker: Speaker, **how: Any) -> str:
    return str(speaker.answer(OPTIMIZER_KEY, lambda text: None, 12, **how)["content"])


def test_the_pieces_are_the_answer_and_the_answer_is_that_of_predict(pretrained: str) -> None:
    speaker, pieces = Speaker(pretrained, device="cpu"), list[str]()
    whole = speaker.answer(OPTIMIZER_KEY, pieces.append, max_new_tokens=120)["content"]
    assert len(pieces) > 1
    assert "".join(pieces) == printable(whole)
    prompt = encode_prompt(Conversation(OPTIMIZER_KEY), speaker.tokenizer)
    [row] = generation.answers(speaker.model, PromptBatch([prompt], speaker.tokenizer), 120)
    assert whole == row["prediction"]


def test_what_is_drawn_depends_on_the_seed_and_on_the_turn(pretrained: str) -> None:
    speaker, hot = Speaker(pretrained, device="cpu"), Sampling(temperature=2.0)
    assert said(speaker, sampling=hot) == said(speaker, sampling=hot)
    assert said(speaker, sampling=hot) != said(speaker, sampling=Sampling(temperature=2.0, seed=1))


@pytest.mark.parametrize("lora", [None, Lora(r=4, alpha=64)], ids=["whole", "lora"])
def test_a_checkpoint_a_folder_and_adapters_say_the_same(pretrained: str, tmp_path: Path, lora: Lora | None) -> None:
    trainer = trained(pretrained, model={"lora": lora})
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    export_checkpoint(str(tmp_path / "a.ckpt"), str(tmp_path / "folder"))
    names = ["a.ckpt", "folder"]
    if lora:
        names.append("adapters")
        save_adapter(trainer.lightning_module.model, tmp_path / "adapters", pretrained)
        trainer.datamodule.tokenizer.save_pretrained(tmp_path / "adapters")
    answers = {said(Speaker(str(tmp_path / name), device="cpu")) for name in names}
    assert len(answers) == 1
    assert answers != {said(Speaker(pretrained, device="cpu"))}


def test_a_folder_asks_as_its_training_did_as_the_checkpoint_does(pretrained: str, tmp_path: Path) -> None:
    """With the variables, the system prompt and the treatment of control tokens of the run."""
    (tmp_path / "tone.jinja").write_text("{{ tone }}|" + CHATML)
    own = {"chat_template_kwargs": {"tone": "kind"}, "system": "Be brief.", "control_tokens": "as_is"}
    trainer = trained(pretrained, data={"chat_template": str(tmp_path / "tone.jinja"), "tokens_per_batch": 200, **own})
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    export_checkpoint(str(tmp_path / "a.ckpt"), str(tmp_path / "folder"))
    found = []
    for name in ("a.ckpt", "folder"):
        session = Session([Talk(Speaker(str(tmp_path / name), device="cpu"))])
        [talk] = session.talks
        messages = [*talk.messages, {"role": "user", "content": "<|im_end|>"}]
        found.append(encode_prompt(Conversation(messages), talk.speaker.tokenizer).input_ids)
        session.begin("")
        assert talk.messages == []
    assert found[0] == found[1]
    text, turn = talk.speaker.tokenizer.decode(found[0]), "<|im_start|>{}\n{}<|im_end|>\n"
    turns = turn.format("system", "Be brief.") + turn.format("user", "<|im_end|>")
    assert text == f"kind|{turns}<|im_start|>assistant\n"
    assert found[0].count(talk.speaker.tokenizer.eos_token_id) == 3


def test_what_cannot_be_asked_is_refused_in_words(pretrained: str, tmp_path: Path) -> None:
    speaker = Speaker(pretrained, device="cpu")
    with pytest.raises(InputError, match="the model's context 256"):
        speaker.answer([{"role": "user", "content": "x" * 300}], print)
    with pytest.raises(InputError, match="There is no such folder"):
        Speaker(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="There is no checkpoint"):
        Speaker(str(tmp_path / "nothing.ckpt"))


def test_an_interrupted_answer_is_what_there_is_by_then(pretrained: str) -> None:
    pieces: list[str] = []

    def interrupt(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    whole = Speaker(pretrained, device="cpu").answer(OPTIMIZER_KEY, interrupt, 120)["content"]
    assert printable(whole) == "".join(pieces)


GENERATED = {
    "gptoss": (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yo<|return|>",
        "Hm.",
    ),
    "qwen3": ("<think>\nHm.\n</think>\n\nYo<|im_end|>", "Hm."),
    "llama3": ("Yo<|eot_id|>", None),
}


@pytest.mark.parametrize("name", GENERATED)
def test_what_is_generated_becomes_the_turn_that_the_template_writes_so(name: str) -> None:
    """And not a text that is put into another template: ``analysisHm.assistantfinalYo``."""
    written, thought = GENERATED[name]
    template, asked = ChatTemplate(tokenizer_for(templates()[name])), [{"role": "user", "content": "Hi"}]
    message = template.message_of(asked, written)
    assert (message["content"], message.get("reasoning_content")) == ("Yo", thought)
    assert template.prompt_and_answer([*asked, message], None)[1] == written
    half = written[: written.index("Yo") + 1]
    assert template.message_of(asked, half)["content"] == "Y"
