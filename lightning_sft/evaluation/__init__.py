"""What is measured of a model: metrics, generated answers, their scores.

In: a module, and batches or prompts.
Out: metrics over whole data sets, answers, scores.
May import: model and what is to its left.
"""
