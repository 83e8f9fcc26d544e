"""The output head: logits in chunks of targets, never whole.

In: hidden states ``[T, H]`` and the head.
Out: logits ``[chunk, V]``, their log-softmax and gradients.
May import: types and machine.
"""
