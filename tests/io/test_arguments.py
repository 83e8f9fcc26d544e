"""Every public constructor refuses what its annotations do not allow, and takes paths."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch

import lightning_sft
from lightning_sft import Batch, Mixture, Part, SFTDataModule, SFTModule, __version__, callbacks, log_likelihood
from lightning_sft.commands.chat import chat
from lightning_sft.commands.init import init
from lightning_sft.data.inspect.audit import Thresholds
from lightning_sft.data.rows.sources import Row
from lightning_sft.demos import tiny_model, tiny_tokenizer
from lightning_sft.evaluation.generation import Sampling
from lightning_sft.export.convert import Settings, export_checkpoint
from lightning_sft.io.arguments import Bytes, Filled, Range, plain
from lightning_sft.main import main
from lightning_sft.model.attention.choice import Attention
from lightning_sft.model.kernels import Kernels
from lightning_sft.model.tuning.adapters import Lora
from lightning_sft.strategies import FSDP2Strategy
from lightning_sft.training.optimizers import Chained
from lightning_sft.types import InputError

REQUIRED: dict[str, dict[str, Any]] = {
    "SFTModule": {"pretrained": "m"},
    "Part": {"source": "a.jsonl"},
    "Mixture": {"parts": {"a": "a.jsonl"}},
    "chat": {"model": "m"},
    "export_checkpoint": {"ckpt": "c", "out": "o"},
    "Speaker": {"name": "m"},
    "OptimizerPart": {"optimizer": torch.optim.SGD},
}
NOT_IN_API = [Sampling, Thresholds, Settings, FSDP2Strategy, chat, export_checkpoint, init]


def documented() -> Iterator[Any]:
    """The classes that users make, of the pages of the API."""
    for page in ("train", "callbacks"):
        text = (Path(__file__).parents[2] / "docs" / "reference" / "api" / f"{page}.rst").read_text(encoding="utf-8")
        for name in re.findall(r"autoclass:: ([\w.]+)", text):
            module, _, own = name.rpartition(".")
            yield getattr(importlib.import_module(module), own)


def public() -> list[Any]:
    own = {getattr(lightning_sft, name) for name in lightning_sft.__all__} - {Batch, log_likelihood, __version__}
    own |= {getattr(callbacks, name) for name in callbacks.__all__}
    made_by_us = {Attention, Kernels, Range, Filled, Bytes, Chained}
    return sorted({*own, *documented(), *NOT_IN_API} - made_by_us, key=lambda one: str(one.__name__))


def hints(of: Any) -> dict[str, Any]:
    found = get_type_hints(of.__init__ if isinstance(of, type) else of, include_extras=True)
    return {name: hint for name, hint in found.items() if name not in ("return", "kwargs")}


def alternatives(hint: Any) -> list[Any]:
    """The types of a union, without what is said of their ranges."""
    if get_origin(hint) is Annotated:
        return alternatives(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return [one for inner in get_args(hint) for one in alternatives(inner)]
    return [hint]


def rules(hint: Any) -> list[Any]:
    """What is said of ranges and forms in an annotation."""
    own = list(get_args(hint)[1:]) if get_origin(hint) is Annotated else []
    return own + [one for inner in get_args(hint) for one in rules(inner)]


def bad(hint: Any) -> list[Any]:
    """Values that a parameter of this annotation can never mean."""
    allowed = alternatives(hint)
    dicts = [one for one in allowed if get_origin(one) is dict]
    found: list[Any] = [empty for rule in rules(hint) if isinstance(rule, Filled) for empty in ("", [])]
    if any(isinstance(rule, Bytes) for rule in rules(hint)):
        found += ["5 parsecs", "GB", "5", "-5GB", "0GB"]
    if not {Any, int, float, bool}.intersection(allowed):
        found += [5, 1.5]
        if not any(map(is_dataclass, allowed)) and Iterable[Row] not in allowed:  # where the message is of its keys
            found += [{5: "a"}, *([] if dicts else [{"a": "b"}])]
    if dict[str, str] in dicts:
        found += [{"prompt": 5}, {"prompt": ["a"]}, {"prompt": None}]
    if Iterable[Row] in allowed:
        found += [["a", 5], ["a", {"prompt": "b"}]]
    if any(get_origin(one) is Literal for one in allowed) and str not in allowed:
        found.append("no-such-choice")
    if int in allowed or float in allowed:
        found += [-1, -math.inf, math.nan, *([] if float in allowed else [1.5])]
    if bool in allowed:
        found += ["yes"]
    if list[str] in allowed and str not in allowed:
        found += ["abc", [1]]
    if str in allowed and Any not in allowed:
        found += [object()]
    return found


CASES = [(of, name, value) for of in public() for name, hint in hints(of).items() for value in bad(hint)]


def call(of: Any, **settings: Any) -> Any:
    return of(**REQUIRED.get(of.__name__, {}) | settings)


def test_the_public_constructors_are_found() -> None:
    names = {of.__name__ for of in public()}
    assert {"SFTModule", "SFTDataModule", "Mixture", "Part", "Lora", "Sampling", *callbacks.__all__} <= names
    parameters = {(of.__name__, name) for of, name, _ in CASES}
    assert {("SFTDataModule", "columns"), ("SFTModule", "optimizers"), ("HFExport", "max_shard_size")} <= parameters
    assert {("SFTModule", "schedule"), ("SFTDataModule", "seed"), ("Part", "weight"), ("Lora", "init")} <= parameters


@pytest.mark.parametrize(("of", "name", "value"), CASES, ids=lambda one: getattr(one, "__name__", str(one)[:20]))
def test_what_an_annotation_does_not_allow_is_refused_by_name(of: Any, name: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"\b{name} is .*; expected "):
        call(of, **{name: value})


@pytest.mark.parametrize(
    ("of", "settings"),
    [
        (SFTModule, {"warmup": 100}),
        (SFTModule, {"chunk_size": 0}),
        (SFTModule, {"max_new_tokens": 0}),
        (SFTDataModule, {"tokens_per_batch": 0}),
        (SFTDataModule, {"max_length": 1}),
        (SFTDataModule, {"predict_batch_size": 0}),
        (SFTDataModule, {"buffer_rows": 0}),
        (Lora, {"r": 0}),
        (Lora, {"alpha": 0}),
        (Lora, {"dropout": 1.0}),
        (Sampling, {"top_p": 0.0}),
        (Part, {"weight": 0.0}),
        (Mixture, {"temperature": math.inf}),
        (Thresholds, {"max_refused": 5}),
        (callbacks.SampleLedger, {"every_n_steps": 0}),
        (callbacks.RunRecord, {"flush_every": 0}),
        (callbacks.ScoreAnswers, {"first": 0}),
        (callbacks.Preempt, {"signals": "SIGTERM"}),
    ],
    ids=str,
)
def test_a_number_that_makes_no_sense_is_refused(of: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"\b{next(iter(settings))} is .*; expected "):
        call(of, **settings)


@pytest.mark.parametrize(
    ("of", "settings", "message"),
    [
        (SFTModule, {"schedule": "Cosine"}, r"model.schedule is 'Cosine'; expected cosine, .* Did you mean cosine\?"),
        (
            SFTModule,
            {"schedule": "constant_with_warmup"},
            r"linear, constant, wsd or a function. Instead, give constant, which begins with model.warmup",
        ),
        (SFTDataModule, {"overflow": "raise"}, r"is .raise.; expected error, .* truncate_prompt or split.$"),
        (Lora, {"targets": "q_proj"}, r"targets is 'q_proj'; expected all-linear or a list of strings"),
        (SFTModule, {"lora": {"rank": 8}}, r"Lora has no 'rank'; it has r, alpha, .*"),
        (SFTModule, {"lora": {"drop_out": 0.1}}, r"Did you mean dropout\?"),
        (SFTDataModule, {"columns": {"promt": "q"}}, r"'promt' is no key of a format\..* Did you mean prompt\?"),
        (Part, {"columns": {"completions": "a"}}, r"'completions' is no key.* Did you mean completion\?"),
        (SFTDataModule, {"columns": {"prompt": 5}}, r"data.columns is {'prompt': 5}; expected a dictionary of strings"),
        (SFTDataModule, {"train": ["a", 5]}, r"data.train is \['a', 5\]; expected .*a list of strings, rows, a path"),
        (SFTModule, {"optimizers": []}, r"model.optimizers is \[\]; expected a list of values that is not empty or"),
        (SFTModule, {"pretrained": ""}, r"model.pretrained is ''; expected a string that is not empty or a path\."),
        (callbacks.HFExport, {"max_shard_size": "5 parsecs"}, r"'5 parsecs'; expected a string such as 5GB or 200MB"),
        (export_checkpoint, {"max_shard_size": "5GiB"}, r"max_shard_size is '5GiB'; expected a string such as 5GB"),
        (SFTModule, {"sampling": {"temp": 1}}, r"Sampling has no 'temp'.* Did you mean temperature\?"),
        (Mixture, {"parts": {"a": {"source": "a", "wieght": 1}}}, r"Part has no 'wieght'.*Did you mean weight\?"),
    ],
)
def test_the_message_has_the_choices_and_the_closest(of: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(of, **settings)


def test_objects_in_place_of_names_are_refused_with_the_remedy() -> None:
    message = r"an object of type {}; expected a string.* or a path.* Write it to a folder with its save_pretrained"
    with pytest.raises(InputError, match="model.pretrained is " + message.format("LlamaForCausalLM")):
        SFTModule(tiny_model())  # type: ignore[arg-type]  # that is what is tested
    tokenizer: Any = tiny_tokenizer()
    with pytest.raises(InputError, match=f"data.tokenizer is an object of type {type(tokenizer).__name__}; .* or null"):
        SFTDataModule(tokenizer=tokenizer)


def test_values_of_numpy_and_mappings_are_taken() -> None:
    numpy = pytest.importorskip("numpy")
    assert SFTModule("m", warmup=numpy.float64(0.5), max_new_tokens=numpy.int64(3)).max_new_tokens == 3
    assert SFTModule("m", lora={"r": 4}).tuning.lora == Lora(r=4)  # type: ignore[arg-type]  # as a checkpoint has it


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.warmup", "100"], r"model.warmup is 100.0; expected a number >= 0 and <= 1"),
        (["--data.predict_batch_size", "0"], r"data.predict_batch_size is 0; expected an integer >= 1"),
        (["--model.lora.r", "0"], r"^model.lora.r is 0; expected an integer >= 1.$"),
        (["--model.sampling.temperature", "-1"], r"^Sampling.temperature is -1.0; expected a number >= 0.$"),
        (["--data.columns", "{promt: q}"], r"'promt' is no key of a format.* Did you mean prompt"),
        (["--data.train", "{parts: {a: a.jsonl}, temperature: 0}"], r"^Mixture.temperature is 0.0; expected a number"),
        (["--data.train", "{parts: {a: {source: a.jsonl, share: -1}}}"], r"^Part.share is -1.0; expected a number"),
    ],
)
def test_from_the_command_line_the_message_is_the_same(
    pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        main(["fit", "--model.pretrained", pretrained, "--trainer.logger", "false", *flags])


def test_paths_are_taken_everywhere(
    pretrained: str, rows: list[dict[str, str]], jsonl: Any, quiet_trainer: Any, tmp_path: Path
) -> None:
    data = SFTDataModule(
        train=Mixture({"a": Path(jsonl(rows, "a.jsonl")), "b": Part(Path(jsonl(rows, "b.jsonl")))}),
        val=Path(jsonl(rows, "val.jsonl")),
        tokenizer=Path(pretrained),
        cache=tmp_path / "cache",
    )
    module = SFTModule(Path(pretrained))
    own = [
        callbacks.SafeCheckpoint(tmp_path / "checkpoints"),
        callbacks.SampleLedger(tmp_path / "run"),
        callbacks.RunRecord(tmp_path / "run"),
        callbacks.HFExport(tmp_path / "folders", rows=Path(jsonl(rows, "val.jsonl"))),
    ]
    trainer = quiet_trainer(max_steps=1, callbacks=own, enable_checkpointing=True)
    trainer.fit(module, data)
    [ckpt] = (tmp_path / "checkpoints").iterdir()
    again = SFTModule.load_from_checkpoint(ckpt, weights_only=True)  # so it holds no object but plain values
    assert again.pretrained == pretrained
    assert (tmp_path / "run" / "samples.jsonl").is_file()
    assert (tmp_path / "folders" / "final" / "model.safetensors").is_file()
    assert export_checkpoint(ckpt, tmp_path / "out", rows=Path(jsonl(rows))) == tmp_path / "out"


def test_paths_in_a_list_of_names_become_text(tmp_path: Path) -> None:
    assert SFTDataModule(train=["a", tmp_path]).sources["train"] == ["a", str(tmp_path)]
    assert Part((tmp_path, "a")).source == (str(tmp_path), "a")


def test_what_is_no_config_of_omegaconf_is_left_as_it_is() -> None:
    rows = [{"prompt": "Hi"}]
    assert plain(rows) is rows
    assert plain(None) is None


def test_configs_of_omegaconf_become_plain_with_their_interpolations() -> None:
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create({"a": {"b": [1, {"c": "x"}]}, "d": "${a.b}"})
    assert plain(config.d) == [1, {"c": "x"}]
    assert type(plain(config)["a"]["b"][1]) is dict
