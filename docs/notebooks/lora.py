# %% [markdown]
# # LoRA on a laptop
#
# Low-rank adapters train a few million parameters beside frozen weights. Here SmolLM2-135M-Instruct learns to answer
# requests at home in a small JSON language, in a minute or two on two CPU cores. With a larger model and a GPU the
# lines are the same.

# %%
from lightning_sft.machine.noise import quiet_others

quiet_others()  # no messages of other packages, as on the command line

import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import HFExport, RunSummary
from lightning_sft.demos.data import write_demo_data
from lightning_sft.demos.pretrained import fetch_demo_model

model = fetch_demo_model("SmolLM2")
write_demo_data("data", num_train=64, num_test=8)
print(*Path("data/train.jsonl").read_text().splitlines()[:2], sep="\n")

# %% [markdown]
# ## Before

# %%
QUESTIONS = [json.loads(line) for line in Path("data/test.jsonl").read_text().splitlines()[:2]]
tokenizer = AutoTokenizer.from_pretrained(model)


def answers(model: torch.nn.Module) -> list[str]:
    found = []
    for row in QUESTIONS:
        messages = [{"role": "system", "content": row["system"]}, {"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            out = model.generate(**prompt, max_new_tokens=24, do_sample=False)
        found.append(tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    return found


before = answers(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
for row, answer in zip(QUESTIONS, before, strict=True):
    print(f"{row['prompt']}\n  {answer!r}")

# %% [markdown]
# ## Train
#
# `lora` is all that makes it LoRA. The learning rate is some ten times that of whole models.

# %%
module = SFTModule(
    model,
    lora={"r": 16, "alpha": 32},
    optimizer=lambda groups: torch.optim.AdamW(groups, lr=2e-3, weight_decay=0.0, fused=True),
)
data = SFTDataModule("data/train.jsonl", val="data/test.jsonl", tokens_per_batch=512)
trainer = Trainer(
    accelerator="cpu",
    max_epochs=1,
    gradient_clip_val=1.0,
    log_every_n_steps=1,
    num_sanity_val_steps=-1,  # a whole validation before the training
    logger=CSVLogger(".", name="logs", version=0),
    callbacks=[RunSummary(), HFExport("exports")],
    enable_checkpointing=False,
    enable_progress_bar=False,
)
trainer.fit(module, data)

# %%
import csv

lines = list(csv.DictReader(Path("logs/version_0/metrics.csv").open()))
losses = [float(line["train/loss"]) for line in lines if line.get("train/loss")]
plt.figure(figsize=(6, 2.6))
plt.plot(range(1, len(losses) + 1), losses)
plt.xlabel("step")
plt.ylabel("train/loss")
plt.ylim(0)
plt.tight_layout()
plt.show()
print(f"loss on {data.splits['val'].account.num_rows} held-out rows: {trainer.callback_metrics['val/loss']:.3f}")

# %% [markdown]
# ## Merge and compare
#
# `HFExport` has added the adapters to the weights, and compared the folder with the model in training. What plain
# transformers loads from it is the model that was trained:

# %%
after = answers(AutoModelForCausalLM.from_pretrained("exports/final", dtype=torch.float32))
for row, answer in zip(QUESTIONS, after, strict=True):
    print(f"{row['prompt']}\n  {answer!r}, expected {row['completion']!r}")

# %% [markdown]
# On the command line this is `lightning-sft fit --config configs/recipes/smollm2_lora.yaml`, then `lightning-sft
# export`; QLoRA is `model.quantize: 4bit` beside it, and a checkpoint has the adapters alone.
