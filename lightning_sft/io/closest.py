"""The known name that a mistyped one may have meant."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches

_BY_SETTING = {
    "model.pretrained": "model model_id model_name model_name_or_path model_path base_model",
    "model.optimizer": "optim",
    "model.optimizer.lr": "lr learning_rate",
    "model.optimizer.weight_decay": "weight_decay",
    "model.schedule": "lr_scheduler lr_scheduler_type",
    "model.warmup": "warmup_ratio warmup_steps",
    "model.gradient_checkpointing": "activation_checkpointing",
    "model.attn_implementation": "flash_attention use_flash_attention_2",
    "model.kernels": "torch_compile use_liger_kernel",
    "model.neftune_alpha": "neftune neftune_noise_alpha",
    "model.quantize": "load_in_4bit load_in_8bit quantization_config",
    "model.lora": "peft_config lora_config",
    "model.lora.r": "rank lora_r lora_rank",
    "model.lora.alpha": "lora_alpha",
    "model.lora.dropout": "lora_dropout",
    "model.lora.targets": "target_modules target_parameters lora_target_modules",
    "model.lora.exclude": "exclude_modules",
    "model.lora.dora": "use_dora",
    "model.lora.rslora": "use_rslora",
    "model.lora.init": "init_lora_weights",
    "model.trained": "modules_to_save",
    "data.train": "dataset train_data train_dataset train_file train_path training_data data_path data_files",
    "data.val": "dev eval eval_data eval_dataset eval_file val_data val_dataset val_file valid validation "
    "validation_data validation_file",
    "data.test": "test_data test_dataset test_file",
    "data.predict": "predict_data predict_dataset predict_file",
    "data.tokenizer": "tokenizer_name tokenizer_name_or_path tokenizer_path",
    "data.tokens_per_batch": "batch_size eval_batch_size micro_batch_size per_device_eval_batch_size "
    "per_device_train_batch_size train_batch_size",
    "data.max_length": "block_size cutoff_len max_len max_seq_len max_seq_length seq_len seq_length sequence_len",
    "data.packing": "sample_packing",
    "data.system": "system_prompt",
    "data.train_on": "assistant_only_loss train_on_inputs",
    "data.num_workers": "dataset_num_proc num_proc preprocessing_num_workers",
    "trainer.max_epochs": "epochs num_epochs num_train_epochs",
    "trainer.max_steps": "num_steps num_train_steps total_steps",
    "trainer.accumulate_grad_batches": "grad_accum gradient_accumulation gradient_accumulation_steps",
    "trainer.gradient_clip_val": "grad_clip gradient_clipping max_grad_norm",
    "trainer.precision": "bf16 fp16 torch_dtype",
    "trainer.devices": "gpus num_gpus",
    "trainer.log_every_n_steps": "logging_steps",
    "trainer.val_check_interval": "eval_steps",
    "trainer.default_root_dir": "output_dir",
}
ELSEWHERE = {name: setting for setting, names in _BY_SETTING.items() for name in names.split()}
"""What other trainers, peft, and Lightning's tuner call our settings."""

_SAME = {"final": "last", "everything": "all", "every": "all"}  # words that are like others, and mean these

_PAGE = "docs/howto/schedules.md"
_OF_TORCH = "torch.optim.lr_scheduler"
SCHEDULES = {
    "cosine_with_restarts": f"give {_OF_TORCH}.CosineAnnealingWarmRestarts with its T_0, as {_PAGE} has OneCycleLR",
    "polynomial": f"give {_OF_TORCH}.PolynomialLR with its total_iters, as {_PAGE} has OneCycleLR",
    "constant_with_warmup": "give constant, which begins with model.warmup as all of them do",
    "inverse_sqrt": f"give a function, as inverse_square_root in {_PAGE} under A schedule of your own",
    **dict.fromkeys(
        ("reduce_lr_on_plateau", "plateau"),
        f"give lightning.pytorch.cli.ReduceLROnPlateau, as {_PAGE} does under Follow the validation loss",
    ),
    **dict.fromkeys(
        ("cosine_with_min_lr", "cosine_warmup_with_min_lr"),
        f"override configure_optimizers, as WithFloor in {_PAGE}, under A schedule of your own",
    ),
    **dict.fromkeys(("warmup_stable_decay", "trapezoidal"), "give wsd"),
    **dict.fromkeys(("one_cycle", "onecycle"), f"give {_OF_TORCH}.OneCycleLR, as {_PAGE} does"),
}
"""What to give for the learning-rate schedules of other trainers that are none of our names."""

