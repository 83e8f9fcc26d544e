"""A pretrained model as one module that computes Σ w log Pr of a batch.

In: a Hugging Face folder, a hub name or a GGUF file.
Out: a :class:`~lightning_sft.model.likelihood.LikelihoodModel`, probed, compiled, sharded as asked.
May import: training, checkpoints and data.
"""
