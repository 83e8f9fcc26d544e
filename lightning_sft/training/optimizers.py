"""The optimizer of a module: which parameters it gets in which groups, and several optimizers that act as one."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sft.io.arguments import check_arguments
from lightning_sft.io.closest import ELSEWHERE, did_you_mean
from lightning_sft.io.named import our_names
from lightning_sft.types import InputError

OptimizerCallable = Callable[[Iterable[Any]], Optimizer]
"""Function that makes an optimizer from parameter groups, named as in Lightning's CLI."""

DEFAULT_RATE = 2e-5
"""Learning rate of the default optimizer."""

_GIVE = f"Give a class or a function of parameter groups, as functools.partial(torch.optim.AdamW, lr={DEFAULT_RATE:g})."


@our_names
@dataclass(frozen=True)
class OptimizerPart:
    """One of several optimizers, with the parameters that it updates.

    Args:
        optimizer: Function that makes the optimizer from parameter groups.
        parameters: Patterns of parameters' names, as ``*_proj.weight``. A parameter belongs to the first part that
            matches it.
    """

    optimizer: OptimizerCallable
    parameters: list[str] = field(default_factory=lambda: ["*"])

    def __post_init__(self) -> None:
        check_arguments(OptimizerPart, vars(self), "model.optimizers")


def parameter_groups(parameters: Iterable[nn.Parameter], lr: float | None = None) -> list[dict[str, Any]]:
    """Groups of the trained parameters: norms and biases have no weight decay; a group never spans two device meshes.

    Args:
        parameters: Parameters of the module.
        lr: Learning rate of all groups; by default the optimizer's own.

    Returns:
        Groups with a ``name``, ``decay`` or ``no_decay``, as ``LearningRateMonitor`` logs them.

    >>> import torch
    >>> layer = nn.Linear(2, 2)
    >>> [(group["name"], group.get("weight_decay")) for group in parameter_groups(layer.parameters())]
    [('decay', None), ('no_decay', 0.0)]
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    decayed = [parameter for parameter in trained if _num_dimensions(parameter) > 1]
    others = [parameter for parameter in trained if _num_dimensions(parameter) <= 1]
    rate = {} if lr is None else {"lr": lr}
    groups: list[dict[str, Any]] = []
    for name, members, settings in (("decay", decayed, rate), ("no_decay", others, {"weight_decay": 0.0, **rate})):
        meshes = by_mesh(members).values()
        names = [name if number == 0 else f"{name}_{number + 1}" for number in range(len(meshes))]
        groups += [{"params": own, "name": own_name, **settings} for own_name, own in zip(names, meshes, strict=True)]
    return groups


def make_optimizer(
    make: OptimizerCallable | Sequence[OptimizerPart],
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float | None = None,
) -> Optimizer:
    """The optimizer of all trained parameters.

    Args:
        make: Function that makes the optimizer from parameter groups; or the parts of a chained one.
        named_parameters: Parameters of the model by name, trained or not.
        lr: Learning rate of all groups; by default the optimizer's own.

    Raises:
        InputError: When none is trained, one belongs to no part, a part has none, or its optimizer does not take them.
    """
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if not trained:
        raise InputError(
            "No parameter is trained: requires_grad is False for all of them, as after freeze(). Leave that call out, "
            "and choose with model.frozen and model.trained."
        )
    if callable(make):
        optimizer = _made(make, trained, lr)
        _load_states_as_saved(optimizer)
        return optimizer
    if lr is not None:
        raise InputError("The tuner finds one learning rate, but model.optimizers has several. Set their lr instead.")
    members: list[list[tuple[str, nn.Parameter]]] = [[] for _ in make]
    for name, parameter in trained:
        number = next((n for n, part in enumerate(make) if _matches(name, part.parameters)), None)
        if number is None:
            raise InputError(
                f"No part of model.optimizers has parameters that match {name}. Give the last part no parameters: it "
                "takes the rest."
            )
        members[number].append((name, parameter))
    for part, own in zip(make, members, strict=True):
        if not own:
            raise InputError(
                f"model.optimizers: the part with parameters={part.parameters} has nothing to update. Trained "
                f"parameters are called as {', '.join(name for name, _ in trained[:3])}."
            )
    parts = [_made(part.optimizer, own, None) for part, own in zip(make, members, strict=True)]
    for optimizer in parts:
        _load_states_as_saved(optimizer)
    return Chained(parts)


def instead_of(
    optimizer: OptimizerCallable, default: OptimizerCallable, parts: Sequence[OptimizerPart] | None
) -> OptimizerCallable | Sequence[OptimizerPart]:
    """The parts, if there are any, after refusing an optimizer that was given beside them; else the optimizer.

    Args:
        optimizer: Optimizer of the module; a command line fills in the default as a function of its own.
        default: The default optimizer.
        parts: Optimizers to use instead.

    Raises:
        InputError: When the optimizer is not the default.
    """
    if not parts:
        return optimizer
    if optimizer is not default and not _same(optimizer, default([nn.Parameter(torch.zeros(1))])):
        raise InputError(
            "model.optimizer and model.optimizers are both given, and only one can update the weights. Remove "
            "model.optimizer; to use it for the parameters that are left, make it the last of model.optimizers, "
            "without patterns."
        )
    return parts


def _same(make: OptimizerCallable, wanted: Optimizer) -> bool:
    """Whether a function is a class with settings, and makes this optimizer."""
    kinds = (make.func, *make.args) if isinstance(make, partial) else ()
    if type(wanted) not in kinds:
        return False
    return bool(make([nn.Parameter(torch.zeros(1))]).defaults == wanted.defaults)


def check_settings(make: OptimizerCallable | Sequence[OptimizerPart]) -> None:
    """Refuse settings that an optimizer of torch does not take, on a parameter of one matrix, before data are read.

    Other functions are not called: they may do more than that.

    Args:
        make: Function that makes the optimizer from parameter groups; or the parts of a chained one.

    Raises:
        InputError: With what torch says of them.
    """
    for one in [make] if callable(make) else [part.optimizer for part in make]:
        try:
            signature(one).bind([])
        except ValueError:  # it has none
            pass
        except TypeError as error:
            raise InputError(
                f"model.optimizer is a function that does not take parameter groups: {error}. {_GIVE}"
            ) from error
        if isinstance(one, partial) and any(_is_torchs(kind) for kind in (one.func, *one.args)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # said again when it is made
                _made(one, [("weight", nn.Parameter(torch.zeros(1, 1)))], None)


def parts_of(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that one consists of; itself, if it is no :class:`Chained`."""
    return list(getattr(optimizer, "parts", [optimizer]))


