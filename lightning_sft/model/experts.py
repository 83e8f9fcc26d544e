"""Mixtures of experts: how evenly routers spread the tokens, and the auxiliary loss that evens it out.

Of a document d with n_d tokens, in a layer with E experts of which each token takes k,

    f_de = (tokens of d that take expert e) / n_d         P_de = (1 / n_d) · Σ_{t in d} s_te
    R_d  = mean over the layers of  E · Σ_e f_de · P_de   (k where all experts are taken equally often)

s_t are the router's scores of a token, normalized to 1: softmax(z), or sigmoid(z) / Σ sigmoid(z), whichever the router
weighs experts by. The loss is that of Fedus et al. 2021 (Switch Transformer, equations 4 to 6) for k experts, as in
``load_balancing_loss_func`` of transformers, of each document by itself, as the sequence-wise loss of DeepSeek-AI 2024
(DeepSeek-V3, equations 17 to 20; which divides by k). f · P is a product of two means over tokens, so over all tokens
of a micro-batch it would depend on how a step is split. Over documents it is a sum, and the step minimizes

    − Σ_t w_t · log Pr(t) / Z  +  router_loss · Σ_d W_d · R_d / Z        W_d = Σ_{t in d} w_t

A document thus weighs what its targets weigh, those of padding nothing. No gradient goes through f, which counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from lightning_sft.io.arguments import NonNegative
from lightning_sft.machine.contexts import eval_mode
from lightning_sft.machine.host_copy import without_waiting
from lightning_sft.model.attention.documents import lengths_from
from lightning_sft.model.backbone import backbone_and_head, hidden_states
from lightning_sft.types import Batch, InputError, LogLikelihood, widest

RouterLoss = NonNegative | Literal["config"]
"""Coefficient of the auxiliary loss, or ``"config"``: that of the model's configuration."""

Score = Literal["softmax", "sigmoid", "none"]

_TOKENS = 32  # in the input that routers are tried on
_NONE = "it has no experts"
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")  # of configurations whose models have this loss


@dataclass(frozen=True)
class Router:
    """A router, and what its forward pass returns where.

    Args:
        module: Module that computes logits and chooses experts.
        num_experts: Number of experts E.
        logits: Index of the logits ``[T, E]`` in the output.
        chosen: Index of the chosen experts ``[T, k]`` in the output, or of weights ``[T, E]`` that are 0 for others.
        num_chosen: Number of experts k that a token takes.
        score: Function from logits to scores; ``none`` where the logits are normalized scores already.
    """

    module: nn.Module
    num_experts: int
    logits: int
    chosen: int
    num_chosen: int
    score: Score

    def choice(self, output: Any) -> Tensor:
        """The chosen experts of each token, ``[T, k]``."""
        found: Tensor = output[self.chosen]
        return found.topk(self.num_chosen).indices if found.is_floating_point() else found


