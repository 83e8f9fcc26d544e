"""What becomes of a conversation of some kind, with some template and tokenizer: exact, refused, or wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerFast

from lightning_sft.data.tokens.encode import Encoded, encode_all, encode_prompt
from lightning_sft.data.tokens.template_config import TemplateConfig
from lightning_sft.types import Conversation, Example, InputError
from tests.oracle.families import family_of
from tests.oracle.inference import Inference
from tests.oracle.judge import WrongError, as_meant, inference_of, judge, last_answer
from tests.oracle.kinds import conversation
from tests.oracle.possible import impossible
from tests.oracle.vocabularies import tokenizer_for

MECHANISMS = {
    "r": (
        "behind the prompt by itself",
        "the answer is put behind the prompt, since the template writes the past in other words",
    ),
    "n": (
        "an empty thought is trained",
        "an empty thought is trained",
    ),
    "p": ("parts", "content is given as a list of parts"),
    "m": ("refuses system turns", "the system turn begins the user's"),
    "k": ("control tokens in their texts", "control tokens of texts are tokenized as plain text"),
    "v": ("an answer is empty", "the stop of an empty answer is trained"),
    "a": ("opens the conversation", "an answer that opens the conversation is context"),
    "g": ("marks begin in the prompt", "`{% generation %}` marks of the prompt are left out"),
    "t": ("thoughts in the texts", "a thought in the text takes the place of an empty one"),
    "u": ("does not show", "tools, a system turn or an earlier call are not shown by the template, which is said"),
}
"""Letter -> what a note says, and what it means."""


@dataclass(frozen=True)
class Outcome:
    """What became of a conversation.

    Args:
        of: In a word.
        cell: In a matrix: ``=`` or ``+n``, for sequences, with letters of mechanisms; or the letter of a refusal.
        said: What is wrong, or what the refusal says.
    """

    of: Literal["exact", "refused", "needless", "wrong"]
    cell: str
    said: str = ""


class Case:
    """A template with a tokenizer.

    Args:
        template: The template.
        vocabulary: Kind of tokenizer.
    """

    def __init__(self, template: str, vocabulary: str = "bytes") -> None:
        self.tokenizer: PreTrainedTokenizerFast = tokenizer_for(template, vocabulary)
        self.stops = family_of(template).stops
        stop_ids = [self.tokenizer.convert_tokens_to_ids(stop) for stop in self.stops]
        self.config = TemplateConfig(stop_ids=stop_ids)

    def conversation(self, kind: str) -> Conversation:
        return conversation(kind, self.tokenizer)

    def encoded(self, given: Conversation) -> Encoded:
        [found] = encode_all([given], self.tokenizer, config=self.config)
        return found

    def encode(self, given: Conversation) -> list[Example]:
        """The sequences of a conversation.

        Raises:
            InputError: When it is refused.
        """
        found = self.encoded(given)
        if found.refusal:
            raise found.refusal
        return found.examples

    def judge(self, given: Conversation, examples: list[Example]) -> None:
        """Hold sequences, and the reference of the last answer, against what they should be.

        Raises:
            WrongError: When they are wrong.
        """
        given = as_meant(self.tokenizer, given)
        judge(self.tokenizer, given, examples, self.encode, self.stops)
        if (ids := last_answer(self.tokenizer, given, examples)) is not None:
            said = self.tokenizer.decode(ids, skip_special_tokens=True)  # as generated answers are
            wanted = encode_prompt(given, self.tokenizer, self.config).reference
            if said.strip() != (wanted or "").strip():
                raise WrongError(f"a perfect model answers {said!r}, and is compared with {wanted!r}")

    def outcome(self, kind: str) -> Outcome:
        """What becomes of a kind of conversation."""
        given = self.conversation(kind)
        inference = inference_of(self.tokenizer, given)
        found = self.encoded(given)
        if found.refusal:
            why = impossible(inference, given, [token for token in (self.tokenizer.eos_token, *self.stops) if token])
            return Outcome("refused" if why else "needless", why.upper() or "?", str(found.refusal))
        try:
            self.judge(given, found.examples)
        except (WrongError, InputError) as error:
            return Outcome("wrong", "WRONG", str(error))
        count = len(found.examples)
        return Outcome("exact", ("=" if count == 1 else f"+{count}") + _letters(found.notes, inference))


def _letters(notes: set[str], inference: Inference) -> str:
    said = [*notes, *inference.forms]
    return "".join(letter for letter, (words, _) in MECHANISMS.items() if any(words in note for note in said))
