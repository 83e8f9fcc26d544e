"""Kernels of layers: what is chosen when, that they compute the same, and that other models are left alone."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch._dynamo.utils import counters
from transformers.models.llama import modeling_llama

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.demos import tiny_model
from lightning_sft.model import kernels
from lightning_sft.model.backbone import backbone_and_head, hidden_states
from lightning_sft.model.kernels import COMPILES_FROM, KERNELS_KEY, Kernels
from lightning_sft.model.recompute import checkpoint_layers
from lightning_sft.types import InputError
from tests.helpers.slow import slow_but

POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
Make = Callable[..., Trainer]


@pytest.fixture(autouse=True)
def dynamo() -> Iterator[None]:
    """Settings of torch.compile are what they were after a test."""
    of_functorch = torch._functorch.config.patch(graphsafe_rng_functionalization=True)
    with torch._dynamo.config.patch(suppress_errors=False, recompile_limit=8), of_functorch:
        yield
    torch.compiler.reset()


def losses(trainer: Trainer, pretrained: str, rows: Any, asked: Any, **settings: Any) -> tuple[SFTModule, float]:
    module = SFTModule(pretrained, kernels=asked)
    trainer.fit(module, SFTDataModule(train=rows, tokens_per_batch=100), **settings)
    return module, trainer.callback_metrics["train/loss"].item()


# dynamo looks at the .grad of whatever it traces
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize("precision", slow_but(["bf16-mixed"], ["32-true", "bf16-mixed"]))
def test_compiled_layers_train_as_eager_ones_do(
    pretrained: str,
    quiet_trainer: Make,
    rows: list[dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    precision: str,
) -> None:
    compiled: list[str] = []

    def compile_by_aot(layer: Any, **settings: Any) -> None:  # inductor's C++ takes minutes: the slow test has it
        compiled.append(type(layer).__name__)
        layer._compiled_call_impl = torch.compile(layer._call_impl, backend="aot_eager", **settings)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_by_aot)
    monkeypatch.setattr(kernels, "compiler_missing", lambda on_gpu: None)
    counters.clear()
    _, eager = losses(quiet_trainer(max_epochs=2, precision=precision), pretrained, rows, "none")
    assert not compiled
    module, as_compiled = losses(quiet_trainer(max_epochs=2, precision=precision), pretrained, rows, "compiled")
    assert compiled == ["LlamaDecoderLayer"] * 2
    assert module.kernels.name == "compiled"
    assert counters["aot_autograd"]["ok"] > 0
    assert "WON'T CONVERT" not in caplog.text  # what torch logs of a frame that it leaves as it is
    assert as_compiled == pytest.approx(eager, rel=1e-6 if precision == "32-true" else 1e-2)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
def test_layers_that_cannot_be_compiled_run_as_written(
    pretrained: str,
    quiet_trainer: Make,
    rows: list[dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tried: list[str] = []
    log = logging.getLogger("torch._dynamo.convert_frame")  # of torch 2.10, it tells no other logger
    monkeypatch.setattr(log, "handlers", [*log.handlers, caplog.handler])

    def broken(graph: Any, inputs: Any) -> Any:
        tried.append("compiled")
        raise RuntimeError("no compiler works here")

    def compile_by_broken(layer: Any, **settings: Any) -> None:
        layer._compiled_call_impl = torch.compile(layer._call_impl, backend=broken, **settings)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_by_broken)
    monkeypatch.setattr(kernels, "compiler_missing", lambda on_gpu: None)
    _, eager = losses(quiet_trainer(max_steps=2), pretrained, rows, "none")
    _, fallen_back = losses(quiet_trainer(max_steps=2), pretrained, rows, "compiled")
    assert tried
    assert "WON'T CONVERT" in caplog.text
    assert fallen_back == pytest.approx(eager, rel=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
def test_layers_of_two_kinds_in_training_and_validation_all_have_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, **how: stock(layer, backend="eager", **how))
    monkeypatch.setattr(kernels, "compiler_missing", lambda on_gpu: None)
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
    module = faked("cpu")
    module.model = tiny_model("gemma3_text", num_hidden_layers=4, sliding_window=4, layer_types=kinds)
    module.model.set_attn_implementation("per_document")
    checkpoint_layers(module.model, 2, "cpu")
    Kernels("compiled").begin(module)
    torch._dynamo.reset()
    counters.clear()
    for is_training in (True, False):
        module.model.train(is_training)
        for lengths in ([9, 9], [18], [9, 9, 18]):
            positions = torch.cat([torch.arange(n) for n in lengths])[None]
            with torch.set_grad_enabled(is_training):
                hidden_states(module.model.model, positions, positions, tuple(lengths))
    assert counters["frames"]["total"] == counters["frames"]["ok"] > 8


def test_random_numbers_of_compiled_layers_follow_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the setting of torch, a GPU's have generators of their own, seeded once a process."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, **how: None)
    monkeypatch.setattr(kernels, "compiler_missing", lambda on_gpu: None)
    module = faked("cpu")
    module.model = tiny_model()
    Kernels("compiled").begin(module)
    assert not torch._functorch.config.graphsafe_rng_functionalization


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize(("checkpointing", "times"), [(2, 3), *slow_but([], [(False, 2), (True, 4)])])
def test_layers_are_compiled_and_computed_again_as_often_as_asked(
    checkpointing: Any, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "compiler_missing", lambda on_gpu: None)
    model = tiny_model("llama").train()  # of two layers
    model.set_attn_implementation("per_document")
    checkpoint_layers(model, checkpointing, "cpu")
    module = SimpleNamespace(model=model, device=torch.device("cpu"), gradient_checkpointing=checkpointing)
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.Module, "compile", by_aot)
        assert kernels._compile(module) is None

    def step() -> None:
        hidden_states(
            backbone_and_head(model)[0], torch.ones(1, 9, dtype=torch.int64), POSITIONS, (5, 4)
        ).sum().backward()

    counters.clear()
    step()  # compiles, which calls the operator for its shapes
    with torch.profiler.profile() as profile:
        step()
    assert counters["aot_autograd"]["ok"] > 0
    assert not counters["graph_break"]
    assert sum(event.name == "lightning_sft::packed_attention" for event in profile.events()) == times


def test_layers_whose_inputs_are_offloaded_are_not_said_to_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "compiler_missing", lambda on_gpu: None)
    monkeypatch.setattr(kernels, "_try_liger", lambda module: None)
    module = faked()
    module.gradient_checkpointing = "offload"
    own = Kernels("auto")
    own.begin(module)
    assert own.name == "liger"
    assert "not compiled, because torch does not compile layers whose inputs are offloaded" in own.why
    with pytest.raises(InputError, match=r"model\.gradient_checkpointing=offload"):
        Kernels("compiled").begin(module)


def by_aot(layer: Any, **settings: Any) -> None:
    """As torch.nn.Module.compile, without inductor, whose C++ takes minutes."""
    layer._compiled_call_impl = torch.compile(layer._call_impl, backend="aot_eager", **settings)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's imports
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
def test_layers_compiled_by_inductor_train_as_eager_ones_do(
    pretrained: str, quiet_trainer: Make, rows: list[dict[str, str]]
) -> None:
    _, eager = losses(quiet_trainer(max_epochs=2), pretrained, rows, "none")
    _, compiled = losses(quiet_trainer(max_epochs=2), pretrained, rows, "compiled")
    assert compiled == pytest.approx(eager, rel=1e-5)


def faked(device: str = "cuda", steps: int = 1000, done: int = 0, **strategy: Any) -> Any:
    """A module at the start of its training, on a device that need not be here."""
    trainer = SimpleNamespace(
        callbacks=[],
        max_steps=steps,
        datamodule=None,
        estimated_stepping_batches=float("inf"),
        global_step=done,
        accumulate_grad_batches=2,
        strategy=SimpleNamespace(**strategy),
    )
    return SimpleNamespace(device=torch.device(device), trainer=trainer)


def chosen(
    monkeypatch: pytest.MonkeyPatch, module: Any, asked: Any = "auto", restored: Any = None, missing: Any = ()
) -> Kernels:
    monkeypatch.setattr(kernels, "_why_not", lambda name, _: "it is missing" if name in missing else None)
    found = Kernels(asked)
    found.restored = restored
    found.begin(module)
    return found


def test_auto_compiles_long_runs_on_gpus_and_nothing_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    enough = COMPILES_FROM // 2  # steps of two micro-batches
    assert chosen(monkeypatch, faked("cpu")).name == "none"
    assert chosen(monkeypatch, faked(steps=enough)).name == "compiled"
    assert chosen(monkeypatch, faked(steps=enough - 1)).name == "liger"
    assert chosen(monkeypatch, faked(steps=-1)).name == "compiled"  # nobody knows its end
    assert chosen(monkeypatch, faked(steps=enough, zero_stage_3=True)).name == "none"


def test_auto_takes_the_next_where_one_is_missing_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, faked(), missing={"compiled"}).name == "liger"
    found = chosen(monkeypatch, faked(), missing={"compiled", "liger"})
    assert found.name == "none"
    assert found.why.endswith("not compiled, because it is missing; not liger, because it is missing")


def test_what_was_asked_for_and_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InputError, match=r"model.kernels=liger is not available: it is missing. Set model.kernels=auto"
    ):
        chosen(monkeypatch, faked(), asked="liger", missing={"liger"})
    with pytest.raises(InputError, match=r"model.kernels is 'triton'; expected auto, compiled, liger or none"):
        SFTModule("anything", kernels="triton")  # type: ignore[arg-type]  # that is what is tested


def test_a_resumed_run_has_the_kernels_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    short = faked(steps=1000, done=990)
    assert chosen(monkeypatch, short).name == "liger"
    assert chosen(monkeypatch, short, restored="compiled").name == "compiled"
    with pytest.warns(UserWarning, match="kernels=compiled and resumes with none .* not bit for bit"):
        assert chosen(monkeypatch, short, restored="compiled", missing={"compiled"}).name == "none"
    with pytest.warns(UserWarning, match="kernels=compiled and resumes with none"):
        assert chosen(monkeypatch, short, asked="none", restored="compiled").name == "none"


def test_a_checkpoint_keeps_the_kernels(pretrained: str, quiet_trainer: Make, rows: Any, tmp_path: Any) -> None:
    def saving() -> Any:
        saver = ModelCheckpoint(tmp_path, filename="first", every_n_train_steps=1)
        return {"callbacks": [saver], "enable_checkpointing": True}

    losses(quiet_trainer(max_steps=1, **saving()), pretrained, rows, "auto")
    path = tmp_path / "first.ckpt"
    assert torch.load(path)[KERNELS_KEY] == "none"
    saved = torch.load(path)
    torch.save(saved | {KERNELS_KEY: "liger"}, path)
    with pytest.warns(UserWarning, match="kernels=liger and resumes with none"):
        losses(quiet_trainer(max_steps=2, **saving()), pretrained, rows, "auto", ckpt_path=path)


@pytest.mark.skipif("liger_kernel" in sys.modules, reason="the stand-in would hide the real one")
def test_without_liger_it_says_what_to_install(pretrained: str, quiet_trainer: Make, rows: Any) -> None:
    with pytest.raises(InputError, match=r"liger is not available: it needs liger-kernel and triton: pip install"):
        losses(quiet_trainer(max_steps=1), pretrained, rows, "liger")


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A package that changes models as liger-kernel does, with kernels in plain torch, which count their calls."""
    stock_rope, calls = modeling_llama.apply_rotary_pos_emb, SimpleNamespace(norm=0, rope=0, factor=1.0, has_rope=True)

    class LigerRMSNorm(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.norm += 1
            wide = x.float()
            normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
            return (self.weight * normed * calls.factor).to(x.dtype)

    def rope(*args: Any, **kwargs: Any) -> Any:
        calls.rope += 1
        return stock_rope(*args, **kwargs)

    def apply(model: Any, **wanted: bool) -> None:
        assert wanted.pop("cross_entropy") is wanted.pop("fused_linear_cross_entropy") is False
        if wanted.pop("rope", calls.has_rope):  # its default differs between architectures
            if not calls.has_rope:
                raise NotImplementedError("liger_rotary_pos_emb is not available for these models.")
            modeling_llama.apply_rotary_pos_emb = rope
        assert not wanted
        modeling_llama.LlamaRMSNorm = LigerRMSNorm
        for part in model.modules():
            if type(part).__name__ == "LlamaRMSNorm":
                part.__dict__["forward"] = MethodType(LigerRMSNorm.forward, part)

    for name in ("triton", "liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    module.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply}  # type: ignore[attr-defined]  # of a stand-in module
    module._apply_liger_kernel_to_instance = apply  # type: ignore[attr-defined]  # of a stand-in module
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", stock_rope)  # undone after the test
    monkeypatch.setattr(modeling_llama, "LlamaRMSNorm", modeling_llama.LlamaRMSNorm)
    return calls


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_model_with_liger_trains_the_same_and_other_models_stay_as_they_are(
    pretrained: str, quiet_trainer: Make, rows: Any, liger: SimpleNamespace, precision: Any
) -> None:
    other, ids = tiny_model(), torch.arange(9)[None]
    before = other(input_ids=ids).logits
    _, eager = losses(quiet_trainer(max_steps=2, precision=precision), pretrained, rows, "none")
    assert liger.norm == liger.rope == 0
    module, fused = losses(quiet_trainer(max_steps=2, precision=precision), pretrained, rows, "liger")
    assert module.kernels.name == "liger"
    assert fused == pytest.approx(eager, rel=1e-5 if precision == "32-true" else 1e-2)
    assert min(liger.norm, liger.rope) > 0
    liger.norm = liger.rope = 0
    assert torch.equal(other(input_ids=ids).logits, before)
    assert torch.equal(tiny_model()(input_ids=ids).logits, before)
    assert liger.norm == liger.rope == 0


def test_an_architecture_without_rope_of_liger_has_its_other_kernels(
    pretrained: str, quiet_trainer: Make, rows: Any, liger: SimpleNamespace
) -> None:
    liger.has_rope = False
    module, _ = losses(quiet_trainer(max_steps=1), pretrained, rows, "liger")
    assert module.kernels.name == "liger"
    assert (liger.norm > 0, liger.rope) == (True, 0)


def test_kernels_that_compute_something_else_are_refused_and_taken_out(
    pretrained: str, quiet_trainer: Make, rows: Any, liger: SimpleNamespace
) -> None:
    liger.factor = 1.1
    with pytest.raises(InputError, match="hidden states differ from the model's own by more than rounding"):
        losses(quiet_trainer(max_steps=1), pretrained, rows, "liger")
    module = SFTModule(pretrained, kernels="liger")
    module.configure_model()
    assert module.model is not None
    ids = torch.arange(9)[None]
    before = module.model(input_ids=ids).logits
    with pytest.raises(InputError, match="hidden states differ"):
        quiet_trainer(max_steps=1).fit(module, SFTDataModule(train=rows))
    liger.norm = liger.rope = 0
    assert torch.equal(module.model(input_ids=ids).logits, before)
    assert liger.norm == liger.rope == 0


def test_an_architecture_that_liger_does_not_know_keeps_its_layers(
    tmp_path: Any, quiet_trainer: Make, rows: Any, liger: SimpleNamespace
) -> None:
    from lightning_sft.demos import tiny_pretrained

    phi = tiny_pretrained(tmp_path / "phi", "phi", num_key_value_heads=2)
    with pytest.raises(InputError, match="liger is not available: it has no kernels for phi"):
        losses(quiet_trainer(max_steps=1), phi, rows, "liger")