class Routers:
    """The routers of a model: records their outputs in training, and computes what follows from them.

    Args:
        routers: Routers in the order of the layers.
        coefficient: Coefficient of the auxiliary loss; ``None`` to not compute it.
    """

    def __init__(self, routers: Sequence[Router], coefficient: float | None = None) -> None:
        self.routers, self.coefficient = list(routers), coefficient
        self._is_recording = False
        for router in self.routers:
            router.module.register_forward_hook(self._note)

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._is_recording:  # not while a backward pass recomputes layers
            cast(Any, module)._routing = output

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the outputs of the routers until :meth:`balance` takes them."""
        self._is_recording = True
        try:
            yield
        finally:
            self._is_recording = False

    def balance(self, batch: Batch) -> tuple[Tensor | None, Tensor]:
        """``Σ_d W_d · R_d`` of a batch whose forward pass has been recorded, and the load of each expert.

        Args:
            batch: Batch whose forward pass has been recorded.

        Returns:
            The loss, a scalar with a gradient, or ``None`` without a coefficient; and the number of tokens of each
            expert of each layer, ``[layers · E]``.
        """
        documents = _Documents(batch)
        losses, loads = [], []
        for router in self.routers:
            output = vars(router.module).pop("_routing")
            taken = documents.taken(router.choice(output), router.num_experts)
            loads.append(taken.sum(0))
            if self.coefficient is not None:
                losses.append(documents.loss(_scores(output[router.logits], router.score), taken))
        load = torch.cat(loads).to(widest(batch.input_ids.device))
        return torch.stack(losses).mean() if losses else None, load

    def objective(self, likelihood: LogLikelihood) -> Tensor:
        """``− Σ_t w_t · log Pr(t)`` of a micro-batch, with the auxiliary loss if it is trained on."""
        if not self.coefficient or likelihood.router_loss is None:
            return -likelihood.total
        return self.coefficient * likelihood.router_loss.to(likelihood.total) - likelihood.total

    def sums(self, likelihoods: Sequence[LogLikelihood]) -> Tensor:
        """Sums over micro-batches of what :meth:`balance` returns: the loss, 0 without it, and the load of experts."""
        loads = torch.stack([cast(Tensor, likelihood.expert_load) for likelihood in likelihoods]).sum(0)
        losses = [likelihood.router_loss for likelihood in likelihoods if likelihood.router_loss is not None]
        return torch.cat([torch.stack(losses).sum()[None].to(loads) if losses else loads.new_zeros(1), loads])

    def metrics(self, sums: Tensor, weight: float) -> dict[str, Tensor]:
        """The metrics of a step.

        Args:
            sums: Result of :meth:`sums` of the step, over all ranks.
            weight: Σ_t w_t of the step.
        """
        loss, load = sums[0], sums[1:]
        of_layers = load.split([router.num_experts for router in self.routers])
        found = {
            "expert_imbalance": torch.stack([own.max() / own.mean() for own in of_layers]).mean(),
            "unused_experts": (load == 0).to(load).mean(),
        }
        return found | {"router_loss": loss / weight} if self.coefficient is not None else found


class _Documents:
    """Sums over the tokens of each document of a batch, without its padding."""

    def __init__(self, batch: Batch) -> None:
        device = batch.input_ids.device
        spans = batch.spans or lengths_from((batch.position_ids == 0).flatten().cpu())
        self.spans = without_waiting(torch.tensor(spans, device="cpu"), device)  # [D]
        self.number = batch.documents().flatten()  # [B · N]
        self.is_token = torch.ones_like(self.number, dtype=torch.float32)
        if batch.lengths:
            self.is_token = (batch.position_ids.flatten() < batch.of_documents(batch.lengths)[self.number]).float()
        self.num_tokens = self._sum(self.is_token)  # [D]
        self.weight = self._sum(batch.target_weights.flatten())  # [D]

    def taken(self, chosen: Tensor, num_experts: int) -> Tensor:
        """How many tokens of each document take each expert, ``[D, E]``, from the choice ``[B · N, k]``."""
        places = self.number[:, None] * num_experts + chosen.view(len(self.number), -1)
        count = self.is_token.new_zeros(len(self.spans) * num_experts)  # integers: their order does not matter
        count.index_add_(0, places.flatten(), self.is_token[:, None].expand_as(places).flatten())
        return count.view(-1, num_experts)

    def loss(self, scores: Tensor, taken: Tensor) -> Tensor:
        """``Σ_d W_d · E · Σ_e f_de · P_de`` of a layer.

        Args:
            scores: Normalized scores of the tokens, ``[B · N, E]``.
            taken: How many tokens of each document take each expert, ``[D, E]``.
        """
        size = self.num_tokens.clamp(min=1).to(scores)[:, None]
        likely = self._sum(scores * self.is_token.to(scores)[:, None]) / size  # P, [D, E]
        of_documents = scores.shape[1] * (taken.to(scores) / size * likely).sum(1)
        return (self.weight.to(scores) * of_documents).sum()

    def _sum(self, values: Tensor) -> Tensor:
        """Sums over documents, ``[B · N, ...]`` to ``[D, ...]``; in order, hence deterministic, on CPUs and CUDA."""
        if values.device.type in ("cpu", "cuda"):
            return torch.segment_reduce(values, "sum", lengths=self.spans, axis=0, unsafe=True)
        return values.new_zeros(len(self.spans), *values.shape[1:]).index_add(0, self.number, values)


def read_routers(
    model: PreTrainedModel, router_loss: RouterLoss | None, tried: PreTrainedModel | None = None
) -> Routers | None:
    """The routers of a mixture of experts; ``None`` if the model has none, or none that can be read.

    Args:
        model: Causal language model.
        router_loss: Coefficient of the auxiliary loss.
        tried: Model with a router of each kind to run instead; by default the model itself.

    Raises:
        InputError: When there is to be an auxiliary loss, but routers cannot be read or give no coefficient.
    """
    found, reason = find_routers(tried or model)
    if found and tried is not None:
        known = {_kind(router.module): router for router in found}
        found = [replace(known[_kind(module)], module=module) for module, _ in _recorded(model)]
    if router_loss is not None and not found:
        raise InputError(
            f"model.router_loss={router_loss} cannot be computed for {type(model).__name__}: {reason}. Leave it out."
        )
    if not found and reason != _NONE:
        rank_zero_info(f"The balance of experts is not logged: {reason}.")
    return Routers(found, _coefficient(router_loss, model)) if found else None


def _coefficient(asked: RouterLoss | None, model: PreTrainedModel) -> float | None:
    if asked != "config":
        return asked
    config = model.config.get_text_config()
    found = next((getattr(config, name) for name in _COEFFICIENTS if getattr(config, name, None) is not None), None)
    if found is None:
        raise InputError(
            f"model.router_loss=config, but the configuration of {type(model).__name__} has no "
            f"{_COEFFICIENTS[0]}. Give a number, such as model.router_loss=0.001."
        )
    return float(found)


def find_routers(model: PreTrainedModel) -> tuple[list[Router], str]:
    """The routers of a model, found among the outputs that transformers records, and tried on a few random tokens.

    Args:
        model: Causal language model.

    Returns:
        The routers; or none, and why.
    """
    backbone, _ = backbone_and_head(model)
    found = _recorded(model)
    if not found:
        has_experts = any("Experts" in type(module).__name__ for module in backbone.modules())
        return [], "transformers does not record the logits of its routers" if has_experts else _NONE
    outputs: dict[nn.Module, list[Any]] = {module: [] for module, _ in found}
    hooks = [module.register_forward_hook(lambda m, _, output: outputs[m].append(output)) for module in outputs]
    embeddings: Any = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(embeddings.num_embeddings, (1, _TOKENS), generator=generator, device="cpu")
    try:
        with eval_mode(model):
            hidden_states(backbone, ids.to(embeddings.weight.device))
        return [_read(module, place, outputs[module]) for module, place in found], ""
    except _UnreadableError as error:
        return [], str(error)
    finally:
        for hook in hooks:
            hook.remove()


def _recorded(model: PreTrainedModel) -> list[tuple[nn.Module, int]]:
    """The modules whose outputs transformers records as logits of routers, and where in the output these are."""
    backbone, _ = backbone_and_head(model)
    recorders = [recorder for part in _models(model, backbone) for recorder in _recorders(part)]
    places = ((module, _place(name, module, recorders)) for name, module in backbone.named_modules())
    return [(module, place) for module, place in places if place is not None]


def _kind(router: nn.Module) -> tuple[type, tuple[torch.Size, ...]]:
    return type(router), tuple(parameter.shape for parameter in router.parameters())


class _UnreadableError(Exception):
    """A router returns something else than logits and the experts it chooses."""


def _read(module: nn.Module, place: int, outputs: list[Any]) -> Router:
    """What a router returns where, from its outputs in one forward pass."""
    name = type(module).__name__
    if len(outputs) != 1:
        raise _UnreadableError(f"{name} runs {len(outputs)} times in a forward pass")
    output = outputs[0] if isinstance(outputs[0], tuple) else (outputs[0],)
    of_tokens = {i: part for i, part in enumerate(output) if getattr(part, "shape", ())[:-1] == (_TOKENS,)}
    logits = of_tokens.pop(place, None)
    if logits is None:
        raise _UnreadableError(f"{name} does not return the logits of each token")
    chosen = next((i for i, part in of_tokens.items() if not part.is_floating_point()), None)
    weights = next((part for part in of_tokens.values() if part.is_floating_point()), None)
    if chosen is None and weights is not None and weights.shape == logits.shape:  # 0 for experts that are not chosen
        chosen = next(i for i, part in of_tokens.items() if part is weights)
        weights = weights.topk(int(weights.count_nonzero(1).max())).values
    if chosen is None or weights is None:
        raise _UnreadableError(f"{name} does not return the experts of each token and their weights")
    router = Router(module, logits.shape[1], place, chosen, weights.shape[1], "softmax")
    score = _score(logits.double(), router.choice(output), weights.double(), logits.dtype)
    if score is None:
        raise _UnreadableError(f"{name} weighs experts neither by softmax nor by sigmoid of its logits")
    return replace(router, score=score)


def _score(logits: Tensor, chosen: Tensor, weights: Tensor, dtype: torch.dtype) -> Score | None:
    """The function of the logits that the weights of the chosen experts are proportional to.

    A single expert whose weight is 1 says nothing; softmax is taken then, as by transformers.
    """
    if bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-2).all()):
        return "none"
    is_single = chosen.shape[1] == 1
    if is_single and bool((weights == weights[0]).all()):
        return "softmax"
    functions: dict[Score, Tensor] = {"softmax": logits.softmax(1), "sigmoid": logits.sigmoid()}
    errors: dict[Score, float] = {}
    for name, scores in functions.items():
        ratio = weights / scores.gather(1, chosen)  # constant over the experts of a token, or over tokens
        of_token = ratio if not is_single else ratio.T
        errors[name] = float(((of_token.amax(1) - of_token.amin(1)) / of_token.abs().mean(1)).max())
    best = min(errors, key=lambda name: errors[name])
    return best if errors[best] < (1e-3 if dtype.itemsize >= 4 else 5e-2) else None


def _scores(logits: Tensor, score: Score) -> Tensor:
    """Normalized scores ``[T, E]`` in float32, or float64."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if score == "softmax":
        return wide.softmax(1)
    scores = wide.sigmoid() if score == "sigmoid" else wide
    return scores / scores.sum(1, keepdim=True)


def _models(model: PreTrainedModel, backbone: nn.Module) -> list[PreTrainedModel]:
    """The models of transformers around and inside the backbone."""
    inside = [part for part in backbone.modules() if isinstance(part, PreTrainedModel)]
    return inside if model in inside else [model, *inside]


def _recorders(model: PreTrainedModel) -> list[OutputRecorder]:
    given: Any = (model._can_record_outputs or {}).get("router_logits", [])
    specs = given if isinstance(given, list) else [given]
    return [spec for spec in specs if isinstance(spec, OutputRecorder) and spec.target_class is not None]


def _place(name: str, module: nn.Module, recorders: Sequence[OutputRecorder]) -> int | None:
    """Where in its output a router returns its logits; ``None`` for other modules."""
    for recorder in recorders:
        is_named = recorder.layer_name is None or f".{recorder.layer_name}." in f".{name}."
        if is_named and isinstance(module, recorder.target_class):
            return recorder.index
    return None
