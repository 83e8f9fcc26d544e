"""DeepSpeed on CPUs over gloo, for tests: Lightning's strategy without its checks for CUDA."""

from __future__ import annotations

import os

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, ParallelStrategy


class DeepSpeedOnCPU(DeepSpeedStrategy):
    def __init__(self, stage: int) -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
        import deepspeed

        # gloo does it all: its own collectives on shared memory are compiled, and hang on some machines
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        super().__init__(stage=stage, process_group_backend="gloo", logging_batch_size_per_gpu=1)
        assert isinstance(self.config, dict)
        self.config["zero_force_ds_cpu_optimizer"] = False  # it would be compiled

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)

    def setup_environment(self) -> None:
        ParallelStrategy.setup_environment(self)
        self.setup_distributed()

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()
