"""Either of our modules beside one of a user."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.training.optimizers import parameter_groups
from lightning_sft.types import InputError
from tests.helpers.dropping import flat_gradient, run_code
from tests.helpers.gradients import ROWS, Recorder, fit, furthest

Make = Callable[..., Trainer]
YOUR_DATA, YOUR_MODULE = "Your data, our module", "Our data, your module"
pytestmark = pytest.mark.usefixtures("project")


def mean_loss(pretrained: str, batches: Sequence[Any]) -> tuple[Tensor, Any]:
    """The mean −log Pr of the targets of several padded batches, from transformers' own logits; and the model."""
    model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32).train()
    total, count = torch.zeros(()), 0
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"][:, 1:].flatten()
        total = total + F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum")
        count += int((labels != -100).sum())
    return total / count, model


def test_gradients_of_a_users_batches_are_the_mean_over_all_targets_of_a_step(pretrained: str) -> None:
    """Of a collator of transformers, with a mask; three micro-batches, in steps of two and one."""
    data = run_code(YOUR_DATA)["YourData"]()
    run = fit(pretrained, data, accumulate_grad_batches=2)
    batches, wanted = list(data.train_dataloader()), []
    assert (batches[0]["attention_mask"] == 0).any()
    for window in (batches[:2], batches[2:]):
        loss, model = mean_loss(pretrained, window)
        loss.backward()
        wanted.append(flat_gradient(model))
    assert furthest(run.gradients, wanted) <= 1e-5


def test_its_checkpoint_is_loaded_and_generates(pretrained: str, capsys: Any) -> None:
    scope = run_code(YOUR_DATA, 1, **run_code(YOUR_DATA))
    assert capsys.readouterr().out.endswith(f"{scope['data'].tokenizer.decode(scope['answer'][0])}\n")
    assert scope["answer"].shape[1] > len(scope["data"].tokenizer("Say 3").input_ids)
    before = AutoModelForCausalLM.from_pretrained(pretrained).get_input_embeddings().weight
    assert not torch.equal(scope["model"].get_input_embeddings().weight, before)


def test_figures_of_a_users_batches_are_those_of_the_corpus(pretrained: str, quiet_trainer: Make) -> None:
    data = run_code(YOUR_DATA)["YourData"]()
    [found] = quiet_trainer().validate(SFTModule(pretrained), data, verbose=False)
    loss = mean_loss(pretrained, list(data.val_dataloader()))[0].item()
    assert found["val/loss"] == pytest.approx(loss, rel=1e-5)
    texts = [row["completion"] for row in ROWS]
    num_targets, num_bytes = sum(len(text) + 1 for text in texts), sum(map(len, texts))  # bytes, and a stop token each
    assert found["val/bits_per_byte"] == pytest.approx(loss * num_targets / num_bytes / 0.6931472, rel=1e-5)


def test_predict_wants_prompts(pretrained: str, quiet_trainer: Make) -> None:
    class Data(run_code(YOUR_DATA)["YourData"]):
        def predict_dataloader(self) -> Any:
            return self.train_dataloader()

    with pytest.raises(InputError, match=r"predict answers prompts of SFTDataModule \(data.predict\)"):
        quiet_trainer().predict(SFTModule(pretrained), Data())


def recorded(module: type[Any]) -> Any:
    """A user's module whose gradients are recorded."""

    class Recorded(module):
        def configure_optimizers(self) -> Any:
            return Recorder(parameter_groups(self.parameters()))

    return Recorded()


@pytest.mark.parametrize("normalize", ["token", "sequence"])
def test_a_users_module_gets_the_gradients_of_ours(pretrained: str, quiet_trainer: Make, normalize: str) -> None:
    scope = run_code(YOUR_MODULE)
    assert scope["data"].tokenizer.chat_template
    module, settings = recorded(scope["YourModule"]), {"accumulate_grad_batches": 2}
    module.normalize = normalize
    trainer = quiet_trainer(**settings)
    trainer.fit(module, SFTDataModule(train=ROWS, tokens_per_batch=100))
    ours = fit(pretrained, {"tokens_per_batch": 100}, normalize, **settings)
    assert len(ours.gradients) > 2
    assert furthest(trainer.optimizers[0].gradients, ours.gradients) <= 1e-5


def test_a_normalization_that_we_do_not_have_is_said_of_the_module(quiet_trainer: Make, project: Path) -> None:
    module = run_code(YOUR_MODULE)["YourModule"]()
    module.normalize = "sample"
    with pytest.raises(InputError, match=r"model\.normalize is 'sample'; expected token"):
        quiet_trainer().fit(module, SFTDataModule(train=ROWS))


def test_our_figures_in_a_users_module_are_those_of_ours(pretrained: str, quiet_trainer: Make) -> None:
    scope = run_code(YOUR_MODULE)
    module = run_code("Metrics and callbacks in your own script", YourModule=scope["YourModule"])["Evaluated"]()
    [theirs] = quiet_trainer().validate(module, SFTDataModule(val=ROWS), verbose=False)
    [ours] = quiet_trainer().validate(SFTModule(pretrained), SFTDataModule(val=ROWS), verbose=False)
    assert theirs == pytest.approx({name: ours[name] for name in theirs}, rel=1e-5)
    assert ours.keys() - theirs.keys() == {"val/bits_per_byte"}


def test_a_module_that_does_not_say_whether_it_keeps_documents_apart_is_warned_of(quiet_trainer: Make) -> None:
    class Silent(run_code(YOUR_MODULE)["YourModule"]):
        isolates_documents = None

    with pytest.warns(UserWarning, match=r"Silent does not say whether its model keeps them apart"):
        quiet_trainer(max_steps=1).fit(Silent(), SFTDataModule(train=ROWS))
    quiet_trainer(max_steps=1).fit(Silent(), SFTDataModule(train=ROWS, packing="padded"))  # and that is all


def test_a_module_without_a_name_for_its_model_needs_one_for_the_tokenizer(
    project: Path, quiet_trainer: Make, pretrained: str
) -> None:
    module = run_code(YOUR_MODULE)["YourModule"]()
    module.pretrained = None
    with pytest.raises(InputError, match=r"set data.tokenizer"):
        quiet_trainer().fit(module, SFTDataModule(train=ROWS))
    data = SFTDataModule(train=ROWS, tokenizer=pretrained)
    quiet_trainer(max_steps=1).fit(module, data)
    assert data.tokenizer.chat_template
