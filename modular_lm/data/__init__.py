"""What is read: documents to token shards (prepare), and token shards to training samples.

- `documents`: parquet and JSON lines, streamed as texts.
- `shuffle`: the two passes that turn documents into globally shuffled shards; plain functions.
  `runs`: the files between them; `finished`: which tasks an interrupted run need not do again.
- `prepare`: checks, plans and drives the two passes for every source; `progress`: its log lines.
- `shards`, `manifest`: the format on disk; `reader`: samples and documents out of it.
- `builtin`: a corpus that every machine has.

Knows nothing of models, training or Ray.
"""
