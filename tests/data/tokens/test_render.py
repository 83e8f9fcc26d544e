"""A renderer gives what apply_chat_template gives, and a trace what each beginning of a conversation gives."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
from transformers.utils import chat_template_utils

from lightning_sft.data.tokens.chat_template import ChatTemplate
from lightning_sft.data.tokens.encode import encode_all
from lightning_sft.data.tokens.render import Renderer
from lightning_sft.demos import CHATML, tiny_tokenizer
from lightning_sft.types import Conversation, Message
from tests.conformance import CONVERSATIONS, TOOLS, FrozenClock, templates, tokenizer_for, user
from tests.conformance import answer as assistant

LONG: list[Message] = [
    {"role": "system", "content": "Be kind."},
    *(turn for n in range(5) for turn in (user(f"q{n}"), assistant(f"a{n}"))),
]
TRACED = {"cohere", "llama3", "phi3", "qwen2_5_vl"}
"""Some that go through the messages once."""


@pytest.mark.parametrize("name", templates())
def test_a_render_is_that_of_apply_chat_template(name: str) -> None:
    tokenizer = tokenizer_for(templates()[name])
    template = ChatTemplate(tokenizer)
    template.__dict__["wants_parts"] = False
    rendered = 0
    for kind, messages in CONVERSATIONS.items():
        tools = TOOLS if kind in ("call", "tool") else None
        for end in range(1, len(messages) + 1):
            for generation in (False, True):
                settings: dict[str, Any] = {"tools": tools, "add_generation_prompt": generation, "tokenize": False}
                try:
                    with patch.object(chat_template_utils, "datetime", FrozenClock):
                        expected = tokenizer.apply_chat_template(messages[:end], **settings)
                except Exception:  # whatever the template raises
                    continue
                assert template.render(messages[:end], tools, generation) == expected
                rendered += 1
    assert rendered or name == "llava_next"  # which wants content as parts


@pytest.mark.parametrize("name", templates())
def test_a_trace_has_the_render_of_each_beginning_or_says_that_it_has_not(name: str) -> None:
    template = ChatTemplate(tokenizer_for(templates()[name]))
    traced = set()
    for messages in (LONG, LONG[1:], *CONVERSATIONS.values()):
        trace = template.trace(messages, None, {})
        for end in range(1, len(messages) + 1):
            if trace is not None and trace.begins[end]:
                text = trace.text[: trace.begins[end]]
                assert text + trace.prompt == template.render(messages[:end], None, generation=True)
                assert text + trace.end == template.render(messages[:end], None, generation=False)
                traced.add(end)
    assert traced or name not in TRACED


LOOP = "{% for m in messages %}{{ m.content }}BODY{% endfor %}{% if add_generation_prompt %}>{% endif %}"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }}{% if not loop.last %}|{% endif %}{% endfor %}",
        "{{ messages | length }}" + LOOP,
        "{{ messages[-1].content }}" + LOOP,
        LOOP.replace("BODY", "{{ messages[loop.index].content if loop.index < 3 else '' }}"),
        LOOP.replace("BODY", "{{ loop.length }}"),
        "{% set ns = namespace(last='') %}" + LOOP.replace("BODY", "{% set ns.last = m.content %}") + "{{ ns.last }}",
        LOOP + "{{ messages[0].content }}",
        LOOP + LOOP,
        LOOP.replace("BODY", "{{ 'x' if add_generation_prompt else '' }}"),
        "{% macro all() %}" + LOOP + "{% endmacro %}{{ all() }}",
        "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
        "{% for m in messages[:-1] %}{{ m.content }}{% endfor %}",
        "{% set n = messages | length %}" + LOOP.replace("BODY", "{{ n }}"),
        "{% set rest = messages[1:] %}{% if rest %}!{% endif %}" + LOOP,
        "{% set ns = namespace(last='') %}{% macro end() %}{{ ns.last }}{% endmacro %}"
        + LOOP.replace("BODY", "{% set ns.last = m.content %}")
        + "{{ end() }}",
        "{% set ns = namespace(last='') %}{% if tools %}{% elif true %}"
        + LOOP.replace("BODY", "{% set ns.last = m.content %}")
        + "{% endif %}{{ ns.last }}",
        "{% if true %}" + LOOP + "{{ messages[0].content }}{% endif %}",
        "No: {% for m in messages[1:] %}{{ m.content }}{% else %}one{% endfor %}",
        LOOP.replace("BODY", "{% for w in m.content %}{{ w if not loop.last }}{% endfor %}{{ loop.revindex }}"),
        LOOP.replace("BODY", "{% for w in messages[loop.index:] %}{{ w.content }}{% endfor %}"),
        LOOP.replace("BODY", "{% for w in range(loop.length) %}.{% endfor %}"),
    ],
)
def test_a_template_that_looks_ahead_is_not_traced_where_that_shows(template: str) -> None:
    renderer = Renderer(template, {})
    messages = [{"role": "user", "content": text} for text in "abcd"]
    trace = renderer.trace(messages, None, {})
    for end in range(1, 5):
        if trace is not None and trace.begins[end]:
            text = trace.text[: trace.begins[end]]
            assert text + trace.prompt == renderer.render(messages[:end], None, True, {})[0]
            assert text + trace.end == renderer.render(messages[:end], None, False, {})[0]


@pytest.mark.parametrize("before", ["", "{% set messages = messages[1:] %}"])
def test_a_template_that_goes_through_once_is_not_rendered_for_each_answer(before: str) -> None:
    tokenizer = tiny_tokenizer(before + CHATML)
    given = Conversation(LONG, weights=[float(m["role"] == "assistant") for m in LONG])
    renders = []
    render = Renderer.render
    with patch.object(Renderer, "render", lambda *arguments: (renders.append(1), render(*arguments))[1]):
        [encoded] = encode_all([given], tokenizer)  # here it learns how answers end
        learnt = len(renders)
        list(encode_all([given], tokenizer))
    assert len(renders) == learnt
    with patch.object(Renderer, "trace", lambda *arguments: None):
        [alone] = encode_all([given], tokenizer)
    assert [e.input_ids.tolist() for e in encoded.examples] == [e.input_ids.tolist() for e in alone.examples]
