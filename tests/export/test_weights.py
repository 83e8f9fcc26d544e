"""Weights that are read a part at a time: what the model gives, and how much of it there is in memory meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_sft.demos import tiny_pretrained
from lightning_sft.export.weights import Weights, architecture, check_parts, parts_of, read_while_running, write_file
from lightning_sft.model.parallel.loading import reader
from lightning_sft.model.pretrained import load_architecture, load_model
from lightning_sft.types import InputError

EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("llama", {"tie_word_embeddings": True}),
    "positions in a table": ("gpt2", {}),
    "windows": ("gemma3_text", {}),
    "experts": ("qwen3_moe", EXPERTS),
    "recurrent": ("mamba", {}),
}
CPU = torch.device("cpu")


class Held(Weights):
    """The weights of a model in memory."""

    def __init__(self, model: PreTrainedModel, pretrained: str) -> None:
        super().__init__(architecture(load_architecture(pretrained), torch.float32), torch.float32, torch.float32)
        self.values = model.state_dict()

    def part(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: self.values[name] for name in names}


@pytest.fixture(params=MODELS)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedModel, Held]:
    kind, config = MODELS[request.param]
    pretrained = tiny_pretrained(tmp_path / "pretrained", kind, **config)
    model = load_model(pretrained).eval()
    return model, Held(model, pretrained)


def test_a_model_whose_parts_are_read_as_it_runs_gives_the_same_with_one_layer_in_memory(
    made: tuple[PreTrainedModel, Held],
) -> None:
    model, weights = made
    ids, most = torch.arange(5)[None], [0]

    def read(names: Sequence[str]) -> dict[str, Tensor]:
        held = [name for name, value in weights.plain.state_dict().items() if not value.is_meta]
        most[0] = max(most[0], len(held) + len(names))
        return weights.part(names)

    with torch.no_grad(), read_while_running(weights.plain, read, CPU):
        found = weights.plain.eval()(input_ids=ids, use_cache=False).logits
    assert torch.equal(found, model(input_ids=ids, use_cache=False).logits)
    assert all(value.is_meta for value in weights.plain.state_dict().values())
    assert most[0] == max(map(len, parts_of(model).values()))


def test_files_are_read_back_part_by_part_and_a_changed_weight_is_named(
    made: tuple[PreTrainedModel, Held], tmp_path: Path
) -> None:
    _, weights = made
    weights.plain.config.save_pretrained(tmp_path)
    for file, tensors, index in weights.files("20KB"):
        write_file(tmp_path, file, tensors, index)
    names, read = weights.file_names(), reader(weights.plain, str(tmp_path))
    changed = next(iter(names))

    def part(wanted: Sequence[str]) -> dict[str, Tensor]:
        return read(names[next(part for part, own in weights.parts.items() if wanted[0] in own)])

    assert not weights.unequal(weights.plain, part)
    first = weights.parts[changed][0]
    weights.values[first].view(-1)[0] += 1
    for _ in weights.files("20KB"):
        pass
    assert weights.unequal(weights.plain, part) == [first]


def test_a_model_that_uses_weights_of_a_layer_without_running_the_layer_is_refused(tmp_path: Path) -> None:
    pretrained = tiny_pretrained(tmp_path)
    plain = architecture(load_architecture(pretrained), torch.float32)
    kind = type(plain.model.layers[0])

    class Apart(kind):
        """Runs as a function of its caller, so that no hook of it is called."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.forward(*args, **kwargs)

    for layer in plain.model.layers:
        assert isinstance(layer, nn.Module)
        layer.__class__ = Apart
    with pytest.raises(InputError, match="a copy with fewer layers does not run"):
        check_parts(plain)
