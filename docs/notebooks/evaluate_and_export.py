# %% [markdown]
# # Evaluate and export
#
# From a run to numbers one can trust, and to a folder that other programs load: likelihoods, scored answers, a report,
# an export that is compared with what was trained. The model is SmolLM2-135M-Instruct after a minute of training.

# %%
from lightning_sft.machine.noise import quiet_others

quiet_others()  # no messages of other packages, as on the command line

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_sft.demos.data import write_demo_data
from lightning_sft.demos.pretrained import fetch_demo_model

model = fetch_demo_model("SmolLM2")
write_demo_data("data", num_train=48, num_test=8)

# %% [markdown]
# A config, since the same is to be fitted, tested and exported:

# %%
config = """\
trainer:
  accelerator: cpu
  precision: 32-true # on a GPU: bf16-mixed
  max_epochs: 1
  gradient_clip_val: 1.0
  log_every_n_steps: 1
  enable_progress_bar: false
  num_sanity_val_steps: -1
  default_root_dir: runs/home
  logger: false
model:
  pretrained: SmolLM2
  optimizer:
    class_path: torch.optim.AdamW
    init_args: {lr: 5.0e-4, fused: true}
  max_new_tokens: 24
data:
  train: data/train.jsonl
  val: data/test.jsonl
  test: data/test.jsonl
  tokens_per_batch: 512
"""
_ = Path("fit.yaml").write_text(config)

# %% [markdown]
# ## Train
#
# `num_sanity_val_steps: -1` is a whole validation before the training, for the report.

# %% language="bash"
# lightning-sft fit --config fit.yaml --ckpt_path last 2>&1

# %% [markdown]
# ## Score
#
# `ScoreAnswers` generates answers for `data.test` and compares them with those of the rows; `extract` is the part to
# compare beside the whole answer, here the name of the command.

# %% language="bash"
# lightning-sft test --config fit.yaml --ckpt_path last --trainer.callbacks+ lightning_sft.callbacks.ScoreAnswers \
#   --trainer.callbacks.extract '"do": "(\w+)"' 2>&1

# %% [markdown]
# Sums over the whole set, divided once: no metric depends on batches or devices. All answers are in a file; those that
# are wrong say more than a number:

# %%
answers = [json.loads(line) for line in Path("runs/home/answers.jsonl").read_text().splitlines()]
wrong = [answer for answer in answers if answer["prediction"].strip() != answer["reference"]]
print(f"{len(wrong)} of {len(answers)} are not the same")
for answer in wrong[:3]:
    print(answer["prediction"], answer["reference"], sep="\n  instead of ")

# %% [markdown]
# ## Export
#
# The folder is an ordinary model of transformers. `export` loads it again, and compares its logits with those of the
# checkpoint before it says that it is done.

# %% language="bash"
# lightning-sft export --ckpt runs/home/checkpoints/best.ckpt --out home-model 2>&1
# ls home-model

# %%
tokenizer = AutoTokenizer.from_pretrained("home-model")
plain = AutoModelForCausalLM.from_pretrained("home-model", dtype=torch.float32)
messages = [
    {"role": "system", "content": "You control a home."},
    {"role": "user", "content": "Heat the attic to 19 degrees"},
]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(plain.generate(**prompt, max_new_tokens=24)[0, prompt["input_ids"].shape[1] :]))

# %% [markdown]
# `generate` stops by itself: the stop token of the training is in the folder. `lightning-sft report runs/home` writes a
# page about the run, and `--gguf_converter` makes a file for llama.cpp and Ollama.