_ABBREVIATION = 3  # letters with which a name may have been abbreviated


def did_you_mean(given: Iterable[str], known: Iterable[str], prefix: str = "", cutoff: float | None = None) -> str:
    """A question after the first of the given names that is close to a known one but none; else nothing.

    Args:
        given: Words of a message, or what was typed.
        known: Valid names.
        prefix: Prefix of the suggested name in the question.
        cutoff: Minimum similarity, from 0 to 1, ignoring case; by default higher for dotted names, which share more.

    >>> did_you_mean(["fti"], ["fit", "test"])
    ' Did you mean fit?'
    >>> did_you_mean(["model.lr"], ["model.lora", "model.optimizer.lr"])
    ' Did you mean model.optimizer.lr?'
    >>> did_you_mean(["trainer.max_ep"], ["trainer.max_steps", "trainer.max_epochs"])
    ' Did you mean trainer.max_epochs?'
    >>> did_you_mean(["fit"], ["fit", "test"]), did_you_mean(["final"], ["all", "last", "prompts"])
    ('', ' Did you mean last?')
    """
    names = {name.lower(): name for name in known}
    for name in given:
        if name in names.values():
            continue
        if (same := _SAME.get(name.lower())) in names:
            return f" Did you mean {prefix}{same}?"
        before, dot, last = name.rpartition(".")
        deeper = [other for other in names.values() if dot and other.startswith(before) and other.endswith(dot + last)]
        if len(deeper) == 1:
            return f" Did you mean {prefix}{deeper[0]}?"
        begun = [other for lower, other in names.items() if lower.startswith(name.lower())]
        if len(begun) == 1 and len(name) >= _ABBREVIATION:
            return f" Did you mean {prefix}{begun[0]}?"
        least = cutoff or (0.75 if dot else 0.6)
        if close := get_close_matches(name.lower(), names, n=1, cutoff=least):
            return f" Did you mean {prefix}{names[close[0]]}?"
    return ""


def of_choices(value: str, choices: Iterable[str], cutoff: float) -> str:
    """What a value that is none of the choices may have meant, in a sentence; else nothing.

    Args:
        value: What was given.
        choices: Valid values.
        cutoff: Minimum similarity, from 0 to 1, ignoring case.

    >>> of_choices("warmup_stable_decay", ["cosine", "wsd"], 0.5), of_choices("cosin", ["cosine", "wsd"], 0.5)
    (' Instead, give wsd.', ' Did you mean cosine?')
    """
    choices = list(choices)
    if "wsd" in choices and (found := SCHEDULES.get(value.lower())):
        return f" Instead, {found}."
    return did_you_mean([value], choices, cutoff=cutoff)


def own_name(name: str, known: Collection[str]) -> str:
    """A question after the setting of one class that has another name elsewhere, or is close; else nothing.

    Args:
        name: Unknown name of a setting.
        known: Names of the settings of the class.

    >>> own_name("rank", ["r", "dora"]), own_name("xyzzy", ["r", "dora"])
    (' Did you mean r?', '')
    """
    elsewhere = ELSEWHERE.get(name, "")
    own = elsewhere.rpartition(".")[2]
    if own in known:
        return f" Did you mean {own}?"
    return f" Did you mean {elsewhere}?" if elsewhere else did_you_mean([name], known, cutoff=0.5)


def meant(names: Sequence[str], known: Iterable[str], prefix: str = "") -> str:
    """A question after the setting that the first unknown name is elsewhere, or is close to; else nothing.

    Args:
        names: Words of a message, or what was typed.
        known: Valid names.
        prefix: Prefix of the suggested name in the question.

    >>> meant(["model.learning_rate"], ["model.optimizer"]), meant(["model.optimzer"], ["model.optimizer"])
    (' Did you mean model.optimizer.lr?', ' Did you mean model.optimizer?')
    """
    known = list(known)
    other = (ELSEWHERE.get(name.rpartition(".")[2]) for name in names if name not in known)
    found = next(filter(None, other), None)
    return f" Did you mean {prefix}{found}?" if found else did_you_mean(names, known, prefix)
