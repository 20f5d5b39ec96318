"""How gradients become weights: parameter groups, AdamW and Muon, clipping, schedules.

Works on plain and on sharded parameters (DTensors of any meshes) alike, and so that nothing waits
for a GPU: what happens on a bad gradient is decided on the device.

- `groups`: which parameters decay, and at which share of the learning rate each learns.
- `optimizers`: the optimizers of a model as one, as the trainer and checkpoints see them.
- `adamw`, `muon`: the two algorithms.
- `shards`: a rank's own part of sharded tensors, and who counts it.
- `clip`: the global gradient norm.
- `schedules`: the learning rate as a function of the step.
"""

from modular_lm.optim.clip import local_squares, scale_gradients
from modular_lm.optim.optimizers import Optimizers, build_optimizers
from modular_lm.optim.schedules import learning_rate

__all__ = [
    "Optimizers",
    "build_optimizers",
    "learning_rate",
    "local_squares",
    "scale_gradients",
]
