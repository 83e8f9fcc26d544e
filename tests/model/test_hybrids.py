"""Models with recurrent layers: packed documents are computed as if each were alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_sft import SFTModule
from lightning_sft.data.batches.collate import collate
from lightning_sft.demos import tiny_model, tiny_pretrained
from lightning_sft.machine.contexts import blocks
from lightning_sft.model import recurrence
from lightning_sft.model.attention.choice import probed
from lightning_sft.model.backbone import backbone_and_head, hidden_states
from lightning_sft.model.pretrained import config_dict, model_from_config
from lightning_sft.model.probes import ProbeResult, probe
from lightning_sft.model.tuning.adapters import Lora
from lightning_sft.training.checks import keeps_documents_apart
from lightning_sft.types import Example
from tests.helpers import parallel
from tests.helpers.gradients import encoded, fit, furthest, row_gradients, step_gradients
from tests.helpers.hybrids import HYBRIDS, LEAKY, all_in_float64

SIX = list(HYBRIDS)[:6]
LENGTHS = (9, 20, 3, 1, 15)


def chosen(kind: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, ProbeResult]:
    model = tiny_model(kind, **HYBRIDS[kind]).to(dtype)
    return model, probed(model, *backbone_and_head(model))[1]


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (1, length), generator=generator) for length in LENGTHS]


def packed(model: PreTrainedModel, rows: list[list[Tensor]]) -> Tensor:
    """Logits of rows of documents, ``[T, V]``."""
    backbone, head = backbone_and_head(model)
    positions = [torch.cat([torch.arange(d.shape[1]) for d in row]) for row in rows]
    ids = torch.cat([torch.cat(row, 1) for row in rows])
    return head(hidden_states(backbone, ids, torch.stack(positions))).flatten(0, 1)


def alone(model: PreTrainedModel) -> Tensor:
    """Logits of each document by itself, computed by plain transformers, ``[T, V]``."""
    backbone, head = backbone_and_head(model)
    return torch.cat([head(backbone(input_ids=d, use_cache=False).last_hidden_state[0]) for d in documents()])


def gradients(model: PreTrainedModel, logits: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=logits.dtype)
    model.zero_grad()
    (logits * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= tolerance * gradient.abs().max(), name


@pytest.mark.parametrize("kind", HYBRIDS)
def test_packed_documents_have_the_logits_and_gradients_of_each_alone(kind: str) -> None:
    with all_in_float64():
        model, findings = chosen(kind, torch.float64)
        assert findings.isolates_documents
        found, wanted = packed(model, [documents()]), alone(model)
        assert (found - wanted).abs().max() <= 1e-10 * wanted.abs().max()
        assert_equal(gradients(model, found), gradients(model, wanted), 1e-10)


@pytest.mark.parametrize("kind", SIX)
def test_in_float32_they_agree_to_rounding(kind: str) -> None:
    model, _ = chosen(kind)
    found, wanted = packed(model, [documents()]), alone(model)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert_equal(gradients(model, found), gradients(model, wanted), 1e-5)


def test_documents_of_several_rows_are_kept_apart() -> None:
    model, _ = chosen("qwen3_5_text")
    nine, twenty, three, one, fifteen = documents()
    rows = [[nine, fifteen], [twenty, three, one]]  # of 24 tokens each
    order = torch.cat([torch.arange(9), torch.arange(33, 48), torch.arange(9, 33)])
    torch.testing.assert_close(packed(model, rows), alone(model)[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", SIX)
def test_without_the_layers_taking_borders_documents_see_each_other_in_them(kind: str) -> None:
    model = tiny_model(kind, **HYBRIDS[kind])
    model.set_attn_implementation("per_document")
    findings = probe(model, *backbone_and_head(model))
    assert not findings.isolates_documents
    assert [findings.leaks_in] == recurrence.separate(backbone_and_head(model)[0])


@pytest.mark.parametrize("kind", LEAKY)
def test_the_layer_in_which_documents_see_each_other_is_named(kind: str) -> None:
    settings, layer = LEAKY[kind]
    model = tiny_model(kind, **settings)
    backbone, head = backbone_and_head(model)
    recurrence.separate(backbone)
    assert probe(model, backbone, head).leaks_in == layer


@pytest.mark.parametrize("kind", ["qwen3_5_text", "bamba"])
def test_a_fit_packs_them_and_its_steps_are_those_of_plain_transformers(kind: str, tmp_path: Path) -> None:
    pretrained = tiny_pretrained(tmp_path, kind, **HYBRIDS[kind])
    run = fit(pretrained, {"tokens_per_batch": 150}, accumulate_grad_batches=2, precision="64-true")
    assert max(map(len, run.consumed)) > 1
    rows = row_gradients(pretrained, encoded(pretrained), torch.float64)
    wanted = step_gradients(rows, [run.consumed], 2)
    assert furthest(run.gradients, wanted) <= 1e-6  # their recurrent layers compute in float32 at any precision


def test_where_documents_are_padded_the_warning_names_the_layer(tmp_path: Path) -> None:
    settings, layer = LEAKY["jamba"]
    module = SFTModule(tiny_pretrained(tmp_path, "jamba", **settings))
    module.configure_model()
    with pytest.warns(UserWarning, match=rf"documents packed into one row see each other in {layer} "):
        assert not keeps_documents_apart(module)


def test_what_was_done_is_said(tmp_path: Path) -> None:
    module = SFTModule(tiny_pretrained(tmp_path, "qwen3_5_text", **HYBRIDS["qwen3_5_text"]))
    module.configure_model()
    said = "packed documents apart: Qwen3_5GatedDeltaNet computes documents of similar length together"
    assert said in str(module.attention)


def trained_gradients(pretrained: str, compiled: bool = False, **settings: Any) -> list[Tensor]:
    """Of all parameters that are trained, on one pack."""
    module = SFTModule(pretrained, **settings)
    module.configure_model()
    assert module.model is not None
    for name, parameter in module.named_parameters():
        if "lora_B" in name:  # begins with zeros, which let no gradient through to A
            nn.init.constant_(parameter, 0.01)
    if compiled:
        for layer in blocks(module.model):
            layer.compile(backend="aot_eager", dynamic=True)
    for number in (3, 1, 5):  # of documents: the second pack has no layout, the third has another one
        module.zero_grad()
        examples = [Example(d[0], [0.0] + [1.0] * (d.shape[1] - 1)) for d in documents()[:number]]
        module(collate(examples)).total.neg().backward()
    return [p.grad for p in module.parameters() if p.requires_grad and p.grad is not None]


@pytest.mark.parametrize("kind", SIX)
def test_adapters_on_projections_and_recomputed_layers_have_the_same_gradients(kind: str, tmp_path: Path) -> None:
    pretrained = tiny_pretrained(tmp_path, kind, **HYBRIDS[kind])
    lora = {"lora": Lora(r=2)}
    kept, again = (trained_gradients(pretrained, gradient_checkpointing=setting, **lora) for setting in (False, True))
    assert len(kept) > 1
    for a, b in zip(again, kept, strict=True):
        assert a.abs().max() > 0
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch, of the inputs of what follows a graph break
@pytest.mark.parametrize("kind", ["lfm2", "falcon_h1", "qwen3_5_text"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_have_the_same_gradients(kind: str, checkpointing: bool, tmp_path: Path) -> None:
    pretrained = tiny_pretrained(tmp_path, kind, **HYBRIDS[kind])
    torch.compiler.reset()
    eager = trained_gradients(pretrained)
    compiled = trained_gradients(pretrained, compiled=True, gradient_checkpointing=checkpointing)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_generation_is_that_of_the_model_alone() -> None:
    model, _ = chosen("qwen3_5_text")
    plain = tiny_model("qwen3_5_text", **HYBRIDS["qwen3_5_text"])
    ids = documents()[0]
    one, other = (m.eval().generate(ids, max_new_tokens=8, do_sample=False, use_cache=True) for m in (model, plain))
    assert torch.equal(one, other)


def convolved(states: Tensor, weight: Tensor, bias: None, activation: str, seq_idx: Tensor, **_: Any) -> Tensor:
    """The causal convolution of a kernel that takes ``seq_idx``, ``[1, C, T]`` to the same."""
    assert seq_idx.dtype == torch.int32
    assert seq_idx.shape == (1, states.shape[2])
    size, out = weight.shape[1], torch.zeros_like(states)
    for back in range(size):
        moved = nn.functional.pad(states, (back, 0))[..., : states.shape[2]]
        before = nn.functional.pad(seq_idx, (back, 0), value=-1)[:, : states.shape[2]]
        out = out + moved * (before == seq_idx) * weight[None, :, size - 1 - back, None]
    assert activation == "silu"
    return nn.functional.silu(out)


@pytest.mark.parametrize("knows", [True, False])
def test_kernels_get_the_borders_where_they_keep_to_them(monkeypatch: pytest.MonkeyPatch, knows: bool) -> None:
    """Kernels written in torch stand in for those of GPUs; one that ignores the borders is not given them."""
    kind, used = "qwen3_5_text", []
    modeling = sys.modules[type(tiny_model(kind, **HYBRIDS[kind])).__module__]
    by_torch = modeling.torch_chunk_gated_delta_rule

    def delta_rule(query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor, **kwargs: Any) -> Any:
        bounds = kwargs.pop("cu_seqlens")
        kwargs.pop("seq_idx", None)
        if bounds is None:
            return by_torch(query, key, value, g=g, beta=beta, **kwargs)
        used.append(bounds.tolist())
        lengths = bounds.diff().tolist() if knows else [query.shape[1]]
        pieces = zip(*(x.split(lengths, 1) for x in (query, key, value, g, beta)), strict=True)
        return torch.cat([by_torch(q, k, v, g=g, beta=b, **kwargs)[0] for q, k, v, g, b in pieces], 1), None

    plain = modeling.causal_conv1d_fn

    def convolve(*args: Any, **more: Any) -> Any:
        return (convolved if more.get("seq_idx") is not None else plain)(*args, **more)

    monkeypatch.setattr(modeling, "causal_conv1d_fn", convolve)
    monkeypatch.setattr(modeling, "torch_chunk_gated_delta_rule", delta_rule)
    monkeypatch.setattr(recurrence, "has_kernels", lambda device: True)
    model = tiny_model(kind, **HYBRIDS[kind])
    backbone, head = backbone_and_head(model)
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            nn.init.constant_(parameter, -2.0)  # slow decay, so that a state outlives its document
    assert probed(model, backbone, head)[1].isolates_documents
    used.clear()
    found = packed(model, [documents()])
    assert used == ([[0, 9, 29, 32, 33, 48]] if knows else [])
    torch.testing.assert_close(found, alone(model), rtol=1e-5, atol=1e-5)
    assert ("passes their borders to its kernels" in recurrence.described(backbone)) is knows


@pytest.mark.parametrize("kind", HYBRIDS)
def test_the_architecture_in_a_checkpoint_is_that_of_the_model(kind: str) -> None:
    """The maximum time step of Mamba is infinite, and JSON cannot represent that."""
    model = tiny_model(kind, **HYBRIDS[kind])
    again = model_from_config(json.loads(json.dumps(config_dict(model), allow_nan=False)))
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    before, after = config_dict(model), config_dict(again)
    assert {name for name in before if after[name] != before[name]} <= {"dtype", "use_cache"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_5_text", "bamba"])
def test_two_processes_take_the_steps_of_one(kind: str, tmp_path: Path) -> None:
    pretrained = tiny_pretrained(tmp_path / "model", kind, **HYBRIDS[kind])
    names = ["ddp", "fsdp2", "checkpointing"]
    parallel.run(pretrained, "single", tmp_path)
    parallel.launch(names, pretrained, tmp_path)
    for name in names:
        shown = parallel.measured(name, tmp_path)
        assert all(shown.values()), (name, shown)
