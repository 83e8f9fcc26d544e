"""What a fit needs besides its data, looked for before data are read and encoded, which may take an hour."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_sft.checkpoints.reading import DAMAGE, Checkpoint
from lightning_sft.checkpoints.trained_with import TrainedWith
from lightning_sft.checkpoints.writing import newest
from lightning_sft.io.named import check_names
from lightning_sft.model.kernels import Kernels
from lightning_sft.model.pretrained import load_architecture
from lightning_sft.model.tuning.tuning import TuningConfig
from lightning_sft.training.hooks import check_hooks, warn_of_unused_settings
from lightning_sft.training.lightning_callbacks import check_callbacks
from lightning_sft.training.optimizers import OptimizerCallable, OptimizerPart, check_settings
from lightning_sft.training.trainer import averages_weights, callbacks_of
from lightning_sft.types import InputError

if TYPE_CHECKING:
    from lightning_sft.model.likelihood import LikelihoodModel

_OF_LOADING = ("map_location", "hparams_file", "strict", "weights_only")
_SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


class FirstChecks(LightningModule):
    """A module of a pretrained model that refuses packages that are missing, and checkpoints that are not its own."""

    if TYPE_CHECKING:  # pages would show these types in place of those of the arguments
        pretrained: str
        tuning: TuningConfig
        kernels: Kernels
        scorer: LikelihoodModel | None
        optimizer: OptimizerCallable | Sequence[OptimizerPart]

    def __init__(self) -> None:
        super().__init__()
        check_hooks(type(self))
        self._trained_with = TrainedWith({})  # of the checkpoint that it was loaded from in Python

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The parameters; warns whoever asks for them before a fit has loaded the weights, to freeze or update them.

        Args:
            recurse: Whether those of all modules inside are meant.

        Raises:
            InputError: When ``LightningCLI`` asks, for its option ``--optimizer``.
        """
        if self._is_unloaded and sys._getframe(1).f_code.co_name == "_add_configure_optimizers_method_to_model":
            raise InputError(  # of LightningCLI
                "--optimizer and --lr_scheduler of LightningCLI make an optimizer before the weights are loaded. "
                "Use --model.optimizer and --model.schedule instead, as --model.optimizer SGD "
                "--model.optimizer.lr 1e-3; LightningCLI(..., auto_configure_optimizers=False) removes the others."
            )
        return (parameter for _, parameter in self.named_parameters(recurse=recurse))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the model first, if there is none: after ``ddp_fork`` a process receives weights that others trained.

        Args:
            state_dict: Tensors by name.
            strict: Whether each name has to be one of the module's, and the other way around.
            assign: Whether the tensors take the place of the module's, instead of their values.
        """
        if self.scorer is None and any(name.startswith("scorer.") for name in state_dict):
            self.configure_model()
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters with their names, with the same warning.

        Args:
            prefix: What names begin with.
            recurse: Whether those of all modules inside are meant.
            remove_duplicate: Whether parameters that are shared are given once.
        """
        if self._is_unloaded:
            rank_zero_warn(
                f"{type(self).__name__} has no parameters yet: its weights are loaded when fit begins, where the "
                "strategy wants them. Freeze some with model.frozen, or all others with model.trained; give it an "
                "optimizer as a class or functools.partial(torch.optim.AdamW, lr=2e-5); to look at the weights, call "
                "configure_model() first."
            )
        return super().named_parameters(prefix, recurse, remove_duplicate)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What ``half``, ``to`` and others call; warns of a dtype, which the weights will not have."""
        if self._is_unloaded and fn(torch.empty(0)).dtype != torch.get_default_dtype():
            rank_zero_warn(
                f"{type(self).__name__} has no parameters yet, so a dtype has no effect on its weights. Set "
                "trainer.precision, as bf16-true."
            )
        applied: Self = cast(Any, super())._apply(fn, recurse)
        return applied

    @property
    def _is_unloaded(self) -> bool:
        """Whether the weights have not been loaded, and no trainer is at it."""
        return self.scorer is None and self._trainer is None

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """No callbacks: this is the only hook of Lightning before data are prepared.

        Raises:
            InputError: When a package is missing that settings need, the optimizer does not take its settings, or the
                whole module is compiled; with callbacks that
                :func:`~lightning_sft.training.lightning_callbacks.check_callbacks` refuses.
        """
        if self._compiler_ctx is not None or self._compiled_call_impl is not None:
            raise InputError(
                "torch.compile cannot trace the training step of SFTModule, whose shapes depend on the data. Pass the "
                "module itself, with model.kernels=compiled, which compiles its layers."
            )
        is_fit = self.trainer.state.fn == "fit"
        if is_fit:
            check_callbacks(self.trainer)
        self.tuning.check_packages(self.pretrained)
        if is_fit:
            warn_of_unused_settings(self)
            check_settings(self.optimizer)
            self.kernels.check_packages()
        return super().configure_callbacks()

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **settings: Any) -> Self:
        """As Lightning's, which would leave out arguments of other names; with one error for a file that is damaged.

        Args:
            checkpoint_path: File of a checkpoint.
            args: ``map_location``, ``hparams_file``, ``strict`` and ``weights_only`` of Lightning's.
            settings: Arguments of Lightning's by name, and those of the module that differ from the checkpoint's.

        Raises:
            InputError: When there is no such file, it is damaged, or the module has no such argument.
        """
        check_names(cls, (name for name in settings if name not in _OF_LOADING))
        try:
            return super().load_from_checkpoint(checkpoint_path, *args, **settings)
        except DAMAGE as error:
            if isinstance(checkpoint_path, (str, Path)):
                if Path(checkpoint_path).is_file():
                    Checkpoint(checkpoint_path).hyper_parameters  # noqa: B018  # reading them says what is wrong with it
                elif isinstance(error, (FileNotFoundError, IsADirectoryError, PermissionError)):
                    raise _no_file(Path(checkpoint_path)) from error
            raise

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of a model of another shape or dtype, or of averages, before its weights are loaded.

        Args:
            checkpoint: The checkpoint.

        Raises:
            InputError: With what differs.
        """
        if self._trainer is not None:
            saved = checkpoint.get("hyper_parameters", {}).get("hf_config")
            refuse_other_model(str(self.trainer.ckpt_path), saved, self.pretrained)
            if self.trainer.training:
                self._refuse_other_dtype(checkpoint)
                _refuse_averages(checkpoint, callbacks_of(self.trainer))
        else:
            self._trained_with = TrainedWith(checkpoint)
        super().on_load_checkpoint(checkpoint)

    def _refuse_other_dtype(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse to resume with weights of another dtype: the optimizer's state is of those saved."""
        weights = checkpoint.get("state_dict", {})
        for name, parameter in self.named_parameters():
            saved = weights.get(name)
            if parameter.requires_grad and isinstance(saved, Tensor) and saved.dtype != parameter.dtype:
                was, now = (str(tensor.dtype).removeprefix("torch.") for tensor in (saved, parameter))
                raise InputError(
                    f"The checkpoint has weights in {was}, and with trainer.precision={self.trainer.precision} this "
                    f"run has them in {now}. Resume with a precision of {was} weights (32-true, bf16-mixed and "
                    "16-mixed have float32 ones), or export the checkpoint (lightning-sft export) and begin a run with "
                    "that folder as model.pretrained."
                )


def _refuse_averages(checkpoint: Mapping[str, Any], callbacks: Sequence[Callback]) -> None:
    """Refuse to resume from averaged weights without the callback: the optimizer's state is of others."""
    if "averaging_state" in checkpoint and not averages_weights(callbacks):
        raise InputError(
            "The checkpoint has averaged weights, and this run has no callback that averages. Resume with the callback "
            "of the run (WeightAveraging or EMAWeightAveraging), or export the checkpoint (lightning-sft export) and "
            "begin a run from the averages with that folder as model.pretrained."
        )


def _no_file(path: Path) -> InputError:
    """The refusal of a path that is no checkpoint file: it does not exist, or is a folder."""
    if not path.is_dir():
        return InputError(f"There is no checkpoint {str(path)!r}. Give the path of a .ckpt file.")
    if Checkpoint.is_at(path):
        return InputError(
            f"{path} is the folder of a checkpoint that a sharding strategy has written, and load_from_checkpoint "
            "takes a file. Export it (lightning-sft export), and give that folder as pretrained."
        )
    found = newest([path, path / "checkpoints"], resumable=False)
    hint = f"such as {found}" if found else "and there is none in it"
    return InputError(f"{path} is a folder, and load_from_checkpoint takes a .ckpt file, {hint}.")


def refuse_other_model(path: str, saved: Mapping[str, Any] | None, pretrained: str | None) -> None:
    """Refuse the checkpoint of a model of another shape than the one asked for; one that was moved is as good.

    Args:
        path: Path of the checkpoint.
        saved: Configuration of the model that the checkpoint is of, if it has one.
        pretrained: Folder or hub name of the model that is asked for; it may be gone.

    Raises:
        InputError: With the first value that differs.
    """
    if not saved or not pretrained:
        return
    try:
        asked = load_architecture(pretrained)
    except InputError:  # it is read no more
        return
    is_text = "text_config" not in saved.keys() | asked.keys()
    one, other = (config.get("text_config") or config for config in (saved, asked))
    for key in (*_SHAPE, *["model_type"] * is_text):
        if key in one and key in other and one[key] != other[key]:
            raise InputError(
                f"ckpt_path={path} is of a model with {key}={one[key]}, and model.pretrained={pretrained} has "
                f"{other[key]}. Give the pretrained model that the checkpoint is of, or another checkpoint."
            )
