"""The model: what is computed from tokens, and what that costs. Knows no data and no training.

- `sizes`, `flops`: the numbers that follow from a `ModelConfig`; no torch, so that a dry run is
  quick. Nothing is imported here for the same reason.
- `layers`, `attention`, `mixers`, `block`: the parts of a layer.
- `aggregation`, `modular`: how chunks of a sequence read from the chunks before them.
- `lm`: the language model; `init`: its initial weights.
"""
