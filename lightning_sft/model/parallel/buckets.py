"""The order in which DistributedDataParallel adds gradients of ranks, the same in every step."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def settle_buckets(model: nn.Module | None) -> None:
    """Have DistributedDataParallel choose its buckets of gradients now, rather than after its first backward pass.

    It starts with buckets in reverse order of the parameters. After one backward pass it takes new ones, in the order
    in which gradients arrived. All-reduce adds the ranks in an order that depends on the place in a bucket, so with
    three or more ranks the first step of a resumed run would be rounded otherwise than in a run that was never
    interrupted. Here the first backward pass is one of zeros. It leaves no gradient. Other strategies are left alone.

    Args:
        model: The model as the strategy has wrapped it; every process must call this.
    """
    if not isinstance(model, DistributedDataParallel) or model.find_unused_parameters or model.static_graph:
        return  # these keep their buckets
    reducer, total = model.reducer, torch.zeros(())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:  # the last one gets its gradient first, as in a model
        total = total.to(parameter.device) + 0 * parameter.sum()
    reducer.prepare_for_forward()
    reducer.prepare_for_backward([])
    total.backward()
    reducer._rebuild_buckets()
    for parameter in trained:
        parameter.grad = None