def described(optimizer: Optimizer) -> str:
    """The classes of an optimizer, and their learning rates.

    >>> described(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.5))
    'SGD with a learning rate of 0.5'
    """
    groups = {type(part).__name__: part.param_groups[0] for part in parts_of(optimizer)}
    rates = {name: float(group.get("initial_lr", group["lr"])) for name, group in groups.items()}
    return ", ".join(f"{name} with a learning rate of {rate:g}" for name, rate in rates.items())


class Chained(Optimizer):
    """Several optimizers of different parameters as one: a step is a step of each, a schedule is that of all.

    Groups and state are those of the parts, so ``state_dict`` has torch's format, with the groups of the parts in
    order; loading hands each part its own.

    Args:
        parts: Optimizers without a parameter in common.

    >>> import torch
    >>> matrix, bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    >>> chained = Chained([torch.optim.SGD([matrix], lr=0.5), torch.optim.AdamW([bias], lr=0.1)])
    >>> [group["name"] for group in chained.param_groups]
    ['SGD', 'AdamW']
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = list(parts)
        kinds = [type(part).__name__ for part in parts]
        for number, (part, kind) in enumerate(zip(parts, kinds, strict=True)):
            prefix = kind if kinds.count(kind) == 1 else f"{kind}_{number + 1}"
            for group in part.param_groups:
                group["name"] = f"{prefix}_{group['name']}" if "name" in group else prefix
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._join()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Compute the gradients once, then update the parameters of each part."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore each part from its share of the groups and states."""
        groups, begin = list(state_dict["param_groups"]), 0
        for part in self.parts:
            own, begin = groups[begin : begin + len(part.param_groups)], begin + len(part.param_groups)
            ids = {number for group in own for number in group["params"]}
            state = {number: value for number, value in state_dict["state"].items() if number in ids}
            part.load_state_dict({"state": state, "param_groups": own})
        self._join()

    def _join(self) -> None:
        """Share groups and state with the parts: loading a state dict gives them new ones."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        for part in self.parts:
            self.state.update(part.state)
            part.state = self.state


def clip_gradients(optimizer: Optimizer, most: float | None, algorithm: str | None = "norm") -> Tensor | None:
    """Clip gradients, also where they lie on different meshes, as with tensor parallelism, or in the host's memory.

    torch computes the norm of tensors of one mesh; the whole norm is the root of the sum of their squares.

    Args:
        optimizer: Optimizer whose parameters have the gradients.
        most: Maximum joint L2 norm, or maximum absolute entry with the algorithm ``value``; ``None`` for no clipping.
        algorithm: ``norm`` (same as ``None``) or ``value``.

    Returns:
        The joint L2 norm before clipping, a scalar; ``None`` if there is no gradient.

    Raises:
        InputError: With another algorithm.
    """
    if algorithm not in (None, "norm", "value"):
        raise InputError(f"gradient_clip_algorithm is {algorithm!r}; expected 'norm' or 'value'.")
    with_gradient = [parameter for parameter in parameters_of(optimizer) if parameter.grad is not None]
    groups = list(by_mesh(with_gradient).values())
    norms = [whole(nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])) for group in groups]
    if not norms:
        return None
    total: Tensor = torch.stack([norm.to(norms[0].device) for norm in norms]).norm()
    for group in groups:
        if not most:
            break
        if algorithm == "value":
            nn.utils.clip_grad_value_(group, most)
        else:
            nn.utils.clip_grads_with_norm_(group, most, total)
    return total


def by_mesh(parameters: Iterable[nn.Parameter]) -> dict[Any, list[nn.Parameter]]:
    """Parameters that lie on the same devices together; fused and foreach kernels take no mixture."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return groups


