"""What happens around a step: questions to the trainer, checks, optimizers, throughput.

In: trainer, module, optimizers.
Out: refusals before step 0, parameter groups, schedules, tokens a second.
May import: data and what is to its left.
"""
