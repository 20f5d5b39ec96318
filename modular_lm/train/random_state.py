"""The state of a rank's random numbers, as one tensor of bytes beside the model's."""

from __future__ import annotations

import torch
from torch import Tensor


def get_random_state(device: torch.device) -> Tensor:
    """PyTorch's generators of this process: the CPU's, then the device's."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Go on where `get_random_state` was. The device's part is left out on another kind of it."""
    size = torch.get_rng_state().numel()
    torch.set_rng_state(state[:size].clone())
    if device.type == "cuda" and state.numel() > size:
        torch.cuda.set_rng_state(state[size:].clone(), device)
