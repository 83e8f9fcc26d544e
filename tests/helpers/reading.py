"""A reader who copies each code block of a page, in order, into one terminal, and sees what the page says.

A block is run by its language:

python    in one namespace for the page; where its first line is ``# name.py``, it is written to that file instead
yaml      is written to the file that its first line names: ``# name.yaml``
bash      command by command: ``lightning-sft`` and ``python`` in this process, all else in a shell
text      is what the block before it has printed

A comment right above a block says what is special about it:

<!-- fails -->            it ends with an error
<!-- same -->             the lines of a text are among what was printed
<!-- but for numbers -->  likewise, whatever their numbers are
<!-- needs NAME -->       it is left out where there is no program or file of this name
<!-- processes -->        it is left out where commands run in this process
"""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from glob import glob
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lightning_sft.main import console
from tests.helpers.processes import run

_BLOCK = re.compile(r"(?:^<!-- ([^>\n]*) -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_NAME = re.compile(r"# ([\w/]+\.(?:py|yaml))\n")


@dataclass(frozen=True)
class Block:
    """A code block: its language, its text, the comment above it, and the number of its first line."""

    language: str
    text: str
    remark: str
    line: int

    @property
    def file(self) -> Path | None:
        """The file that the reader is told to write it to."""
        found = _NAME.match(self.text)
        return Path(found.group(1)) if found else None

    def write(self) -> None:
        assert self.file, f"the first line of a block of {self.language} names its file, as '# fit.yaml'"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(self.text, encoding="utf-8")


def all_blocks(page: str) -> Iterator[Block]:
    for found in _BLOCK.finditer(page):
        remark, language, text = found.groups()
        yield Block(language, text, remark or "", page.count("\n", 0, found.start(3)) + 1)


@dataclass
class Reader:
    """Somebody in an empty folder.

    Args:
        capsys: Of pytest; what is printed is looked for there.
        changes: What of commands is replaced, to be quick.
        in_process: Whether commands run in this process, or each in one of its own.
    """

    capsys: Any
    changes: Mapping[str, str] = field(default_factory=dict)
    in_process: bool = True
    scope: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    printed: str = ""

    def read(self, page: Path) -> None:
        """Run all blocks.

        Raises:
            AssertionError: A block does not do what the page says; with its line.
        """
        kinds = {"python": self._python, "yaml": Block.write, "bash": self._bash, "text": self._text}
        was_possible, before = True, set(sys.modules)
        try:
            for block in all_blocks(page.read_text(encoding="utf-8")):
                was_possible = was_possible if block.language == "text" else self._is_possible(block)
                if was_possible:
                    try:
                        kinds[block.language](block)
                    except Exception as error:
                        raise AssertionError(f"{page.name}:{block.line}: {type(error).__name__}: {error}") from error
        finally:  # the next page may have a module of the same name
            for name in set(sys.modules) - before:
                if str(getattr(sys.modules[name], "__file__", "")).startswith(str(Path.cwd())):
                    del sys.modules[name]

    def _is_possible(self, block: Block) -> bool:
        what, _, name = block.remark.partition(" ")
        if what == "needs":
            return shutil.which(name) is not None or Path(name).exists()
        return what != "processes" or not self.in_process

    def _python(self, block: Block) -> None:
        if block.file:
            block.write()
        else:
            code = compile(block.text, f"<block at line {block.line}>", "exec")
            self._do(block, lambda: exec(code, self.scope))

    def _bash(self, block: Block) -> None:
        text = block.text
        for old, new in self.changes.items():
            text = text.replace(old, new)
        self._do(block, lambda: [self._command(command) for command in commands(text)])

    def _text(self, block: Block) -> None:
        if block.remark in ("same", "but for numbers"):
            printed = iter([_plain(line, block.remark) for line in self.printed.splitlines()])
            for line in filter(None, (_plain(line, block.remark) for line in block.text.splitlines())):
                assert line == "…" or line in printed, f"not printed, or not here: {line!r}\n{self.printed}"

    def _do(self, block: Block, action: Callable[[], Any]) -> None:
        """Run it, and keep what a reader sees."""
        self.capsys.readouterr()
        error: BaseException | None = None
        try:
            action()
        except SystemExit as end:
            error = end if end.code else None
        except Exception as raised:
            error = raised
        self.printed = "\n".join([*self.capsys.readouterr(), "" if error is None else str(error)])
        if (error is not None) != (block.remark == "fails"):
            raise AssertionError(f"{error or 'no error'}\n{self.printed}") from error

    def _command(self, command: str) -> None:
        if "\n" in command or not re.match(r"lightning-sft |python |printf .* \| lightning-sft ", command):
            sys.stdout.write(run(["bash", "-euo", "pipefail", "-c", command], cwd=Path.cwd()))
            return
        asked, pipe, own = command.rpartition(" | ")
        words = [word for given in shlex.split(own) for word in sorted(glob(given)) or [given]]
        is_ours = words[0] == "lightning-sft" or words[1:3] == ["-m", "lightning_sft"]
        rest = words[1:] if words[0] == "lightning-sft" else words[3:] if is_ours else words[1:]
        if not self.in_process:
            sys.stdout.write(
                run([sys.executable, *(["-m", "lightning_sft"] if is_ours else []), *rest], cwd=Path.cwd())
            )
            return
        lines = StringIO(run(["bash", "-c", asked]) if pipe else "")
        with (
            patch.object(sys, "argv", ["lightning-sft", *rest] if is_ours else rest),
            patch.object(sys, "stdin", lines),
        ):
            if is_ours:
                console()
            else:
                runpy.run_path(rest[0], run_name="__main__")


def commands(text: str) -> Iterator[str]:
    r"""The commands of a shell block; a text for one stays with it, and so does what runs beside others.

    >>> list(commands("fit \\\n  --a 1\ncat > f <<'EOF'\nx\nEOF\nls\n"))
    ['fit    --a 1', "cat > f <<'EOF'\nx\nEOF", 'ls']
    """
    if " &\n" in text:
        yield text
        return
    lines = iter(text.replace("\\\n", " ").splitlines())
    for line in lines:
        if end := re.search(r"<<'(\w+)'", line):
            while not line.endswith(f"\n{end.group(1)}"):
                line += f"\n{next(lines)}"
        if line.strip():
            yield line


def _plain(line: str, remark: str) -> str:
    """A line with single spaces, and where numbers do not matter, without them."""
    line = " ".join(line.split())
    return re.sub(r"\d[\d.,]*(?:e[+-]\d+)?", "#", line) if remark == "but for numbers" else line
