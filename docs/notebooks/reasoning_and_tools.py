# %% [markdown]
# # Reasoning and tools
#
# Conversations in which the assistant thinks and calls functions: which tokens are trained, and in which context.
# Templates of reasoning models drop the thoughts of earlier turns, so a conversation is not one sequence any more. A
# tiny model with random weights stands in for yours, with a template in the manner of Qwen 3.

# %%
from lightning_sft.machine.noise import quiet_others

quiet_others()  # no messages of other packages, as on the command line

import json
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from transformers import AutoTokenizer

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import RunSummary
from lightning_sft.data.inspect.documents import documents
from lightning_sft.demos import tiny_pretrained

tiny_pretrained("tiny", hidden_size=64, intermediate_size=128, head_dim=32, max_position_embeddings=2048)
Path("template.jinja").write_text("""\
{%- if tools %}<|im_start|>system
Functions: {% for tool in tools %}{{ tool.function.name }} {% endfor %}<|im_end|>
{% endif %}
{%- set last = namespace(user=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content and loop.index0 > last.user %}<think>
{{ m.reasoning_content }}
</think>
{% endif %}
{{- m.content }}{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>
{% endif %}{% endif %}""")
tokenizer = AutoTokenizer.from_pretrained("tiny")
tokenizer.chat_template = Path("template.jinja").read_text()

# %% [markdown]
# ## Rows
#
# A thought is in `reasoning_content`, a call in `tool_calls`, its result in a turn of the role `tool`. Then the user
# asks again.

# %%
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Weather now.", "parameters": CITY}}]


def row(city: str, sky: str) -> dict:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
    rainy = sky == "rain"
    messages = [
        {"role": "user", "content": f"Umbrella in {city}?"},
        {"role": "assistant", "reasoning_content": "Ask for the weather.", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "weather", "content": sky},
        {"role": "assistant", "reasoning_content": f"It says {sky}.", "content": "Yes." if rainy else "No."},
        {"role": "user", "content": "And a hat?"},
        {"role": "assistant", "reasoning_content": "Sun needs a hat.", "content": "No." if rainy else "Yes."},
    ]
    return {"messages": messages, "tools": TOOLS}


cities = ["Oslo", "Rome", "Lima", "Bonn", "Kyiv", "Bath"]
rows = [row(city, "rain" if number % 2 else "sun") for number, city in enumerate(cities)]
Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

# %% [markdown]
# ## What is trained
#
# One row, two sequences. In the first, the call and the first answer are trained, each with its thought. The second
# question makes the template drop those thoughts, so the last answer is trained in a sequence of its own, in the
# context that inference gives it: earlier turns without thoughts. The result of the call and the questions are context.

# %%
data = SFTDataModule("train.jsonl", tokenizer="tiny", chat_template="template.jinja", tokens_per_batch=1024)
data.setup("fit")
first = [
    document for batch in data.train_dataloader() for document in documents(batch) if document.provenance.endswith(":1")
]
for document in sorted(first, key=len):
    print(f"--- {len(document)} tokens, {document.num_targets} trained")
    text, was_target = "", False
    for token, weight in zip(document.input_ids.tolist(), document.target_weights.tolist(), strict=True):
        text += ("«" if weight and not was_target else "»" if was_target and not weight else "") + tokenizer.decode(
            [token]
        )
        was_target = weight > 0
    print(text + "»" * was_target)

# %% [markdown]
# Parity, checked by hand: what comes before each answer is `apply_chat_template` of the turns before it, token for
# token.

# %%
messages, contexts = rows[0]["messages"], set()
for document in first:
    is_target = document.target_weights > 0
    begins = [i for i in range(1, len(document)) if is_target[i] and not is_target[i - 1]]
    contexts |= {tuple(document.input_ids[:begin].tolist()) for begin in begins}
for turn in (1, 3, 5):
    given = tokenizer.apply_chat_template(messages[:turn], tools=TOOLS, add_generation_prompt=True, return_dict=False)
    print(f"context of turn {turn + 1}: {len(given)} tokens, the same: {tuple(given) in contexts}")
    assert tuple(given) in contexts

# %% [markdown]
# ## Thoughts that are not trained
#
# `data.thoughts="mask"` makes thoughts context, and trains what follows. Rows without thoughts get
# `enable_thinking=False`, a variable of the template: the empty thought that the template then writes is context, too.
# The two cannot be mixed by accident: with `enable_thinking=False`, rows that have thoughts are refused.

# %%
plain = [{"messages": [{**m, "reasoning_content": ""} for m in row["messages"]], "tools": TOOLS} for row in rows]
Path("plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))


def num_targets(path: str, **settings) -> int:
    data = SFTDataModule(path, tokenizer="tiny", chat_template="template.jinja", **settings)
    data.setup("fit")
    return sum(int((batch.labels != -100).sum()) for batch in data.train_dataloader())


print(f"{num_targets('train.jsonl'):,} targets with thoughts")
print(f"{num_targets('train.jsonl', thoughts='mask'):,} targets with thoughts as context")
print(f"{num_targets('plain.jsonl', chat_template_kwargs={'enable_thinking': False}):,} targets without thoughts")

# %% [markdown]
# ## Train, and answer a call
#
# The tiny model learns these few rows by heart, which is all that it can. It is asked as your program would ask: with
# the functions, up to a call, and again with the result.

# %%
torch.manual_seed(0)
module = SFTModule("tiny", optimizer=lambda groups: torch.optim.AdamW(groups, lr=6e-3), warmup=0.1, kernels="none")
quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
trainer = Trainer(accelerator="cpu", max_epochs=60, gradient_clip_val=1.0, callbacks=[RunSummary()], **quiet)
trainer.fit(module, SFTDataModule("train.jsonl", chat_template="template.jinja", tokens_per_batch=512))
print(f"loss of the last step: {trainer.callback_metrics['train/loss']:.4f}")


# %%
def answer(messages: list[dict]) -> str:
    prompt = tokenizer.apply_chat_template(
        messages, tools=TOOLS, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        out = module.model.eval().generate(**prompt, max_new_tokens=160, do_sample=False)
    return tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])


def weather(city: str) -> str:
    return "rain" if cities.index(city) % 2 else "sun"


conversation = messages[:1]
said = answer(conversation)
print(said)

# %%
thought, _, called = said.partition("</think>\n")
call = json.loads(called.removeprefix("<call>").partition("</call>")[0])
result = weather(**call["arguments"])
conversation += [
    {
        "role": "assistant",
        "reasoning_content": thought.removeprefix("<think>\n").strip(),
        "content": "",
        "tool_calls": [{"type": "function", "function": call}],
    },
    {"role": "tool", "name": call["name"], "content": result},
]
print(f"weather{tuple(call['arguments'].values())} = {result}")
print(answer(conversation))
