"""A frozen base in bfloat16 under float32 adapters: the same model, in half the memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_sft import SFTModule
from lightning_sft.data.batches.collate import collate
from lightning_sft.demos import tiny_model, tiny_tokenizer
from lightning_sft.main import main
from lightning_sft.model.tuning.adapters import Lora, is_adapter, merge
from lightning_sft.types import InputError
from tests.helpers.gradients import ROWS, encoded, furthest
from tests.model.tuning.test_adapter_checkpoints import fit

Make = Callable[..., Trainer]


def stored(folder: Path, dtype: torch.dtype, **config: Any) -> str:
    tiny_model(**config).to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def base(tmp_path: Path) -> str:
    """One that is stored in bfloat16."""
    return stored(tmp_path / "bfloat16", torch.bfloat16)


def configured(make: Make, pretrained: str, precision: str = "bf16-mixed", **settings: Any) -> SFTModule:
    module = SFTModule(pretrained, **{"lora": Lora(r=4), **settings})
    module.trainer = make(precision=precision)
    with module.trainer.precision_plugin.module_init_context():
        module.configure_model()
    return module


def dtypes(module: SFTModule) -> tuple[set[torch.dtype], set[torch.dtype]]:
    """Of what is frozen, and of what is trained."""
    frozen, trained = ({p.dtype for p in module.parameters() if p.requires_grad is on} for on in (False, True))
    return frozen, trained


@pytest.mark.parametrize("lora", [Lora(r=4), Lora(r=4, dora=True)], ids=["lora", "dora"])
def test_only_what_is_frozen_is_bfloat16(quiet_trainer: Make, base: str, lora: Lora) -> None:
    trained = {"new_tokens": ["<|a|>"], "trained": ["*norm*"]}
    module = configured(quiet_trainer, base, lora=lora, **trained)
    assert dtypes(module) == ({torch.bfloat16}, {torch.float32})
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    for kind in ("lora_A", "new_rows", "layernorm.weight"):
        assert any(kind in name for name in names)
    assert {buffer.dtype for name, buffer in module.named_buffers() if "inv_freq" in name} == {torch.float32}


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "64-true"])
def test_other_precisions_keep_their_own(quiet_trainer: Make, base: str, precision: str) -> None:
    own = torch.float64 if precision == "64-true" else torch.float32
    if precision == "16-mixed":
        module = SFTModule(base, lora=Lora(r=4))
        module.configure_model()
    else:
        module = configured(quiet_trainer, base, precision)
    assert dtypes(module) == ({own}, {own})


def test_what_is_not_stored_in_bfloat16_is_rounded_only_when_asked(
    tmp_path: Path, quiet_trainer: Make, base: str, caplog: Any
) -> None:
    mixed = AutoModelForCausalLM.from_pretrained(base)
    mixed.model.norm.float()
    mixed.save_pretrained(tmp_path / "mixed")
    tiny_tokenizer().save_pretrained(tmp_path / "mixed")
    whole, half = stored(tmp_path / "float32", torch.float32), stored(tmp_path / "float16", torch.float16)
    for pretrained in (whole, half, str(tmp_path / "mixed")):
        caplog.clear()
        with caplog.at_level("INFO"):
            module = configured(quiet_trainer, pretrained)
        assert "model.lora.base_dtype=bfloat16 rounds it and halves its memory" in caplog.text
        assert dtypes(module) == ({torch.float32}, {torch.float32})
        plain = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32).model.layers[0].mlp.up_proj.weight
        assert torch.equal(module.model.model.layers[0].mlp.up_proj.base_layer.weight, plain)
        caplog.clear()
        asked = configured(quiet_trainer, pretrained, lora=Lora(r=4, base_dtype="bfloat16"))
        assert "halves its memory" not in caplog.text
        assert dtypes(asked) == ({torch.bfloat16}, {torch.float32})
    with caplog.at_level("INFO"):
        asked = configured(quiet_trainer, base, lora=Lora(base_dtype="float32"))
    assert dtypes(asked) == ({torch.float32}, {torch.float32})
    assert "halves its memory" not in caplog.text


def test_shards_are_looked_into_too(tmp_path: Path, quiet_trainer: Make) -> None:
    model = tiny_model().bfloat16()
    model.lm_head.float()
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert dtypes(configured(quiet_trainer, str(tmp_path)))[0] == {torch.float32}
    model.bfloat16().save_pretrained(tmp_path, max_shard_size="5KB")
    assert dtypes(configured(quiet_trainer, str(tmp_path)))[0] == {torch.bfloat16}


def randomized(module: SFTModule) -> SFTModule:
    """With adapters that are not 0, as they would be before the first step."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def gradients(module: SFTModule) -> list[Tensor]:
    return [p.grad.double() for p in module.parameters() if p.requires_grad]


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    a, b = (torch.cat([gradient.flatten() for gradient in each]) for each in (found, wanted))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("dora", [False, True])
def test_gradients_of_adapters_are_those_of_the_formula(quiet_trainer: Make, base: str, dora: bool) -> None:
    lora = Lora(r=4, dora=dora)
    module = randomized(configured(quiet_trainer, base, lora=lora))
    with torch.autocast("cpu", torch.bfloat16):
        module(collate(encoded(base))).total.neg().backward()
    reference = randomized(configured(quiet_trainer, base, "32-true", lora=lora)).double()
    for example in encoded(base):
        log_probs = reference.model(input_ids=torch.tensor(example.input_ids)[None].long()).logits[0].log_softmax(-1)
        pairs = enumerate(zip(example.input_ids, example.target_weights, strict=True))
        sum(-weight * log_probs[i - 1, token] for i, (token, weight) in pairs if weight > 0).backward()
    assert {p.grad.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    whole = randomized(configured(quiet_trainer, base, lora=replace(lora, base_dtype="float32")))
    with torch.autocast("cpu", torch.bfloat16):
        whole(collate(encoded(base))).total.neg().backward()
    errors = [distance(gradients(found), gradients(reference)) for found in (module, whole)]
    assert errors[0] < 1.5 * errors[1] + 0.01  # products are rounded to bfloat16 in both
    module.zero_grad()
    module.float()(collate(encoded(base))).total.neg().backward()
    assert furthest(gradients(module), gradients(reference)) < 1e-4


def test_adapters_begin_with_the_same_values_whatever_the_base_is_held_in(quiet_trainer: Make, base: str) -> None:
    for lora in (Lora(), Lora(dora=True), Lora(init="gaussian")):
        modules = [configured(quiet_trainer, base, precision, lora=lora) for precision in ("bf16-mixed", "32-true")]
        first, second = ({n: p for n, p in m.named_parameters() if p.requires_grad} for m in modules)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_experts_get_adapters_over_bfloat16_too(tmp_path: Path, quiet_trainer: Make) -> None:
    settings = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    base = stored(tmp_path, torch.bfloat16, model_type="mixtral", **settings)
    module = randomized(configured(quiet_trainer, base))
    assert dtypes(module) == ({torch.bfloat16}, {torch.float32})
    with torch.autocast("cpu", torch.bfloat16):
        module(collate(encoded(base))).total.neg().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.requires_grad)
    assert any(p.grad.any() for n, p in module.named_parameters() if p.requires_grad and "experts" in n)


