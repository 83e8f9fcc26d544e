"""The README.md of an exported model, from the facts of its run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import yaml

from lightning_sft.io.words import counted
from lightning_sft.objective import NORMALIZATIONS
from lightning_sft.types import Normalize

_OF_RUN = ("optimizer", "data_module", "reading", "template", "trainer")
_LICENSE = (
    "Not stated. The licences of the base model and of the data apply; before publishing this model, look them up and "
    "replace `license: unknown` above."
)


def model_card(
    name: str, hyper_parameters: Mapping[str, Any], facts: Mapping[str, Any], parity: Mapping[str, Any] | None = None
) -> str:
    """A model card in Markdown with YAML front matter, as the Hugging Face hub reads it.

    Args:
        name: Name of the model.
        hyper_parameters: Hyperparameters of the module.
        facts: Facts of the run, see :func:`lightning_sft.checkpoints.run_info.run_info`; missing ones are left out.
        parity: Report of the comparison, as plain values.

    >>> print(model_card("my-model", {"pretrained": "owner/base"}, {})[:53])
    ---
    base_model: owner/base
    library_name: transformers
    """
    base = str(hyper_parameters.get("pretrained", "unknown"))
    sections = {
        "Use": _use(name, hyper_parameters.get("hf_config") or {}, facts.get("template", {})),
        "Objective": _objective(str(hyper_parameters.get("normalize", "token")), hyper_parameters.get("router_loss")),
        "Data": _data(facts.get("data", {})),
        f"Metrics at step {facts.get('step', '?')}": _table(facts.get("metrics", {})),
        "Settings": _settings(hyper_parameters, facts),
        "Parity of this folder with the trained model": _parity(parity),
        "Versions": _table(facts.get("versions", {})),
        "Licence": _LICENSE,
    }
    text = [f"---\n{yaml.safe_dump(_front_matter(base, facts), allow_unicode=True)}---\n\n# {name}"]
    text.append(f"`{base}`, fine-tuned with lightning_sft. The tokenizer includes the chat template used in training.")
    text += [f"## {title}\n\n{body}" for title, body in sections.items() if body]
    return "\n\n".join(text) + "\n"


def _front_matter(base: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The card's metadata, with hub names only, since the hub refuses local paths."""
    sources = _sources(facts.get("data", {}).get("train", {}))
    of_hub = sorted({source.split(":")[1] for source in sources if source.startswith("hf:")})
    matter = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "unknown",
        "tags": ["lightning", "sft", "lightning-sft"],
    }
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base) and not Path(base).exists():
        matter["base_model"] = base
    return matter | ({"datasets": of_hub} if of_hub else {})


def _use(name: str, config: Mapping[str, Any], template: Mapping[str, Any]) -> str:
    """Code that asks the model a question, in the context that it was trained on."""
    [architecture, *_] = config.get("architectures") or ["AutoModelForCausalLM"]
    settings = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    settings |= {key: value for key, value in template.get("variables", {}).items() if key != "today"}
    turns = {"system": template.get("system"), "user": "Hello!"}
    messages = json.dumps([{"role": role, "content": text} for role, text in turns.items() if text], ensure_ascii=False)
    given = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    return f"""```python
from transformers import AutoTokenizer, {architecture}

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = {architecture}.from_pretrained("{name}")
messages = {messages}
prompt = tokenizer.apply_chat_template(messages, {given})
answer = model.generate(**prompt, max_new_tokens=256)[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
```"""


def _sources(split: Mapping[str, Any]) -> list[str]:
    found = [part.get("source") for part in split.get("parts", [])]
    return [str(name) for source in found for name in (source if isinstance(source, list) else [source]) if name]


def _objective(normalize: str, router_loss: Any) -> str:
    auxiliary = f" `router_loss: {router_loss}`: the auxiliary loss of routers is added." if router_loss else ""
    own = NORMALIZATIONS.get(cast(Normalize, normalize), NORMALIZATIONS["token"])
    return (
        "    θ̃ = argmax_θ L(θ),   L(θ) = Σ_(x,y)∈D log Pr_θ(y | x),   log Pr_θ(y | x) = Σ_i log Pr_θ(y_i | x, y_<i)\n\n"
        "One step minimizes −Σ_t w_t · log Pr_θ(t | its context) / Z over the target tokens t of all its micro-batches "
        f"and ranks. `normalize: {normalize}`: w is {own.weight}, times the weights of the data; Z is {own.total}: "
        f"{own.meaning}.{auxiliary}"
    )


def _data(data: Mapping[str, Any]) -> str:
    rows = []
    for split, found in data.items():
        for part in found.get("parts", []):
            source = ", ".join(_sources({"parts": [part]})) or "rows in memory"
            of_mixture = f"{part['name']}: " if part.get("name") else ""
            counts = ["streamed" if part.get(kind) is None else f"{part[kind]:,}" for kind in ("rows", "sequences")]
            weights = f"{part['share'] if part.get('share') is not None else ''} | {part.get('weight', 1)}"
            rows.append(f"| {split} | {of_mixture}{source} | {' | '.join(counts)} | {weights} |")
    if not rows:
        return ""
    head = "| split | source | rows | sequences | share | weight |\n|---|---|---|---|---|---|\n"
    left_out = [_left_out(split, found) for split, found in data.items() if found.get("targets") is not None]
    return head + "\n".join(rows) + "\n\n" + "\n".join(f"- {line}" for line in left_out)


def _left_out(split: str, found: Mapping[str, Any]) -> str:
    targets, refused = counted(found["targets"], "target token"), counted(found["refused"], "row", "were")
    too_long = counted(found["too_long"], "sequence")
    return f"{split}: {targets}; {refused} refused, {too_long} left out because of their length, {found['cut']} cut."


def _settings(hyper_parameters: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    own = {name: v for name, v in hyper_parameters.items() if name != "hf_config" and not name.startswith("_")}
    found = {"model": own} | {name: facts[name] for name in _OF_RUN if facts.get(name)}
    return f"```yaml\n{yaml.safe_dump(found, allow_unicode=True, sort_keys=False)}```"


def _parity(parity: Mapping[str, Any] | None) -> str:
    if parity is None:
        return ""
    rows = [f"| {m['name']} | {m['mean_kl']:.2e} | {m['max_kl']:.2e} | {m['top1']:.2%} |" for m in parity["models"]]
    head = f"On {parity['targets']} target tokens of {parity['rows']}; weights in {parity['dtype']}"
    head += f", rounded from {parity['rounded_from']}.\n\n" if parity["rounded_from"] else ".\n\n"
    return head + "| model | mean KL(trained ‖ it) | largest | same top token |\n|---|---|---|---|\n" + "\n".join(rows)


def _table(values: Mapping[str, Any]) -> str:
    shown = [f"| {name} | {v:.6g} |" if isinstance(v, float) else f"| {name} | {v} |" for name, v in values.items()]
    return "| | |\n|---|---|\n" + "\n".join(shown) if shown else ""
