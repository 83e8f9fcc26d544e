"""Two steps without numbers allocate what two steps with numbers allocate, by torch's own count."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lightning_sft.commands.plan.device import Device
from lightning_sft.commands.plan.layout import Layout
from lightning_sft.commands.plan.prediction import Prediction, predict
from lightning_sft.commands.plan.rehearsal import Rehearsal, rehearse
from lightning_sft.commands.plan.remedies import remedies
from lightning_sft.data.batches.collate import collate
from lightning_sft.demos import tiny_pretrained
from lightning_sft.model.tuning.adapters import Lora
from lightning_sft.module import SFTModule
from lightning_sft.training.optimizers import parameter_groups
from lightning_sft.types import Batch, Example

SIZE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "vocab_size": 4000,
    "num_hidden_layers": 2,
    "head_dim": 64,
}
SIZE |= {"num_key_value_heads": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_pretrained(tmp_path_factory.mktemp("model"), **SIZE)


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Three documents; half of each is trained."""
    return collate([Example([5] * n, [0.0] * (n // 2) + [1.0] * (n - n // 2)) for n in (300, 200, 100)], 1.0)


def counted_by_torch(module: SFTModule, batch: Batch, layout: Layout, accumulate: int = 1) -> int:
    """The most bytes at a time beside the weights, in two real steps as Lightning takes them."""
    module.configure_model()
    assert module.scorer is not None
    optimizer = module.optimizer(parameter_groups(module.parameters()))
    if layout.in_backward:

        def step(_: torch.Tensor) -> None:
            optimizer.step()
            optimizer.zero_grad()

        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(step)
    autocast = layout.autocast
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(2):
            for _ in range(accumulate):
                with torch.autocast("cpu", autocast, cache_enabled=False) if autocast else nullcontext():
                    loss = -module.scorer(batch)[0]
                loss.backward()
                del loss
            optimizer.step()
            optimizer.zero_grad()
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def counted_here(done: Rehearsal) -> int:
    return max(sum(live.values()) - live["weights"] for live in done.meter.peaks.values())


@pytest.mark.parametrize(
    ("settings", "layout", "accumulate"),
    [
        ({}, Layout("one device"), 1),
        ({}, Layout("one device"), 2),
        ({"attn_implementation": "sdpa"}, Layout("one device"), 1),
        ({"gradient_checkpointing": True, "chunk_size": 64}, Layout("one device"), 1),
        ({"lora": Lora(dropout=0.1), "neftune_alpha": 5.0}, Layout("one device"), 1),
        ({"frozen": ["*embed*", "*layers.0.*"]}, Layout("one device"), 1),
        ({"optimizer": lambda groups: torch.optim.AdamW(groups, foreach=True)}, Layout("one device"), 1),
        ({}, Layout("one device", autocast=torch.bfloat16), 1),
        ({"gradient_checkpointing": True, "chunk_size": 64}, Layout("one device", in_backward=True), 1),
        ({"gradient_checkpointing": True, "mlp_tile_size": 64, "chunk_size": 64}, Layout("one device"), 1),
        ({"mlp_tile_size": 100}, Layout("one device", autocast=torch.bfloat16), 1),
    ],
    ids=[
        "plain",
        "accumulated",
        "dense_mask",
        "checkpointing",
        "adapters",
        "frozen",
        "foreach",
        "autocast",
        "in_backward",
        "tiles",
        "tiles_autocast",
    ],
)
def test_it_counts_what_torch_counts(
    model: str, batch: Batch, settings: dict[str, Any], layout: Layout, accumulate: int
) -> None:
    expected = counted_by_torch(SFTModule(model, **settings), batch, layout, accumulate)
    done = rehearse(SFTModule(model, **settings), batch, layout, accumulate)
    assert counted_here(done) == pytest.approx(expected, rel=0.03)


def test_an_optimizers_state_is_known_as_such_from_its_first_step(model: str, batch: Batch) -> None:
    """Ranks share it; as an activation, each would be counted with all of it."""
    done = rehearse(SFTModule(model), batch, Layout("FSDP2 over 8", data_parallel=8, stage=3))
    peak = done.meter.peaks["optimizer step"]
    assert peak["optimizer"] >= 2 * 4 * done.num_parameters
    assert peak["activations"] < 0.1 * peak["optimizer"]


def test_sizes_are_those_of_the_model(model: str, batch: Batch) -> None:
    module = SFTModule(model, lora=Lora(r=4))
    done = rehearse(module, batch, Layout("one device"))
    module.configure_model()
    counts = {name: p.numel() for name, p in module.named_parameters()}
    adapters = sum(count for name, count in counts.items() if ".lora_" in name)
    assert done.num_parameters == sum(counts.values())
    assert done.num_adapters == done.sizes.trained == adapters
    assert done.sizes.layer * 2 + done.sizes.others == done.num_parameters
    assert done.logits == 4 * done.chunk_size * 4000


def test_a_tensor_parallel_rank_has_a_part_of_each_matrix(model: str, batch: Batch) -> None:
    whole, half = (rehearse(SFTModule(model), batch, Layout("x", tensor_parallel=n)) for n in (1, 2))
    matrices = 2 * (3 * 128 * 512 + 4 * 128 * 128)
    assert whole.num_parameters - half.num_parameters == matrices / 2
    assert counted_here(half) < counted_here(whole)


GPU = 2.0**30  # bytes of memory
LONG = [Example([5] * n, [0.0] * (n - 20) + [1.0] * 20) for n in (1024, 512, 512)]


def activations(done: Rehearsal) -> int:
    return max(live["activations"] for live in done.meter.peaks.values())


def test_inputs_of_layers_that_are_offloaded_are_on_the_host(model: str) -> None:
    long = collate(LONG, 1.0)
    kept, offloaded = (
        rehearse(SFTModule(model, gradient_checkpointing=own), long, Layout("one device"), memory=GPU)
        for own in (True, "offload")
    )
    inputs = 2 * 2048 * 128 * 4  # layers, tokens, hidden size, bytes
    on_host = max(live["host"] for live in offloaded.meter.peaks.values())
    assert inputs <= on_host < 1.5 * inputs
    assert {live["host"] for live in kept.meter.peaks.values()} == {0}
    in_loss = [done.meter.peaks["loss"]["activations"] for done in (kept, offloaded)]
    assert in_loss[0] - in_loss[1] == pytest.approx(inputs, rel=0.01)


def test_mlps_in_tiles_take_what_one_tile_takes(model: str) -> None:
    long = collate(LONG, 1.0)
    whole, tiled = (
        rehearse(SFTModule(model, gradient_checkpointing=True, mlp_tile_size=n), long, Layout("x"), memory=GPU)
        for n in (None, 128)
    )
    assert activations(whole) - activations(tiled) > 2 * (2048 - 128) * 512 * 4  # of two intermediate states at least


def test_long_rows_are_made_to_fit_by_tiles_and_by_offloading(model: str) -> None:
    module, long = SFTModule(model, chunk_size=64), collate([Example([5] * 16_384, [0.0] * 16_380 + [1.0] * 4)], 1.0)

    def try_out(module: SFTModule, batch: Batch, layout: Layout) -> Prediction:
        return predict(module, batch, layout, Device("GPU", 5e7, 0.0))

    given = long, try_out(module, long, Layout("one device")), lambda n: long, 16_384, try_out
    settings = [remedy.settings[-1] for remedy in remedies(module, *given)]
    wanted = ["model.gradient_checkpointing=true", "model.mlp_tile_size=4096", "model.gradient_checkpointing=offload"]
    assert settings[:3] == wanted


@pytest.mark.parametrize("memory", [None, GPU], ids=["CPU", "GPU"])
def test_ranks_that_share_a_row_have_the_activations_of_a_part_of_it(model: str, memory: float | None) -> None:
    settings = {"gradient_checkpointing": True, "chunk_size": 64}
    of_layout = {
        n: activations(
            rehearse(SFTModule(model, **settings), collate(LONG * n, 1.0), Layout("x", context_parallel=n), 1, memory)
        )
        for n in (1, 2)
    }
    assert 0.95 * of_layout[1] < of_layout[2] < 1.3 * of_layout[1]  # beside it, what is sent and received


def test_experts_are_chosen_evenly(tmp_path: Path, batch: Batch) -> None:
    folder = tiny_pretrained(
        tmp_path, "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, **SIZE
    )
    done = rehearse(SFTModule(folder), batch, Layout("one device"))
    expected = counted_by_torch(SFTModule(folder), batch, Layout("one device"))
    assert counted_here(done) == pytest.approx(expected, rel=0.15)  # a random router is not quite even


@pytest.mark.parametrize("quantize", [None, "4bit"])
def test_a_rank_has_a_shard_of_the_base_in_the_dtype_that_it_is_held_in(
    quantize: Any, tmp_path: Path, batch: Batch
) -> None:
    """Adapters are float32; the base is as stored, or packed, however wide matrices are while they are gathered."""
    stored = tiny_pretrained(tmp_path / "model", **SIZE, dtype="bfloat16")
    module = SFTModule(stored, lora=Lora(r=4), quantize=quantize)
    layout = Layout("FSDP2", autocast=torch.bfloat16, data_parallel=8, stage=3, compute=torch.bfloat16)
    found = predict(module, batch, layout, Device("GPU", 80.0 * 2**30, 0.0))
    done = found.rehearsal
    plain = done.num_parameters - done.num_adapters - done.num_quantized
    bits = {None: 2 * plain, "4bit": 4 * plain + 0.516 * done.num_quantized}  # embeddings and norms are not packed
    expected = (4 * done.num_adapters + bits[quantize]) / 8
    assert done.num_quantized == (2 * (3 * 128 * 512 + 4 * 128 * 128) if quantize else 0)
    for parts in found.moments.values():
        assert parts["weights"] == pytest.approx(expected, rel=0.01)
    on_host = predict(module, batch, replace(layout, offloads="all"), found.device)
    assert on_host.moments["loss"]["weights"] == 0
    assert on_host.host >= expected


def test_what_one_gpu_does_not_hold_is_sharded_over_several(tmp_path: Path) -> None:
    """The number of devices is the least power of two that suffices; layers are gathered as they are packed."""
    deep = tiny_pretrained(tmp_path, **SIZE | {"num_hidden_layers": 16, "vocab_size": 300})
    module = SFTModule(deep, chunk_size=64, gradient_checkpointing="offload", lora=Lora(r=4), quantize="4bit")
    few = collate([Example([5] * 8, [0.0] * 4 + [1.0] * 4)], 1.0)
    layout = Layout("one device", autocast=torch.bfloat16)
    sharded = replace(layout, stage=3, compute=torch.bfloat16)

    def peak(layout: Layout, capacity: float = 1e12) -> Prediction:
        return predict(module, few, layout, Device("GPU", capacity, 0.0))

    of_two, of_four = (peak(replace(sharded, data_parallel=number)) for number in (2, 4))
    assert of_four.peak < of_two.peak < peak(layout).peak
    enough = (of_two.peak + of_four.peak) / 2
    found = remedies(
        module,
        few,
        peak(layout, enough),
        lambda n: few,
        few.input_ids.numel(),
        lambda module, batch, layout: predict(module, batch, layout, Device("GPU", enough, 0.0)),
    )
    *_, last = found
    assert last.prediction.fits
    assert last.prediction.layout.name == "FSDP2 over 4"
    assert any("trainer.strategy=fsdp2, trainer.devices=" in setting for setting in last.settings)