def test_the_first_step_begins_at_the_pretrained_model(quiet_trainer: Make, base: str) -> None:
    ids = torch.arange(40)[None]
    for lora in (Lora(), Lora(dora=True)):
        module = configured(quiet_trainer, base, lora=lora).float()
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        assert torch.allclose(module.model(ids).logits, plain(ids).logits, atol=1e-6)


def test_adapters_of_one_input_keep_one_tensor_of_it(quiet_trainer: Make, base: str) -> None:
    """Cast to float32 for its adapter and back by autocast, the input of query, key and value would be kept 3 times."""
    module = configured(quiet_trainer, base, lora=Lora(r=4, targets=["q_proj", "k_proj", "v_proj"]))
    attention = module.model.model.layers[0].self_attn
    x = torch.randn(1, 7, 16, dtype=torch.bfloat16)
    kept: list[Tensor] = []
    pack = torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor)
    with pack, torch.autocast("cpu", torch.bfloat16):
        outputs = [getattr(attention, name)(x) for name in ("q_proj", "k_proj", "v_proj")]
    assert {output.dtype for output in outputs} == {torch.bfloat16}
    assert len({tensor.data_ptr() for tensor in kept if tensor.numel() == x.numel()}) == 1


def test_a_run_resumes_bit_for_bit_and_its_merged_model_has_the_logits_that_were_trained(
    tmp_path: Path, quiet_trainer: Make, base: str, jsonl: Any
) -> None:
    make = partial(quiet_trainer, precision="bf16-mixed")
    settings = {"new_tokens": ["<|a|>"], "trained": ["*norm*"]}
    whole = fit(make, base, tmp_path / "one", **settings)
    ckpt = tmp_path / "one" / "step=3.ckpt"
    resumed = fit(make, base, tmp_path / "two", ckpt_path=ckpt, **settings)
    assert {value.dtype for value in whole.values()} == {torch.bfloat16, torch.float32}
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    fit(quiet_trainer, base, tmp_path / "three", ckpt_path=ckpt, max_steps=4, **settings)  # in float32: the same base
    trained = SFTModule.load_from_checkpoint(ckpt, weights_only=True).eval()
    out = main(["export", "--ckpt", str(ckpt), "--out", str(tmp_path / "out"), "--rows", jsonl(ROWS)])
    exported, ids = AutoModelForCausalLM.from_pretrained(out, dtype="auto"), torch.arange(40)[None]
    assert exported.dtype == torch.float32
    assert torch.allclose(exported(ids).logits, trained.model(ids).logits, atol=1e-5)


