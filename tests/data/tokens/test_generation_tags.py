"""The marks of a chat template say what is trained without them, or the row is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sft.data.tokens.chat_template import ChatTemplate
from lightning_sft.data.tokens.encode import encode, encode_all
from lightning_sft.data.tokens.generation_tags import has_marks, marked_end
from lightning_sft.demos import CHATML, tiny_tokenizer
from lightning_sft.types import Conversation, Example, InputError
from tests.conformance import CONVERSATIONS, answer, conversation, templates, tokenizer_for, user

HEADER = "{{ '<|im_start|>assistant\n' }}"
MARKED = {name: text for name, text in (templates() | templates(training=True)).items() if has_marks(text)}
REFUSED = {  # what the marks of trl's variants do that they must not
    "diffusion_gemma_training": "leave out '<|tool_response>', the end of the answer with its stop token",
}


def chatml(assistant: str) -> str:
    """ChatML with an assistant's turn of its own."""
    return (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}" + assistant + "{% else %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + HEADER + "{% endif %}"
    )


def unmarked(template: str) -> str:
    """The same with another block in place of the marks, which keeps their whitespace control."""
    template = re.sub(r"(\{%-? *)generation( *-?%\})", r"\1if true\2", template)
    return re.sub(r"(\{%-? *)endgeneration( *-?%\})", r"\1endif\2", template)


def result(given: Conversation, tokenizer: Any) -> list[Example] | str:
    try:
        return encode(given, tokenizer)
    except InputError as error:
        return str(error)


def targets(examples: list[Example], tokenizer: Any) -> str:
    return tokenizer.decode([t for e in examples for t, w in zip(e.input_ids, e.target_weights, strict=True) if w > 0])


AGREE = [
    HEADER + "{% generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}",
    HEADER + "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
    HEADER + "  {%- generation -%}  {{- m['content'] + '<|im_end|>\n' -}}  {%- endgeneration -%}  ",
    HEADER + "{%generation%}{{ m['content'] }}{%endgeneration%}{% generation %}<|im_end|>{{ '\n' }}{% endgeneration %}",
]


