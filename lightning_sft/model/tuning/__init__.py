"""What of a model is trained: adapters, frozen parameters, new tokens, quantized bases.

In: a loaded model and what was asked.
Out: the same model, with what is trained marked.
May import: model's other files and what is to the left of model.
"""
