"""A conversation remembers what was said, obeys commands, and answers a pipe line by line."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lightning_sft.commands import chat as chat_module
from lightning_sft.commands.chat import Session, Talk, answer_lines
from lightning_sft.commands.chat_model import Speaker
from lightning_sft.data.rows.messages import to_conversation
from lightning_sft.data.rows.sources import read
from lightning_sft.evaluation.generation import Sampling
from lightning_sft.machine.terminal import Console
from lightning_sft.main import main
from lightning_sft.types import InputError, Message


class Echo:
    """Says how many messages it was given, and the last of them."""

    name = "echo"
    system = None

    def answer(self, messages: Sequence[Any], say: Callable[[str], None], most: int, sampling: Sampling) -> Message:
        if messages[-1]["content"] == "bad":
            raise InputError("it cannot be asked")
        text = f"{len(messages)}: {messages[-1]['content']}\n{sampling.temperature:g}, {most}"
        say(text)
        return {"role": "assistant", "content": text}


@pytest.fixture
def session() -> Session:
    return Session([Talk(Echo())], system="Be kind.")


def ask(session: Session, question: str) -> str:
    return session.ask(question, lambda number, text: None)[0]


def test_each_question_comes_after_all_that_was_said(session: Session) -> None:
    assert ask(session, "a").startswith("2: a")
    assert ask(session, "b").startswith("4: b")
    roles = [message["role"] for message in session.talks[0].messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]


def test_what_cannot_be_asked_leaves_the_conversation_as_it_was(session: Session) -> None:
    ask(session, "a")
    before = list(session.talks[0].messages)
    with pytest.raises(InputError, match="cannot be asked"):
        ask(session, "bad")
    assert session.talks[0].messages == before


def test_commands_begin_anew_and_change_how_tokens_are_chosen(session: Session) -> None:
    ask(session, "a")
    session.obey("/reset")
    assert session.talks[0].messages == [{"role": "system", "content": "Be kind."}]
    session.obey("/system")
    assert session.talks[0].messages == []
    assert "temperature=0.5" in str(session.obey("/set temperature 0.5"))
    session.obey("/set max_new_tokens 7")
    assert ask(session, "b") == "1: b\n0.5, 7"
    assert session.obey("/quit") is None


@pytest.mark.parametrize(
    "line",
    [
        "/bogus",
        "/set",
        "/set warmth 1",
        "/set top_k x",
        "/set top_p 2",
        "/set max_new_tokens 0",
        "/save",
        "/save /no/x",
    ],
)
def test_commands_that_make_no_sense_say_what_does(session: Session, line: str) -> None:
    with pytest.raises(InputError):
        session.obey(line)


def test_a_saved_conversation_can_be_trained_on(session: Session, tmp_path: Path) -> None:
    ask(session, "a")
    path = str(tmp_path / "c.jsonl")
    assert "1 conversation appended" in str(session.obey(f"/save {path}"))
    session.obey(f"/save {path}")
    rows = [to_conversation(row) for row, _ in read(path)]
    assert [row.weights for row in rows] == [[0.0, 0.0, 1.0]] * 2


def test_a_pipe_gets_one_line_for_each_and_several_models_are_beside_each_other() -> None:
    written: list[str] = []
    session = Session([Talk(Echo()), Talk(Echo())])
    answer_lines(session, ["a\n", "\n", "/reset\n", "b\n", "/quit\n", "c\n"], written.append)
    assert written == ["1: a\\n0, 512\t1: a\\n0, 512", "1: b\\n0, 512\t1: b\\n0, 512"]


def test_of_lines_from_a_pipe_commands_reply_on_stderr_and_a_path_is_a_question(
    capsys: pytest.CaptureFixture[str],
) -> None:
    written: list[str] = []
    answer_lines(Session([Talk(Echo())]), ["/help\n", "/etc/hosts: what?\n", "b\n"], written.append)
    assert written == ["1: /etc/hosts: what?\\n0, 512", "3: b\\n0, 512"]
    out, err = capsys.readouterr()
    assert not out
    assert "/save FILE" in err
    assert "/etc/hosts: is no command, so the line is a question." in err


def test_in_a_terminal_two_models_stand_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["hello", "/bogus", "bad"])

    def typed(prompt: str = "") -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    console = Console(width=80, record=True, file=io.StringIO())
    chat_module._talk(Session([Talk(Echo()), Talk(Echo())]), console)
    text = console.export_text()
    beside = [len(line) for line in text.splitlines() if line.count("1: hello") == 2]  # older rich writes each update
    assert beside
    assert max(beside) <= 80
    assert "Unknown command /bogus" in text
    assert "it cannot be asked" in text


def test_the_command_answers_a_pipe(
    pretrained: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nAnd?\n"))
    flags = ["--max_new_tokens", "5", "--sampling.temperature", "0.0", "--device", "cpu"]
    main(["chat", "--model", pretrained, *flags])
    first, second, end = capsys.readouterr().out.split("\n")
    own = Speaker(pretrained, device="cpu").answer([{"role": "user", "content": "Hi"}], lambda text: None, 5)["content"]
    assert (json.loads(f'"{first}"'), bool(second), end) == (own, True, "")
