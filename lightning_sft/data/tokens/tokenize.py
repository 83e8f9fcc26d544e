"""Texts to token ids, and the ids of their beginnings; parts that texts have in common are tokenized only once.

A tokenizer first cuts a text at its control tokens, and nothing that it does then reaches across a cut. So the ids of a
text are those of its segments, one after another, where each control token begins one. The prompt of an answer, and
prompt and answer together, have all but the last segments in common; so do the turns of a conversation.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from lightning_sft.data.tokens.control_tokens import any_of, is_marked, marked_ids

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Beginning:
    """Ids of a text up to some place.

    Args:
        whole: Ids of the segments of the text, one list for all beginnings of it.
        num_whole: Number of segments that lie before the place.
        rest: Ids of what follows them, up to the place.
        length: Number of tokens.
    """

    whole: Sequence[Ids]
    num_whole: int
    rest: Ids
    length: int

    @property
    def ids(self) -> Ids:
        """All of them."""
        return np.concatenate([*self.whole[: self.num_whole], self.rest])

    def after(self, other: Beginning) -> Ids | None:
        """What follows on a beginning that ends before this one; ``None`` if its ids are not where this begins.

        Where a token reaches over its end, they are not.
        """
        tail = np.concatenate([*self.whole[other.num_whole : self.num_whole], self.rest])
        size = len(other.rest)
        return tail[size:] if not size or np.array_equal(tail[:size], other.rest) else None


class Segments:
    """Tokenizes many texts together, without ids that the tokenizer would add.

    Args:
        backend: Backend of a fast tokenizer. Its truncation and padding are turned off.
        tokenizer: The tokenizer, for texts with marked control tokens, or where it has no backend.

    >>> from lightning_sft.demos import tiny_tokenizer
    >>> segments = Segments(tiny_tokenizer().backend_tokenizer)
    >>> segments.of("Be brief.<|im_end|>yes<|im_end|>")
    ['Be brief.', '<|im_end|>yes', '<|im_end|>']
    >>> [len(ids) for ids in segments.token_ids(["<|im_end|>", "<|im_end|>yes<|im_end|>"])]
    [1, 5]
    >>> [[before, both]] = segments.beginnings([("a<|im_end|>bc", [11, 13])])
    >>> both.after(before).size, both.length
    (2, 4)
    """

    def __init__(self, backend: Tokenizer | None, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self._backend, self._tokenizer = backend, cast(Any, tokenizer)
        added: Sequence[AddedToken] = ()
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()
            added = [] if backend.encode_special_tokens else list(backend.get_added_tokens_decoder().values())
        self._cuts = any_of(set(_always_cut(added)))

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; one call of the tokenizer for all."""
        return [found.ids.tolist() for [found] in self.beginnings([(text, [len(text)]) for text in texts])]

    def of(self, text: str) -> list[str]:
        """The segments of a text."""
        cuts = [match.start() for match in self._cuts.finditer(text)]
        return [text[begin:end] for begin, end in pairwise([0, *cuts, len(text)]) if begin < end]

    def around(self, text: str, place: int) -> tuple[int, int]:
        """Begin and end of the segment that a place in a text is in; both are the place where that is between two."""
        if self._backend is None or is_marked(text):
            return 0, len(text)
        begin = max((match.start() for match in self._cuts.finditer(text, 0, place)), default=0)
        cut = self._cuts.search(text, place)
        end = cut.start() if cut else len(text)
        return (place, place) if end == place else (begin, end)

    def beginnings(
        self, texts: Sequence[tuple[str, Sequence[int]]], known: dict[str, Ids] | None = None
    ) -> list[list[Beginning]]:
        """The ids of each text up to each of some places, which are in order; one call of the tokenizer for all.

        Args:
            texts: Texts, each with its places.
            known: Ids of the segments of the call before, which are not tokenized again; replaced by those of this one.

        Raises:
            InputError: When a text has a marked control token of which the tokenizer makes that token.
        """
        numbers: dict[str, int] = {}
        plans = [self._planned(text, places, numbers) for text, places in texts]
        ids = self._ids_of(list(numbers), {} if known is None else known)
        found = []
        for segments, ends in plans:
            whole = [ids[number] for number in segments]
            before = np.cumsum([0, *map(len, whole)]).tolist()
            found.append([Beginning(whole, count, ids[rest], before[count] + len(ids[rest])) for count, rest in ends])
        return found

    def _planned(
        self, text: str, places: Sequence[int], numbers: dict[str, int]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The segments of a text, and of each place the number of those before it and the rest; all as numbers."""

        def number(piece: str) -> int:
            return numbers.setdefault(piece, len(numbers))

        if self._backend is None or is_marked(text):  # in one segment: it is not cut where the tokenizer would
            return [], [(0, number(text[:place])) for place in places]
        matches = list(self._cuts.finditer(text, 0, places[-1] if places else 0))
        cuts, token_ends = [match.start() for match in matches], [match.end() for match in matches]
        begins = [0, *cuts] if not cuts or cuts[0] else cuts
        skipped = len(begins) - len(cuts)  # 1 where a segment stands before the first control token
        ends = []
        for place in places:  # a control token that the place is within is none in that beginning
            last = max(0, bisect_right(token_ends, place) - 1 + skipped)
            ends.append((last, number(text[begins[last] : place])))
        most = max((count for count, _ in ends), default=0)
        return [number(text[begins[i] : begins[i + 1]]) for i in range(most)], ends

    def _ids_of(self, pieces: Sequence[str], known: dict[str, Ids]) -> list[Ids]:
        new = [piece for piece in pieces if piece not in known]
        known |= dict(zip(new, self._encoded(new), strict=True))
        found = [known[piece] for piece in pieces]
        known.clear()
        known.update(zip(pieces, found, strict=True))
        return found

    def _encoded(self, pieces: Sequence[str]) -> list[Ids]:
        plain = [piece for piece in pieces if not is_marked(piece)]
        if self._backend is not None:
            encodings = self._backend.encode_batch_fast(plain, add_special_tokens=False)
            ids = iter([np.array(encoding.ids, np.int32) for encoding in encodings])
        else:
            listed = self._tokenizer(plain, add_special_tokens=False)["input_ids"] if plain else []
            ids = iter([np.array(own, np.int32) for own in listed])
        return [
            np.array(marked_ids(self._tokenizer, piece), np.int32) if is_marked(piece) else next(ids)
            for piece in pieces
        ]


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
