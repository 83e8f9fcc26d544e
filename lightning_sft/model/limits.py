"""What ids and positions a loaded model has."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import LightningModule
from transformers import PretrainedConfig, PreTrainedModel

from lightning_sft.model.pretrained import is_composite, trained_positions


def num_positions(model: PreTrainedModel) -> int | None:
    """Size of the model's table of positions, learned or fixed; ``None`` if positions are computed without limit."""
    config: PretrainedConfig = model.config
    size = trained_positions(config)
    decoder = model.get_decoder() if is_composite(model) else model  # a vision tower has a table of its own
    tensors = (*decoder.named_parameters(), *decoder.named_buffers())
    shapes = (getattr(tensor, "ds_shape", tensor.shape) for name, tensor in tensors if re.search("wpe|pos", name))
    return size if size and any(len(shape) > 1 and shape[0] >= size for shape in shapes) else None


class LimitedModule(LightningModule):
    """A module that says which ids and positions its model has; data are checked against them."""

    if TYPE_CHECKING:  # a property of the subclass

        @property
        def model(self) -> PreTrainedModel | None:
            """The model of transformers."""

    @property
    def num_embeddings(self) -> int | None:
        """Number of token ids of the model; ``None`` before it is loaded."""
        return None if self.model is None else cast(Any, self.model.get_input_embeddings()).num_embeddings

    @property
    def num_positions(self) -> int | None:
        """Size of the table of position embeddings; ``None`` if there is none, or before the model is loaded."""
        return None if self.model is None else num_positions(self.model)

    @property
    def context_length(self) -> int | None:
        """Positions that the model has been made for; ``None`` if its config does not say, or before it is loaded."""
        return None if self.model is None else trained_positions(self.model.config)
