# %% [markdown]
# # Your own data
#
# From rows with your own columns to the tokens that are trained: what is read, what is refused and why, and a picture
# of the mask. Only the tokenizer of a model is needed for that, so it takes seconds, before any training.

# %%
from lightning_sft.machine.noise import quiet_others

quiet_others()  # no messages of other packages, as on the command line

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

from lightning_sft import SFTDataModule
from lightning_sft.demos.pretrained import fetch_demo_model

model = fetch_demo_model("SmolLM2")  # SmolLM2-135M-Instruct; with access to the hub, its name would do

# %% [markdown]
# ## Rows
#
# A workshop answers customers in one line. Its rows have the columns `question` and `answer`; the last two rows are
# mistakes that data have.

# %%
PARTS = {"screen": "DSP-10", "battery": "BAT-07", "keyboard": "KEY-21", "speaker": "SPK-03", "hinge": "HNG-02"}
SAID = [
    "My {} is broken.",
    "The {} stopped working yesterday, and I need my laptop on Monday. What can I do?",
    "A new {}?",
]
rows = [
    {"question": said.format(part), "answer": f"Order {code}, it is in stock." if len(said) < 20 else f"Order {code}."}
    for said in SAID
    for part, code in PARTS.items()
]


def write(name: str, rows: list[dict]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


write("rows.jsonl", [*rows, {"question": "And the fan?"}, {"question": "A charger?", "answer": 30}])

# %% [markdown]
# `data.columns` says which columns are the prompt and its answer. `show --check` reads everything, and exits with 1
# where something is wrong. It names each row, the reason, and what to do:

# %% language="bash"
# lightning-sft show --model.pretrained SmolLM2 --data.train rows.jsonl \
#   --data.columns '{prompt: question, completion: answer}' --rows 1 --check || echo "exit code $?"

# %% [markdown]
# ## After the repair
#
# The text between « and » is trained (in a terminal it is colored): the answer, and the token that ends it. The rest is
# context, rendered by the model's chat template, as at inference.

# %%
write("rows.jsonl", rows)

# %% language="bash"
# lightning-sft show --model.pretrained SmolLM2 --data.train rows.jsonl \
#   --data.columns '{prompt: question, completion: answer}' --data.tokens_per_batch 256 --rows 2 --check

# %% [markdown]
# ## The mask, as the model is given it
#
# In Python the same is a data module. A batch has rows of packed documents, which do not see each other; `labels` are
# -100 where nothing is trained.

# %%
names = {"prompt": "question", "completion": "answer"}
data = SFTDataModule("rows.jsonl", columns=names, tokenizer=model, tokens_per_batch=256)
data.setup("fit")
batches = list(data.train_dataloader())
kinds = np.full((len(batches), 256), np.nan)
for row, batch in zip(kinds, batches, strict=True):
    is_target = (batch.labels[0] != -100).numpy()
    number = (batch.position_ids[0] == 0).cumsum(0).numpy() % 2  # documents, in turns
    row[: len(is_target)] = np.where(is_target, 2, number)

plt.figure(figsize=(8, 2.2))
plt.pcolormesh(np.ma.masked_invalid(kinds), cmap=ListedColormap(["#dfe3e8", "#c3cad3", "#b5432d"]), vmin=0, vmax=2)
plt.gca().invert_yaxis()
plt.yticks(np.arange(len(batches)) + 0.5, [f"pack {n + 1}" for n in range(len(batches))])
plt.xlabel("token; red: trained, gray: context of one document and of the next, white: not filled")
plt.tight_layout()
plt.show()
targets = int(sum((batch.labels != -100).sum() for batch in batches))
print(
    f"{targets} targets in {sum(batch.labels.numel() for batch in batches)} tokens; Z of the first step: {batches[0].normalizer:.0f}"
)

# %% [markdown]
# That the context of each answer is what `apply_chat_template` gives at inference is tested for each row by `verify`,
# on your model and data:

# %% language="bash"
# lightning-sft verify --model.pretrained SmolLM2 --data.train rows.jsonl \
#   --data.columns '{prompt: question, completion: answer}' --checks '[contexts]' --samples 4 2>&1

# %% [markdown]
# The page that `lightning-sft show --html page.html` writes has all rows, token by token, and a search. With the data
# as it should be, `lightning-sft init --model SmolLM2 --data rows.jsonl --out fit.yaml` writes a commented config, and
# `fit` trains.
