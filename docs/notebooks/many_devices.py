# %% [markdown]
# # Many devices on one CPU
#
# A step on two devices should be the step on one: the sum over all its target tokens, divided once. Two processes of
# this CPU are enough to see whether it is, in numbers. On GPUs the script is the same without `accelerator="cpu"`.

# %%
from lightning_sft.machine.noise import quiet_others

quiet_others()  # no messages of other packages, as on the command line

import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from lightning_sft.demos import tiny_pretrained
from lightning_sft.demos.data import write_demo_data

tiny_pretrained("tiny", num_key_value_heads=2, max_position_embeddings=512)
write_demo_data(".", num_train=48, num_test=8)

# %% [markdown]
# ## One script for any number of devices
#
# A notebook has one process, so the script stands in a file; Lightning starts the others. It trains in float64 for one
# epoch, and keeps the first gradient (a step of gradient descent with learning rate 1 changes the weights by it) and
# the weights at the end.

# %%
# %%writefile train.py
import sys
from functools import partial

import torch
from lightning.pytorch import Callback, Trainer

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.machine.noise import quiet_others


class KeepGradient(Callback):
    def on_train_start(self, trainer, module):
        self.before = flat(module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 1:
            self.gradient = self.gradient if hasattr(self, "gradient") else self.before - flat(module)


def flat(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


if __name__ == "__main__":
    quiet_others()
    devices, accumulate, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    keep = KeepGradient()
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        accumulate_grad_batches=accumulate,
        precision="64-true",
        max_epochs=1,
        callbacks=[keep],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = SFTModule("tiny", optimizer=partial(torch.optim.SGD, lr=1.0), schedule="constant")
    trainer.fit(module, SFTDataModule("train.jsonl", tokens_per_batch=512))
    if trainer.is_global_zero:
        torch.save({"gradient": keep.gradient, "weights": flat(module), "steps": trainer.global_step}, out)

# %% [markdown]
# Keep devices × `accumulate_grad_batches` the same, and the steps are the same: 4 micro-batches in each.

# %% language="bash"
# python train.py 1 4 one.pt > log.txt 2>&1
# python train.py 2 2 two.pt >> log.txt 2>&1

# %%
one, two = torch.load("one.pt"), torch.load("two.pt")


def difference(name: str) -> float:
    return float((one[name] - two[name]).norm() / one[name].norm())


print(f"one process: {one['steps']} steps; two processes: {two['steps']} steps")
print(f"relative difference of the first gradient: {difference('gradient'):.1e}")
print(f"relative difference of the last weights:   {difference('weights'):.1e}")
assert difference("gradient") < 1e-12 and difference("weights") < 1e-10

# %% [markdown]
# ## From the command line
#
# `lightning-sft fit` takes the same: `--trainer.devices` and `--trainer.strategy`, here FSDP2, which shards parameters,
# gradients and optimizer states over the devices.

# %% language="bash"
# flags="--model.pretrained tiny --data.train train.jsonl --data.tokens_per_batch 512 --trainer.max_epochs 2"
# flags="$flags --trainer.accelerator cpu --trainer.precision 32-true --ckpt_path last"
# flags="$flags --model.optimizer.class_path torch.optim.AdamW --model.optimizer.init_args.lr 1e-2"
# lightning-sft fit $flags --trainer.accumulate_grad_batches 4 --trainer.default_root_dir runs/one >> log.txt 2>&1
# lightning-sft fit $flags --trainer.accumulate_grad_batches 2 --trainer.default_root_dir runs/fsdp2 \
#   --trainer.devices 2 --trainer.strategy fsdp2 >> log.txt 2>&1


# %%
def read(run: str, file: str) -> list[dict]:
    return [json.loads(line) for line in Path("runs", run, file).read_text().splitlines()]


def losses(run: str) -> list[float]:
    return [line["train/loss"] for line in read(run, "metrics.jsonl") if "train/loss" in line]


plt.figure(figsize=(6, 2.8))
for run, style in {"one": "-", "fsdp2": ":"}.items():
    furthest = max(abs(a - b) for a, b in zip(losses(run), losses("one"), strict=True))
    print(
        f"{run:<5}  {len(losses(run))} steps, loss {losses(run)[-1]:.4f}; largest difference from one: {furthest:.0e}"
    )
    plt.plot(losses(run), style, label=run, linewidth=2.5)
    assert furthest < 1e-4
plt.xlabel("step")
plt.ylabel("train/loss")
plt.legend()
plt.tight_layout()
plt.show()

# %% [markdown]
# The sample log says which rank had which rows, and the normalizer Z of each step, which is planned before the step
# over all micro-batches and ranks:

# %%
for run in ("one", "fsdp2"):
    step = read(run, "samples.jsonl")[0]
    print(f"{run}: Z = {step['normalizer']:.0f}")
    for rank, batches in enumerate(step["samples"]):
        print(f"  rank {rank}:", *(f"{len(rows)} rows" for rows in batches))

# %% [markdown]
# A run of one number of devices resumes on another, with devices × `accumulate_grad_batches` the same, and `lightning-sft
# export` reads the checkpoints of all strategies.
