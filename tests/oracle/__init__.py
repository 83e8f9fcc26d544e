"""An oracle for training sequences that knows nothing of the code that makes them.

It gets a tokenizer with its chat template, a conversation, and the sequences that ``encode`` has made of it. What they
should be it finds out by transformers and tokenizers alone: :mod:`inference` renders what a server would,
:mod:`endings` finds what stops an answer, :mod:`fields` puts sentinels into a conversation, and :mod:`judge` compares.
:mod:`kinds`, :mod:`templates` and :mod:`vocabularies` are what it is run on.
"""
