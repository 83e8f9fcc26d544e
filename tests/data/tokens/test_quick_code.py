"""Chat templates whose code looks keys up by itself: they render and refuse what they do with jinja2's own code."""

import json
from typing import Any

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from lightning_sft.data.tokens.sandbox import JsonOnce, forget_json, template_environment
from lightning_sft.demos import tiny_tokenizer
from tests.helpers.slow import slow_but
from tests.oracle.kinds import CALLS, TEXTS
from tests.oracle.templates import of_trl

QUICK = ("qwen3", "llama3_1", "gptoss", "qwen3_training")

EXPRESSIONS = (
    "m.role",
    "m['role']",
    "m.nothing",
    "m['nothing']",
    "m.nothing.more",
    "m['nothing']['more']",
    "m['{}']",
    "m['a\"b\\'c']",
    "m.items() | list",
    "m['items']",
    "m.get('role')",
    "m.update({'role': 'x'})",
    "m.clear()",
    "m.__class__",
    "m['__class__']",
    "text.__class__.__mro__",
    "number.strip()",
    "number.role",
    "parts.append(1)",
    "parts.role",
    "parts[0].text",
    "parts[5].text",
    "parts[0]['text'].strip().upper()",
    "text.strip()",
    "text.strip('\\n')",
    "text.split(',')[-1].lstrip()",
    "text.replace('a', 'b').startswith('b')",
    "text.strip(**{'chars': 'x'})",
    "text.strip(*['a'])",
    "text.strip(1)",
    "text.format(m)",
    "text.upper",
    "other.strip('a')",
    "other.content",
    "other is string",
    "text is string",
    "m.nothing is string",
    "m.nothing is none",
    "none_given is none",
    "m.nothing is defined",
    "m.nothing == other",
    "(m.nothing is defined and m.nothing) or m.role",
    "ns.x",
    "ns.nothing",
    "ns['x']",
    "ns.items",
    "loop.index",
    "said(m.role.upper())",
    "{'a': m.role}.a",
    "{'strip': 1}.strip",
    "(m.role, m['content'])",
    "m | tojson",
    "parts | tojson(indent=2)",
    "m.arguments | tojson",
)

LOOPS = (
    "{% for p in parts %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{% endfor %}",
    "{% for p in parts %}{{ loop.length }}{{ loop.revindex }}{{ loop.index0 }}{% endfor %}",
    "{% for p in parts %}{{ loop.previtem.text }}{{ loop.nextitem.text }}{% endfor %}",
    "{% for p in parts %}{{ loop.nothing }}{{ loop.changed(p.type) }}{{ loop.cycle('a', 'b') }}{% endfor %}",
    "{% for p in parts if p.type == 'text' %}{{ p.text.strip() }}{% else %}-{% endfor %}",
    "{% for p in parts recursive %}{{ p.text }}{{ loop(p.inner) if p.inner is defined }}{{ loop.depth }}{% endfor %}",
    "{% set loop = m %}{{ loop.role }}{{ loop.last }}",
    "{% macro f(x) %}{{ x.role }}{{ x.nothing }}{{ caller is defined }}{% endmacro %}{{ f(m) }}{{ f('x') }}",
    "{% call(x) f() %}{{ x }}{% endcall %}",
    "{% for p in parts %}{% set ns.x = ns.x + p.text.strip() %}{% endfor %}{{ ns.x }}",
    "{% block b %}{{ m.role.upper() }}{% endblock %}",
    "{% set x %}{{ m.role }}{% endset %}{{ x.strip() }}{{ x is string }}",
    "{% for k, v in m.items() %}{{ k.strip() }}={{ v.nothing }}{% endfor %}",
)


def rendered(template: Any, variables: dict[str, Any]) -> str:
    """The text of a template, or what it raises."""
    forget_json()
    try:
        return str(template.render(variables))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("source", [*(f"{{{{ {expression} }}}}" for expression in EXPRESSIONS), *LOOPS])
def test_code_that_looks_up_by_itself_does_what_the_sandbox_does(source: str) -> None:
    begin = "{% set ns = namespace(x='1') %}{% macro said(x) %}<{{ x }}>{% endmacro %}"
    message = {"role": "user", "content": " Hi ", "{}": 1, "a\"b'c": 2, "items": "own"}
    variables = {
        "m": message | {"arguments": {"b": [1], "a": "ä"}},
        "parts": [{"type": "text", "text": " a "}, {"type": "image", "inner": [{"text": "in"}]}],
        "text": "a, b\n",
        "number": 3,
        "none_given": None,
    }
    ours, theirs = template_environment().from_string(begin + source), _compile_jinja_template(begin + source)
    assert rendered(ours, variables) == rendered(theirs, variables)


@pytest.mark.parametrize("name", slow_but(QUICK, [*of_trl(), *of_trl(training=True)]))
def test_templates_render_what_they_render_without_it(name: str) -> None:
    source = (of_trl() | of_trl(training=True))[name]
    ours, theirs = template_environment().from_string(source), _compile_jinja_template(source)
    special = tiny_tokenizer().special_tokens_map
    for messages, tools in [*CALLS.values(), *((turns, None) for turns in TEXTS.values())]:
        for end in range(1, len(messages) + 1):
            for generation in (False, True):
                given = special | {"messages": messages[:end], "tools": tools, "add_generation_prompt": generation}
                assert rendered(ours, given) == rendered(theirs, given), (messages[:end], generation)


def test_json_is_written_once_for_a_conversation_and_anew_for_the_next() -> None:
    calls: list[Any] = []

    def write(x: Any, **settings: Any) -> str:
        calls.append(x)
        return json.dumps(x, **settings)

    tojson, tools = JsonOnce(write), [{"name": "f"}]
    assert [tojson(tools), tojson(tools)] == [json.dumps(tools)] * 2
    assert tojson(tools, indent=1) == json.dumps(tools, indent=1)
    assert len(calls) == 2
    tools[0]["name"] = "g"
    tojson.forget()
    assert tojson(tools) == json.dumps(tools)