@settings(max_examples=40)
@given(
    st.sampled_from(AGREE),
    st.lists(st.text(min_size=1).filter(lambda t: t.strip() and "<|" not in t), min_size=2, max_size=6),
)
def test_marks_that_agree_train_what_is_trained_without_them(assistant: str, texts: list[str]) -> None:
    messages = [(user, answer)[i % 2](text) for i, text in enumerate(texts[: len(texts) // 2 * 2])]
    marked = encode(Conversation(messages), tiny_tokenizer(chatml(assistant)))
    assert marked == encode(Conversation(messages), tiny_tokenizer(CHATML))
    assert targets(marked, tiny_tokenizer()) == "".join(text + "<|im_end|>" for text in texts[1::2])


ELSEWHERE = {  # what an assistant's turn is -> what is said of its marks
    HEADER + "{{ 'Well, ' }}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}": "leave out 'Well, '",
    HEADER + "{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}": (
        "leave out '<|im_end|>', the end of the answer with its stop token, so the model would never learn to stop"
    ),
    HEADER + "{% generation %}{{ m['content'] }}{% endgeneration %}!{% generation %}<|im_end|>{% endgeneration %}": (
        "leave out '!'"
    ),
    "{% generation %}" + HEADER + "{% endgeneration %}{{ m['content'] + '<|im_end|>\n' }}": "do not mark the answer",
}


@pytest.mark.parametrize("assistant", ELSEWHERE)
def test_marks_elsewhere_than_on_what_the_model_writes_are_refused(assistant: str) -> None:
    given = Conversation([user("a"), answer("b")], provenance="f:7")
    said = f"f:7: turn 2: the {{% generation %}} marks of the chat template {ELSEWHERE[assistant]}"
    with pytest.raises(InputError, match=re.escape(said)) as refusal:
        encode(given, tiny_tokenizer(chatml(assistant)))
    assert str(refusal.value).endswith("Move the marks, or take them out: data.chat_template.")
    assert encode(given, tiny_tokenizer(unmarked(chatml(assistant))))


def test_marks_that_begin_in_the_prompt_train_nothing_of_it_and_that_is_said() -> None:
    early = "{% generation %}" + HEADER + "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    given = Conversation([user("a"), answer("b")])
    [encoded] = encode_all([given], tiny_tokenizer(chatml(early)))
    assert targets(encoded.examples, tiny_tokenizer()) == "b<|im_end|>"
    assert encoded.notes == {"the {% generation %} marks begin in the prompt, of which nothing is trained"}


def test_every_trained_answer_has_to_be_marked_and_no_other() -> None:
    body = "{{ m['content'] + '<|im_end|>' }}"
    either = (
        "{% if 'b' in m['content'] %}{% generation %}" + body + "{% endgeneration %}{% else %}" + body + "{% endif %}"
    )
    messages, tokenizer = [user("a"), answer("b"), user("c"), answer("d")], tiny_tokenizer(chatml(HEADER + either))
    with pytest.raises(InputError, match=r"f:7: turn 4: .* marks of the chat template do not mark the answer"):
        encode(Conversation(messages, provenance="f:7"), tokenizer)
    assert targets(encode(Conversation(messages, weights=[0, 1, 0, 0]), tokenizer), tokenizer) == "b<|im_end|>"


def test_a_comment_that_speaks_of_marks_marks_nothing() -> None:
    given = Conversation([user("a"), answer("b")])
    commented = "{#- Added {% generation %} /\n {% endgeneration %} -#}" + CHATML
    assert encode(given, tiny_tokenizer(commented)) == encode(given, tiny_tokenizer())


def test_a_marked_template_is_given_what_apply_chat_template_gives() -> None:
    body = "{{ m['content'] + ('!' if 'name' in m else '') + strftime_now(' %Y') + bos_token + tools[0] | tojson }}"
    template = chatml(HEADER + "{% generation %}" + body + "{{ '<|im_end|>' }}{% endgeneration %}")
    messages, tools = [user("a"), answer("b", name=None)], [{"type": "function", "function": {"name": "f"}}]
    texts = [
        ChatTemplate(tiny_tokenizer(text)).prompt_and_answer(messages, tools) for text in (template, unmarked(template))
    ]
    assert texts[0] == texts[1]
    assert texts[0][1].startswith("b 2024<|im_start|>{")


MARKS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 4)).map(lambda span: (span[0], sum(span))), max_size=4)


@given(MARKS)
def test_marks_are_accepted_where_each_character_of_the_answer_is_marked(
    marks: list[tuple[int, int]],
) -> None:
    text, begin, stop = "QQQQAAAA#~ #", 4, 9  # the stop token and one that adjoins it, and after a space a third
    marked = {i for first, last in marks for i in range(first, last)}
    if not marked.issuperset(range(begin, stop)):
        with pytest.raises(InputError, match="marks of the chat template"):
            marked_end(text, begin, stop, marks, re.compile("[#~]"))
    else:
        assert marked_end(text, begin, stop, marks, re.compile("[#~]")) == (10 if 9 in marked else 9)


@pytest.mark.parametrize("name", sorted(MARKED))
def test_marks_of_real_templates_train_what_is_trained_without_them_or_are_refused(name: str) -> None:
    marked, plain = tokenizer_for(MARKED[name]), tokenizer_for(unmarked(MARKED[name]))
    assert not has_marks(str(plain.chat_template))
    refusals = set()
    for kind in CONVERSATIONS:
        given = conversation(kind, marked)
        found, expected = result(given, marked), result(given, plain)
        if found != expected:
            assert isinstance(found, str)
            assert REFUSED[name] in found
            refusals.add(kind)
    assert bool(refusals) == (name in REFUSED)
