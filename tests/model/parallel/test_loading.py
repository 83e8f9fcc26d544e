"""Ranks that read their shards have what one process loads, bit for bit."""

from __future__ import annotations

import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_sft import SFTModule
from lightning_sft.demos import tiny_model, tiny_pretrained
from lightning_sft.export.convert import export_checkpoint
from lightning_sft.machine.contexts import blocks, default_dtype
from lightning_sft.model.attention.choice import probed
from lightning_sft.model.backbone import backbone_and_head
from lightning_sft.model.parallel.loading import cut_down, empty_model, fill
from lightning_sft.model.pretrained import load_model
from lightning_sft.model.tuning.adapters import Lora
from lightning_sft.model.tuning.packed import unpack
from lightning_sft.model.tuning.tuning import TuningConfig
from lightning_sft.types import InputError
from tests.helpers import loading
from tests.helpers.hybrids import HYBRIDS
from tests.helpers.loading import CASES, launched, packed_of, shown
from tests.helpers.splitting import ARCHITECTURES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ranks had when training started, and their checkpoints."""
    return launched(loading, tmp_path_factory.mktemp("loading"))


def whole(name: str, folder: Path) -> dict[str, Any]:
    """The same of a model that one process has loaded."""
    case = CASES[name]
    module = SFTModule(str(folder / name), **case.model)
    with default_dtype(torch.bfloat16 if case.precision == "bf16-true" else torch.float32):
        module.configure_model()
    unpack(module, torch.float32, torch.device("cpu"))  # which leaves a model alone that is not quantized
    numel = sum(parameter.numel() for parameter in module.parameters())
    return shown(module, module.state_dict(), packed_of(module), numel)


@pytest.mark.parametrize("name", CASES)
def test_ranks_that_read_their_shards_have_what_one_process_loads(name: str, folder: Path) -> None:
    found, wanted = torch.load(folder / f"{name}.pt", weights_only=False), whole(name, folder)
    assert bool(wanted["packed"]) == ("quantize" in CASES[name].model)
    tensors, others = (
        ("state", "buffers", "base", "packed"),
        ("trained", "tied", "findings", "attention", "routers", "config"),
    )
    for kind in tensors:
        assert list(found[kind]) == list(wanted[kind])
        for key, value in wanted[kind].items():
            assert torch.equal(found[kind][key].to(value.dtype), value), key
    assert {key: found[key] for key in others} == {key: wanted[key] for key in others}
    assert found["numel"] < 0.6 * wanted["numel"]


@pytest.mark.parametrize("name", ["tied", "experts", "tensor", "tensor, of an odd size"])
def test_an_export_before_the_first_step_has_the_tensors_of_the_pretrained_files(name: str, folder: Path) -> None:
    out = export_checkpoint(folder / f"{name}.ckpt", folder / f"{name}.exported")
    found, wanted = (load_file(path / "model.safetensors") for path in (out, folder / name))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


def emptied(folder: Path, architecture: str = "llama", **config: Any) -> Any:
    return empty_model(tiny_pretrained(folder, architecture, **config), None, torch.float32)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_probes_find_in_a_small_copy_what_they_find_in_the_model(name: str, tmp_path: Path) -> None:
    architecture, config = ARCHITECTURES[name]
    sizes = {"num_attention_heads": 4, "num_hidden_layers": 4, "vocab_size": 600}
    path = tiny_pretrained(tmp_path, architecture, **sizes | config)
    whole, small = load_model(path), cut_down(empty_model(path, None, torch.float32))
    found, wanted = (probed(model, *backbone_and_head(model)) for model in (small, whole))
    assert found == wanted


def test_a_small_copy_has_a_layer_of_each_kind_and_a_part_of_the_vocabulary(tmp_path: Path) -> None:
    model = emptied(tmp_path, "gemma3_text", num_hidden_layers=12, vocab_size=70_000, tie_word_embeddings=True)
    before = deepcopy(model.config.to_dict())
    small = cut_down(model)
    assert len(blocks(small)) == 6  # the sixth is the first without a window
    assert small.get_input_embeddings().weight.shape == (512, 16)
    assert small.get_output_embeddings().weight is small.get_input_embeddings().weight
    assert (len(blocks(model)), model.config.to_dict()) == (12, before)
    assert all(parameter.is_meta for parameter in model.parameters())


def without_head(folder: Path) -> str:
    path = tiny_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return path


def with_more(folder: Path) -> str:
    path = tiny_pretrained(folder)
    tensors = load_file(folder / "model.safetensors") | {"v_head.weight": torch.ones(3)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("damaged", [without_head, with_more])
def test_files_that_lack_weights_or_have_more_are_refused_as_by_one_process(damaged: Any, tmp_path: Path) -> None:
    path = damaged(tmp_path)
    with pytest.raises(InputError) as wanted:
        load_model(path)
    with pytest.raises(InputError) as found:
        fill(empty_model(path, None, torch.float32), path, torch.device("cpu"), False)
    assert str(found.value) == str(wanted.value)


def stored_twice(folder: Path) -> str:
    path = tiny_pretrained(folder, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.ones(264, 16)}, folder / "model.safetensors", {"format": "pt"})
    return path


def joined(folder: Path) -> str:
    """Its convolutions of queries, keys and values are stored apart, and are one weight of the model."""
    return tiny_pretrained(folder, "olmo_hybrid", **HYBRIDS["olmo_hybrid"])


def pickled(folder: Path) -> str:
    path = tiny_pretrained(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return path


@pytest.mark.parametrize(
    ("save", "tuning", "why"),
    [
        (stored_twice, TuningConfig(), "its embeddings and head are tied, but both are in its files"),
        (joined, TuningConfig(), "its parts are put together by Concatenate along the dimension that is sharded"),
        (pickled, TuningConfig(), "it has no safetensors files"),
        (tiny_pretrained, TuningConfig(lora=Lora(dora=True)), "model.lora.dora computes magnitudes of its matrices"),
        (tiny_pretrained, TuningConfig(new_tokens=["<a>"]), "model.new_tokens changes its embeddings"),
    ],
)
def test_a_model_that_is_loaded_whole_says_why(
    save: Any, tuning: TuningConfig, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path)
    with caplog.at_level(logging.INFO):
        assert tuning._empty(path, None, torch.float32, True, None) is None
    assert f"Each rank loads the whole of '{path}' before it is sharded: {why}." in caplog.text


def test_an_architecture_whose_copy_with_fewer_layers_fails_is_loaded_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needs_its_layers(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.layers[7]

    path = tiny_pretrained(tmp_path, num_hidden_layers=8)
    monkeypatch.setattr(type(tiny_model().model), "forward", needs_its_layers)
    with pytest.raises(InputError, match=r"a copy with fewer layers does not run \(IndexError: "):
        empty_model(path, None, torch.float32)
