"""``lightning-sft chat``: talk to one model or two side by side in the terminal, or answer lines from a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from lightning_sft.commands.chat_model import Speaker
from lightning_sft.evaluation.generation import Sampling
from lightning_sft.io.arguments import Count, Name, check_arguments
from lightning_sft.machine.terminal import Console, printable
from lightning_sft.types import InputError, Message

_GREEDY = Sampling()
_HELP = """/reset          forget the conversation
/system TEXT    start over with this system prompt; without TEXT, with none
/set KEY VALUE  temperature, top_p, top_k, seed or max_new_tokens
/save FILE      append the conversation to a JSONL file that fit can train on
/quit           exit, as does Ctrl-D; Ctrl-C interrupts an answer"""

_COMMANDS = ("/help", "/reset", "/system", "/set", "/save", "/quit", "/exit")


def chat(
    model: Name | Path,
    compare: str | Path | None = None,
    system: str | None = None,
    chat_template: str | Path | None = None,
    max_new_tokens: Count = 512,
    sampling: Sampling = _GREEDY,
    device: str | None = None,
) -> None:
    """Talk to a model in the terminal. Lines from a pipe are answered one by one, one line each.

    Args:
        model: An exported folder, a checkpoint of any strategy, the folder of a run, adapters, a hub name or a GGUF
            file.
        compare: A second model, such as the pretrained one, to answer the same questions side by side.
        system: System prompt of the conversation; by default the one that the training gave conversations without one,
            if any. An empty one is none.
        chat_template: A Jinja file to use instead of the template that the model was trained with.
        max_new_tokens: Maximum number of tokens per answer.
        sampling: Sampling settings; greedy by default.
        device: Device to run on, such as cpu or cuda:1; by default the GPU if there is one.

    Raises:
        InputError: When a model cannot be loaded.
    """
    check_arguments(chat, locals())
    screen = Console(stderr=True)
    talks = []
    for name in [model, *([compare] if compare else [])]:
        with screen.status(f"Loading {name}"):
            talks.append(Talk(Speaker(name, chat_template, device)))
    session = Session(talks, system, max_new_tokens, sampling)
    if sys.stdin.isatty():
        _talk(session, Console(highlight=False))
    else:
        answer_lines(session, sys.stdin, print)


@dataclass
class Talk:
    """One model and its side of the conversation.

    Args:
        speaker: The model with its tokenizer.
        messages: Messages so far, in order.
    """

    speaker: Speaker
    messages: list[Message] = field(default_factory=list)


class Session:
    """A conversation with one model, or the same questions to several.

    Args:
        talks: One conversation per model.
        system: System prompt, empty for none; ``None`` is the one that each model was trained with, if any.
        max_new_tokens: Maximum number of tokens per answer.
        sampling: Sampling settings.
    """

    def __init__(
        self,
        talks: Sequence[Talk],
        system: str | None = None,
        max_new_tokens: int = 512,
        sampling: Sampling = _GREEDY,
    ) -> None:
        self.talks, self.max_new_tokens, self.sampling = talks, max_new_tokens, sampling
        self.begin(system)

    def begin(self, system: str | None) -> None:
        """Reset the conversation, with a system prompt, without one if it is empty, or with that of the training."""
        self.system = system
        for talk in self.talks:
            own = talk.speaker.system if system is None else system
            talk.messages = [{"role": "system", "content": own}] if own else []

    def ask(self, question: str, say: Callable[[int, str], None]) -> list[str]:
        """Ask all models in turn, and append question and answers to their conversations.

        Args:
            question: The user's message.
            say: Function called with the index of a model and a piece of its answer.

        Returns:
            The answers, one per model.

        Raises:
            InputError: When a model cannot answer; the conversations are then unchanged.
        """
        found = []
        asked = [[*talk.messages, {"role": "user", "content": question}] for talk in self.talks]
        for number, (talk, messages) in enumerate(zip(self.talks, asked, strict=True)):

            def piece(text: str, number: int = number) -> None:
                say(number, text)

            found.append(talk.speaker.answer(messages, piece, self.max_new_tokens, self.sampling))
        for talk, messages, message in zip(self.talks, asked, found, strict=True):
            talk.messages = [*messages, message]
        return [message["content"] for message in found]

    def obey(self, line: str) -> str | None:
        """Run a command and return its reply, or ``None`` to exit.

        Raises:
            InputError: When the command is unknown or fails.
        """
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in ("/quit", "/exit"):
            return None
        if name == "/reset":
            self.begin(self.system)
            return "Conversation reset."
        if name == "/system":
            self.begin(rest)
            return "Conversation reset, " + ("with this system prompt." if rest else "without a system prompt.")
        if name == "/set":
            return self._set(*rest.partition(" ")[::2])
        if name == "/save":
            return self._save(rest)
        if name == "/help":
            return _HELP
        raise InputError(f"Unknown command {name}. /help lists all commands.")

    def _set(self, key: str, value: str) -> str:
        kinds: dict[str, Callable[[str], Any]] = {"max_new_tokens": int, "top_k": int, "seed": int}
        kinds |= {"temperature": float, "top_p": float}
        try:
            given = kinds[key](value)
        except (KeyError, ValueError) as error:
            raise InputError(f"/set takes one of {', '.join(kinds)} and a number, got {key!r} {value!r}.") from error
        if key != "max_new_tokens":
            self.sampling = replace(self.sampling, **{key: given})
        elif given < 1:
            raise InputError("max_new_tokens must be at least 1.")
        else:
            self.max_new_tokens = given
        now = {own.name: getattr(self.sampling, own.name) for own in fields(self.sampling)}
        return ", ".join(f"{k}={v}" for k, v in {**now, "max_new_tokens": self.max_new_tokens}.items())

    def _save(self, name: str) -> str:
        if not name:
            raise InputError("/save needs the name of a file, such as /save chat.jsonl.")
        rows = [{"messages": talk.messages} for talk in self.talks if len(talk.messages) > 1]
        try:
            with Path(name).expanduser().open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except OSError as error:
            raise InputError(f"{name} cannot be written: {error}") from error
        return f"{len(rows)} conversation{'s' * (len(rows) != 1)} appended to {name}."


def answer_lines(session: Session, lines: Any, write: Callable[[str], None]) -> None:
    r"""Answer each line with one line, escaped as in a JSON string, so newlines are ``\n``.

    Answers of several models are separated by tabs. What commands reply is written to stderr. A line that begins with a
    slash and no command, as a path does, is a question.

    Args:
        session: Session that continues from line to line; a line may be a command.
        lines: Lines of text.
        write: Function called with each answer.

    Raises:
        InputError: When a line cannot be answered, or a command fails.
    """
    for line in (line.strip() for line in lines):
        name = line.partition(" ")[0]
        if name in _COMMANDS:
            if (said := session.obey(line)) is None:
                return
            print(said, file=sys.stderr)
        elif line:
            if name.startswith("/"):
                print(printable(f"{name} is no command, so the line is a question."), file=sys.stderr)
            found = session.ask(line, lambda number, text: None)
            write("\t".join(json.dumps(text, ensure_ascii=False)[1:-1] for text in found))
            sys.stdout.flush()


def _talk(session: Session, console: Console) -> None:
    """Read questions and commands from the terminal until the user exits."""
    with suppress(ImportError):  # on Windows, where the terminal does this itself
        import readline  # noqa: F401 - enables line editing and history

    names = " and ".join(talk.speaker.name for talk in session.talks)
    console.print(f"Talking to {names}. /help lists commands.", style="dim")
    for talk in session.talks:
        if session.system is None and talk.speaker.system:
            console.print(f"System prompt of its training: {talk.speaker.system}", style="dim")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print("\n/quit exits.", style="dim")
            continue
        try:
            if line.startswith("/"):
                said = session.obey(line)
                if said is None:
                    return
                console.print(said, style="dim")
            elif line:
                _show_answer(session, line, console)
        except InputError as error:
            console.print(str(error), style="red")


def _show_answer(session: Session, question: str, console: Console) -> None:
    """Print one answer as running text, several side by side."""
    if len(session.talks) == 1:
        session.ask(question, lambda number, text: console.out(text, end=""))
        console.print()
        return
    texts = ["" for _ in session.talks]
    width = (console.width - 1) // len(texts)

    def panels() -> Columns:
        names = [talk.speaker.name for talk in session.talks]
        made = [Panel(Text(t), title=Text(n[-width + 6 :]), width=width) for n, t in zip(names, texts, strict=True)]
        return Columns(made, padding=0)

    with Live(panels(), console=console, vertical_overflow="visible", auto_refresh=False) as live:

        def say(number: int, text: str) -> None:
            texts[number] += text
            live.update(panels(), refresh=True)

        session.ask(question, say)
