"""Where other packages document the names that our docstrings and signatures use, as inventories for intersphinx.

They are written before each build, so that it gives the same pages, and the same errors, with a network and without. A
name that is missing here is an error of the build: add it beside the page that documents it. Annotations name the
module that defines a class, or what it was imported as: ``NAMED_ELSEWHERE`` has what a page calls otherwise.
"""

from __future__ import annotations

import zlib
from pathlib import Path

SITES: dict[str, tuple[str, dict[str, str]]] = {
    "python": (
        "https://docs.python.org/3/",
        {
            "library/functions.html": "bool float int object type",
            "library/stdtypes.html": "bytes dict frozenset list set str tuple",
            "library/constants.html": "None",
            "library/collections.abc.html": "collections.abc.Callable collections.abc.Collection "
            "collections.abc.Iterable collections.abc.Iterator collections.abc.Mapping collections.abc.Sequence",
            "library/exceptions.html": "Exception FloatingPointError SystemExit ValueError",
            "library/pathlib.html": "pathlib.Path",
            "library/typing.html": "typing.Any typing.Literal",
        },
    ),
    "numpy": (
        "https://numpy.org/doc/stable/reference/",
        {
            "generated/numpy.ndarray.html": "numpy.ndarray",
            "generated/numpy.dtype.html": "numpy.dtype",
            "arrays.scalars.html": "numpy.int32 numpy.int64 numpy.float64",
            "typing.html": "numpy.typing.NDArray",
        },
    ),
    "torch": (
        "https://docs.pytorch.org/docs/stable/",
        {
            "tensors.html": "torch.Tensor",
            "tensor_attributes.html": "torch.dtype torch.device",
            "generated/torch.nn.Module.html": "torch.nn.Module",
            "generated/torch.nn.parameter.Parameter.html": "torch.nn.parameter.Parameter",
            "optim.html": "torch.optim.Optimizer",
        },
    ),
    "lightning": (
        "https://lightning.ai/docs/pytorch/stable/api/",
        {
            f"{name}.html": name
            for name in (
                "lightning.pytorch.callbacks.Callback",
                "lightning.pytorch.callbacks.ModelCheckpoint",
                "lightning.pytorch.callbacks.ModelSummary",
                "lightning.pytorch.callbacks.ProgressBar",
                "lightning.pytorch.cli.LightningCLI",
                "lightning.pytorch.core.LightningDataModule",
                "lightning.pytorch.core.LightningModule",
                "lightning.pytorch.strategies.ModelParallelStrategy",
                "lightning.pytorch.trainer.trainer.Trainer",
            )
        },
    ),
    "torchmetrics": (
        "https://lightning.ai/docs/torchmetrics/stable/",
        {"references/metric.html": "torchmetrics.Metric"},
    ),
    "jsonargparse": ("https://jsonargparse.readthedocs.io/en/stable/", {"": "jsonargparse.Namespace"}),
    "transformers": (
        "https://huggingface.co/docs/transformers/",
        {
            "main_classes/model": "transformers.PreTrainedModel",
            "internal/tokenization_utils": "transformers.PreTrainedTokenizerBase",
        },
    ),
}
NAMED_ELSEWHERE = {
    "numpy.int64": "np.int64",
    "numpy.float64": "np.float64",
    "numpy.typing.NDArray": "NDArray IntArray",
    "torch.Tensor": "Tensor",
    "jsonargparse.Namespace": "jsonargparse._namespace.Namespace",
    "torch.nn.Module": "torch.nn.modules.module.Module",
    "torch.optim.Optimizer": "torch.optim.optimizer.Optimizer",
    "lightning.pytorch.callbacks.Callback": "lightning.pytorch.callbacks.callback.Callback",
    "lightning.pytorch.callbacks.ModelCheckpoint": "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.ModelSummary": "lightning.pytorch.callbacks.model_summary.ModelSummary",
    "lightning.pytorch.callbacks.ProgressBar": "lightning.pytorch.callbacks.progress.progress_bar.ProgressBar",
    "lightning.pytorch.core.LightningDataModule": "lightning.pytorch.core.datamodule.LightningDataModule",
    "lightning.pytorch.core.LightningModule": "lightning.pytorch.core.module.LightningModule",
    "lightning.pytorch.strategies.ModelParallelStrategy": (
        "lightning.pytorch.strategies.model_parallel.ModelParallelStrategy"
    ),
    "torchmetrics.Metric": "torchmetrics.metric.Metric",
    "transformers.PreTrainedModel": "PreTrainedModel transformers.modeling_utils.PreTrainedModel",
    "transformers.PreTrainedTokenizerBase": (
        "PreTrainedTokenizerBase transformers.tokenization_utils_base.PreTrainedTokenizerBase"
    ),
}
_HEAD = "# Sphinx inventory version 2\n# Project: {}\n# Version: any\n# The rest is compressed using zlib.\n"


def write_inventories(folder: Path) -> dict[str, tuple[str, str]]:
    """Write an inventory for each site.

    Args:
        folder: Where; it is made.

    Returns:
        The ``intersphinx_mapping`` that reads them, and asks no network.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mapping = {}
    for project, (address, pages) in SITES.items():
        lines = [
            f"{name} py:class 1 {page}#{there} -\n"
            for page, names in pages.items()
            for there in names.split()
            for name in [there, *NAMED_ELSEWHERE.get(there, "").split()]
        ]
        path = folder / f"{project}.inv"
        path.write_bytes(_HEAD.format(project).encode() + zlib.compress("".join(lines).encode()))
        mapping[project] = (address, str(path))
    return mapping