def test_a_base_that_was_rounded_is_merged_as_it_was_trained_on(
    tmp_path: Path, quiet_trainer: Make, jsonl: Any
) -> None:
    pretrained = stored(tmp_path / "float32", torch.float32)
    lora = Lora(r=4, base_dtype="bfloat16")
    fit(partial(quiet_trainer, precision="bf16-mixed"), pretrained, tmp_path / "run", max_steps=3, lora=lora)
    ckpt = tmp_path / "run" / "step=3.ckpt"
    module = SFTModule.load_from_checkpoint(ckpt, weights_only=True).eval().float()
    out = main(["export", "--ckpt", str(ckpt), "--out", str(tmp_path / "out"), "--rows", jsonl(ROWS)])
    exported = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    layers = exported.model.layers[0], AutoModelForCausalLM.from_pretrained(pretrained).model.layers[0]
    assert torch.equal(layers[0].input_layernorm.weight, layers[1].input_layernorm.weight.bfloat16().float())
    with torch.no_grad():
        ids = torch.arange(40)[None]
        assert torch.allclose(merge(module.model)(ids).logits, exported(ids).logits, atol=1e-5)
    assert torch.equal(exported.model.embed_tokens.weight, module.model.model.embed_tokens.weight)
    assert not any(is_adapter(name) for name, _ in module.model.named_parameters())


@pytest.mark.parametrize(
    ("precision", "settings", "message"),
    [
        ("bf16-mixed", {"lora": Lora(base_dtype="bfloat16"), "quantize": "4bit"}, "Remove one of them"),
        ("bf16-true", {"lora": Lora(base_dtype="float32")}, "casts the whole model, so model.lora.base_dtype=float32"),
    ],
)
def test_a_dtype_that_cannot_be_is_refused(
    quiet_trainer: Make, base: str, precision: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        configured(quiet_trainer, base, precision, **settings)
