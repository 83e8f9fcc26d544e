"""A model over several devices: FSDP2, tensor parallelism, ZeRO-3.

In: a model and a mesh, or a strategy.
Out: the same model, sharded in place.
May import: machine and types.
"""