def whole(tensor: Tensor) -> Tensor:
    """The value of a sharded tensor, on every rank."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def _made(make: OptimizerCallable, named: Sequence[tuple[str, nn.Parameter]], lr: float | None) -> Optimizer:
    try:
        optimizer = make(parameter_groups((parameter for _, parameter in named), lr))
    except (ValueError, TypeError) as error:
        odd = [name for name, parameter in named if _num_dimensions(parameter) != 2]
        names = f" Not matrices are {', '.join(odd[:3])}{', …' if len(odd) > 3 else ''}." if odd else ""
        hint = f"{names} An optimizer of matrices alone is one of model.optimizers, with patterns of what it takes."
        raise InputError(
            f"The optimizer does not take its parameters or settings: {error}.{hint if '2D' in str(error) else ''}"
            f"{_hint(make, error)}"
        ) from error
    if not isinstance(optimizer, Optimizer):
        raise InputError(
            f"model.optimizer has made an object of type {type(optimizer).__name__}; expected an optimizer of torch. "
            f"{_GIVE}"
        )
    _warn_of_default_rate(make, optimizer, lr)
    if type(optimizer).__name__ == "CPUOffloadOptimizer":  # torchao's; its hooks run before the step's
        raise InputError(
            "CPUOffloadOptimizer copies each gradient to the host before it is clipped, so its steps would be others. "
            "Use trainer.strategy.class_path=lightning_sft.strategies.FSDP2Strategy with cpu_offload=true, which works "
            "on one device too."
        )
    return optimizer


def _hint(make: OptimizerCallable, error: Exception) -> str:
    """What to do where a setting is a number in quotes or has another name, or the function takes no parameters."""
    settings: dict[str, Any] = make.keywords if isinstance(make, partial) else {}
    for name, value in settings.items():
        if isinstance(value, str):
            with suppress(ValueError):
                return f" {name} is the string {value!r}: give the number, {name}={float(value)!r}."
    for name in settings if "unexpected keyword" in str(error) else ():
        own = ELSEWHERE.get(name, "").removeprefix("model.optimizer.")
        if repr(name) in str(error):
            kinds = [kind for kind in (make.func, *make.args) if _is_torchs(kind)] if isinstance(make, partial) else []
            known = [key for key in signature(kinds[0]).parameters if key != "params"] if kinds else []
            return f" Did you mean {own}?" if own in known else did_you_mean([name], known)
    return f" {_GIVE}" if isinstance(error, TypeError) else ""


def _warn_of_default_rate(make: OptimizerCallable, optimizer: Optimizer, lr: float | None) -> None:
    """Warn of a class of torch, or a partial of one, that is given no learning rate: its own suits no fine-tuning."""
    kind, given = (make.func, make.keywords) if isinstance(make, partial) else (make, {})
    rate = optimizer.defaults.get("lr")
    if _is_torchs(kind) and "lr" not in given and lr is None and rate is not None:
        name = type(optimizer).__name__
        rank_zero_warn(
            f"model.optimizer is {name} without a learning rate, so it is torch's default, {float(rate):g}; without an "
            f"optimizer it would be {DEFAULT_RATE:g}. Set it: functools.partial({name}, lr={DEFAULT_RATE:g})."
        )


def _is_torchs(kind: Any) -> bool:
    return isinstance(kind, type) and kind.__module__.startswith("torch.optim")


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _load_states_as_saved(optimizer: Optimizer) -> None:
    """Keep the dtype of loaded states: torch casts those that float to the dtype of their parameter."""
    saved: dict[Any, Mapping[str, Any]] = {}
    order: list[Any] = []

    def before(_: Optimizer, state_dict: dict[str, Any]) -> None:
        saved.update(state_dict["state"])
        order.extend(number for group in state_dict["param_groups"] for number in group["params"])

    def after(loaded: Optimizer) -> None:
        for number, parameter in zip(order, parameters_of(loaded), strict=True):
            own = loaded.state.get(parameter, {})
            for name, value in saved.get(number, {}).items():
                if type(value) is Tensor and own[name].dtype != value.dtype:
                    own[name] = value.to(own[name].device, copy=True)
        saved.clear()
        order.clear()

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(after)


def parameters_of(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    """The parameters that an optimizer updates, group by group."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _num_dimensions(parameter: Any) -> int:
    """Dimensions of the whole parameter: under ZeRO-3 a rank holds a flat shard, and the shape is stored separately."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
