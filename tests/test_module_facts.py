from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest

from lightning_sft.module_facts import check_ids, keeps_documents_apart
from lightning_sft.types import InputError


def test_ids_without_an_embedding_are_refused_where_the_module_says_how_many_it_has() -> None:
    check_ids(SimpleNamespace(num_embeddings=8), "train", 7, "a")
    check_ids(SimpleNamespace(), "train", 8, "a")
    check_ids(None, "train", 8, "a")
    with pytest.raises(InputError, match=r"data.val has the token id 8, but the model has embeddings for 8"):
        check_ids(SimpleNamespace(num_embeddings=8), "val", 8, "a")


def test_documents_are_packed_where_nothing_speaks_against_it() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert keeps_documents_apart(None)
        assert keeps_documents_apart(SimpleNamespace(isolates_documents=True))
    with pytest.warns(UserWarning, match="does not say"):
        assert keeps_documents_apart(SimpleNamespace())
    with pytest.warns(UserWarning, match="see each other"):
        assert not keeps_documents_apart(SimpleNamespace(isolates_documents=False))
