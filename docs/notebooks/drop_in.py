# %% [markdown]
# # Your own LightningModule, and what `accumulate_grad_batches` averages
#
# You have a LightningModule that fine-tunes a language model, and it returns the mean loss of its batch. With
# `accumulate_grad_batches=4`, Lightning averages the four means. Where micro-batches have different numbers of target
# tokens, that is not the gradient of one batch four times as large. This notebook measures the difference on your kind
# of module, and replaces first the module, then the data.
#
# Everything is in float64 on a tiny model with random weights, so that what is left of a difference is a difference,
# not rounding.

# %%
from lightning_sft.machine.noise import quiet_others

quiet_others()  # no messages of other packages, as on the command line

import json
import logging
import warnings
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from IPython.display import clear_output
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.demos import tiny_pretrained

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", "You defined a `validation_step`")

tiny_pretrained("tiny", max_position_embeddings=512)
answers = ["No.", "Yes, and it will rain until Thursday.", "Ask again later.", "Maybe. " * 20]
rows = [{"prompt": f"Question {i}: will it rain?", "completion": answers[i % 4]} for i in range(16)]
Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
print(*(f"{len(answer):>4} characters  {answer[:60]!r}" for answer in answers), sep="\n")

# %% [markdown]
# ## Your module
#
# As in most projects: a Hugging Face model, whose loss is the mean over the targets of the batch.


# %%
class YourModule(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained("tiny")

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


tokenizer = AutoTokenizer.from_pretrained("tiny")


def encoded(row: dict) -> dict:
    prompt, answer = (tokenizer(row[key] + "\n").input_ids for key in ("prompt", "completion"))
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def your_loader(batch_size: int) -> DataLoader:
    return DataLoader([encoded(row) for row in rows], batch_size, collate_fn=DataCollatorForSeq2Seq(tokenizer))


# %% [markdown]
# One step of gradient descent with learning rate 1 changes the weights by the gradient. It takes all 16 rows: in one
# batch, or in 16 micro-batches.


# %%
def weights(module: LightningModule) -> torch.Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in module.parameters()])


def gradient(module: LightningModule, accumulate: int, data) -> torch.Tensor:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(accelerator="cpu", precision="64-true", max_steps=1, accumulate_grad_batches=accumulate, **quiet)
    trainer.fit(module, data)
    clear_output()  # what each run says of its data
    return weights(YourModule()) - weights(module)  # both begin with the weights of the folder "tiny"


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of two gradients, relative to the first."""
    return float((one - other).norm() / one.norm())


whole = gradient(YourModule(), 1, your_loader(16))
accumulated = gradient(YourModule(), 16, your_loader(1))
print(
    f"your module, 16 micro-batches against one batch: {difference(whole, accumulated):.1%} of the gradient is different"
)

# %% [markdown]
# The accumulated step is another objective: each row counts the same, however long its answer. A token of a short
# answer weighs many times what a token of a long answer does.

# %%
targets = torch.tensor([sum(label != -100 for label in encoded(row)["labels"]) for row in rows[:4]])
plt.figure(figsize=(6, 2.6))
plt.bar([str(int(n)) for n in targets], targets.double().mean() / targets, label="mean of means")
plt.axhline(1, color="black", label="one batch")
plt.xlabel("target tokens of the micro-batch")
plt.ylabel("weight of each token")
plt.legend()
plt.tight_layout()
plt.show()

# %% [markdown]
# ## Our module, your data
#
# `SFTModule` takes the same batches. It sums over the step and divides once, so the two ways are the same gradient, and
# that of your one large batch: up to float32, in which transformers computes norms and its loss whatever the model is in.


# %%
def our_module() -> SFTModule:
    return SFTModule("tiny", optimizer=partial(torch.optim.SGD, lr=1.0))


ours = gradient(our_module(), 1, your_loader(16))
ours_accumulated = gradient(our_module(), 16, your_loader(1))
print(f"SFTModule, 16 micro-batches against one batch: {difference(ours, ours_accumulated):.1e}")
print(f"SFTModule against your one batch:              {difference(whole, ours_accumulated):.1e}")
assert difference(ours, ours_accumulated) < 1e-7 and difference(whole, ours_accumulated) < 1e-6
assert difference(whole, accumulated) > 0.05

# %% [markdown]
# ## Our data, your module
#
# `SFTDataModule` renders rows with the chat template, packs them, and plans each step: a batch has the `normalizer` Z,
# the number of targets of the whole step. What Lightning divides by is multiplied back, the accumulation and the number
# of processes (here one); that is all your module needs.


# %%
class YourModuleWithZ(YourModule):
    def training_step(self, batch, batch_idx):
        logits = self.model(batch.input_ids, position_ids=batch.position_ids).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
        total = losses @ batch.target_weights.flatten().to(losses)
        return total * self.trainer.accumulate_grad_batches * self.trainer.world_size / batch.normalizer


def our_data(tokens_per_batch: int) -> SFTDataModule:
    return SFTDataModule("train.jsonl", tokenizer="tiny", tokens_per_batch=tokens_per_batch, packing="padded")


one = gradient(YourModuleWithZ(), 1, our_data(8192))
split = gradient(YourModuleWithZ(), 8, our_data(512))
print(f"your module with Z, 8 micro-batches against one: {difference(one, split):.1e}")

# %% [markdown]
# ## Both
#
# Together they also pack documents into rows that do not see each other, and resume a killed run bit for bit.

# %%
both = gradient(our_module(), 8, SFTDataModule("train.jsonl", tokens_per_batch=512))
print(f"both, packed, against your module with Z in one batch: {difference(one, both):.1e}")
assert difference(one, split) < 1e-12 and difference(one, both) < 1e-10
