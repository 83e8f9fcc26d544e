"""``lightning-sft completion``: a script by which bash completes verbs, options and their choices.

It is made from the help of each verb and starts no Python, so Tab does not wait for torch to be imported. Of the ways
of jsonargparse, argcomplete runs the whole program at each Tab, and shtab takes many minutes over all of Lightning.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from functools import partial

from lightning_sft.commands.kept_help import captured
from lightning_sft.io.errors import VerbParser

_DESCRIPTION = "Print a completion script for bash: verbs, options and their choices."
_OPTION = re.compile(r"^  (?:-\w, )?(--[\w.]+)(?: \{([^}]*)\})?", re.MULTILINE)
_SCRIPT = """\
# Completion of lightning-sft for bash. Keep it in a file that bash reads:
# lightning-sft completion > ~/.local/share/bash-completion/completions/lightning-sft
_lightning_sft() {
  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} verb=${COMP_WORDS[1]} words=
  if ((COMP_CWORD == 1)); then
    words="%(verbs)s"
  else
    case "$verb $before" in
%(choices)s
      *) [[ $word == -* ]] && case $verb in
%(options)s
      esac ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}
complete -o default -F _lightning_sft lightning-sft
"""


def completion(main: Callable[[list[str]], object], verbs: Sequence[str], args: Sequence[str] = ()) -> str:
    """The script.

    Args:
        main: Runs a command line, and with ``--help`` prints its options.
        verbs: The verbs to complete, with the options that their help lists.
        args: Arguments of the verb itself; it takes none but ``--help``.
    """
    VerbParser(prog="lightning-sft completion", description=_DESCRIPTION).parse_args(list(args))
    options: dict[str, dict[str, str]] = {}
    for verb in verbs:
        with redirect_stderr(io.StringIO()):
            text, code = captured(partial(main, [verb, "--help"]))
        if not code:
            options[verb] = dict(_OPTION.findall(text))
    chosen = [
        f'      "{verb} {option}") words="{choices.replace(",", " ")}" ;;'
        for verb, own in options.items()
        for option, choices in own.items()
        if choices
    ]
    listed = [f'        {verb}) words="{" ".join(own)}" ;;' for verb, own in options.items()]
    lines = {"verbs": " ".join([*options, "completion"]), "choices": "\n".join(chosen), "options": "\n".join(listed)}
    return _SCRIPT % lines
