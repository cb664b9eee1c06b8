"""Golden numbers of the original network, sampler and losses: random weights, inputs and outputs, made once in float32.

To stay small the weights, which are bfloat16 numbers, are stored as such, and outputs as every second voxel
(`[EVERY]`).
"""
import json
import lzma
from pathlib import Path

import numpy as np
import torch

from support.released import from_released
from unet3d import UNet3D

FOLDER = Path(__file__).parent / "golden"
EVERY = np.s_[..., ::2, ::2, ::2]


def load(name):
    """Arrays of golden/<name>.npz: numbers as tensors, names as they are."""
    with np.load(FOLDER / f"{name}.npz") as z:
        return {k: torch.from_numpy(z[k]) if z[k].dtype.kind == "f" else z[k] for k in z.files}


def weights(name):
    """The released form's state dict of the golden network `low` or `sr`."""
    z = load(name)
    high, low = np.frombuffer(lzma.decompress(z["weights"].tobytes()), np.uint8).reshape(2, -1)[::-1].astype(np.uint32)
    flat = torch.from_numpy((high << 24 | low << 16).view(np.float32))
    state, start = {}, 0
    for key, shape in json.loads(str(z["layout"])).items():
        size = int(np.prod(shape))
        state[key] = flat[start:start + size].reshape(shape)
        start += size
    for key in [k for k in state if k.startswith("mid_spatial_attn1.fn.fn")]:      # the released form has these 4 times
        state.update({key.replace("attn1", f"attn{i}"): state[key] for i in (2, 3, 4)})
    return state


def network(name):
    """The golden network, loaded by the code under test."""
    return from_released(weights(name), UNet3D).eval()
