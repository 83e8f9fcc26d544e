"""Stage 2: conversations become examples.

In: conversations and a tokenizer with its chat template.
Out: ``input_ids [N]`` and ``target_weights [N]`` as Arrow columns, cached on disk.
May import: data.rows.
"""
