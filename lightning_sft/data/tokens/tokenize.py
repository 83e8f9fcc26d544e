"""Texts to token ids; parts that texts have in common are tokenized only once.

A tokenizer first cuts a text at its control tokens, and nothing that it does then reaches across a cut. So the ids of a
text are those of its segments, one after another, where each control token begins one. The prompt of an answer, and
prompt and answer together, have all but the last segments in common; so do the turns of a conversation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain, combinations, pairwise

from tokenizers import AddedToken, Tokenizer


class Segments:
    """Tokenizes many texts together, without ids that the tokenizer would add.

    Args:
        backend: Backend of a fast tokenizer. Its truncation and padding are turned off.

    >>> from lightning_sft.demos import tiny_tokenizer
    >>> segments = Segments(tiny_tokenizer().backend_tokenizer)
    >>> segments.of("Be brief.<|im_end|>yes<|im_end|>")
    ['Be brief.', '<|im_end|>yes', '<|im_end|>']
    >>> [len(ids) for ids in segments.token_ids(["<|im_end|>", "<|im_end|>yes<|im_end|>"])]
    [1, 5]
    """

    def __init__(self, backend: Tokenizer) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        added = [] if backend.encode_special_tokens else list(backend.get_added_tokens_decoder().values())
        self._begins = re.compile("|".join(map(re.escape, _always_cut(added))) or r"(?!)")

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; one call of the tokenizer for all."""
        numbers: dict[str, int] = {}
        parts = [[numbers.setdefault(segment, len(numbers)) for segment in self.of(text)] for text in texts]
        encodings = self._backend.encode_batch_fast(list(numbers), add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        return [list(chain.from_iterable(ids[number] for number in own)) for own in parts]

    def of(self, text: str) -> list[str]:
        """The segments of a text."""
        cuts = [match.start() for match in self._begins.finditer(text)]
        return [text[begin:end] for begin, end in pairwise([0, *cuts, len(text)]) if begin < end]


def _always_cut(added: Sequence[AddedToken]) -> Iterator[str]:
    """The control tokens that a tokenizer finds wherever their text is, before it looks at anything else.

    Not among them are those that take the blanks before them, or want no letter beside them, and those whose text could
    be taken for another added token, which has it inside, or ends with what it begins with.
    """
    plain = [token for token in added if token.content and not token.normalized]
    contents = [token.content for token in plain]  # some tokenizers have thousands: no token is held against each other
    ends = {text[begin:] for text in contents for begin in range(len(text))}
    inner = {text[i:j] for text in contents for i, j in combinations(range(len(text) + 1), 2) if j - i < len(text)}
    for token in plain:
        is_end = any(token.content[:size] in ends for size in range(1, len(token.content)))
        if token.special and not (token.lstrip or token.single_word or is_end or token.content in inner):
            yield token.content
