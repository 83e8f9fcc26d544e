from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMultimodalLM

from lightning_sft import SFTModule
from lightning_sft.data.batches.collate import collate
from lightning_sft.model.backbone import backbone_and_head, language_model
from lightning_sft.model.pretrained import config_dict, load_model, model_from_config
from lightning_sft.types import Example
from tests.helpers.composites import COMPOSITES, composite

DOCUMENTS = [Example(range(5, 5 + n), [0.0, *[1.0] * (n - 1)]) for n in (7, 12, 9)]


@pytest.mark.parametrize("kind", COMPOSITES)
def test_a_step_on_text_is_that_of_the_whole_model_on_each_document_alone(kind: str, tmp_path: Path) -> None:
    """Positions of several axes, token types and placeholders of images are those of the model's own forward pass."""
    module = SFTModule(composite(tmp_path, kind))
    module.configure_model()
    packed = module.isolates_documents
    assert packed
    found = module(collate(DOCUMENTS, packed=packed))
    found.total.backward()
    plain = language_model(AutoModelForMultimodalLM.from_pretrained(module.pretrained)).eval()
    wanted = []
    for document in DOCUMENTS:
        ids = torch.tensor([list(document.input_ids)])
        wanted.append(plain(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0])
    torch.testing.assert_close(found.log_probs, torch.cat(wanted), rtol=1e-5, atol=1e-5)
    torch.cat(wanted).sum().backward()
    model, of_plain = language_model(module.model), dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is (parameter.grad is not None), name
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, of_plain[name].grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", COMPOSITES)
def test_all_of_the_checkpoint_is_loaded_and_what_text_does_not_use_is_frozen(kind: str, tmp_path: Path) -> None:
    module = SFTModule(composite(tmp_path, kind))
    module.configure_model()
    assert module.model is not None
    plain = AutoModelForMultimodalLM.from_pretrained(module.pretrained)
    assert type(module.model) is type(plain)
    assert module.model.state_dict().keys() == plain.state_dict().keys()
    trained = {name for name, parameter in module.model.named_parameters() if parameter.requires_grad}
    of_text = {id(parameter) for part in backbone_and_head(module.model) for parameter in part.parameters()}
    assert trained == {name for name, p in module.model.named_parameters() if id(p) in of_text}
    assert 0 < len(trained) < len(list(module.model.parameters()))


@pytest.mark.parametrize("kind", COMPOSITES)
def test_the_architecture_of_a_checkpoint_is_the_whole_model(kind: str, tmp_path: Path) -> None:
    model = load_model(composite(tmp_path, kind))
    again = model_from_config(config_dict(model))
    assert type(again) is type(model)
    again.load_state_dict(model.state_dict())
