"""Inference slab by slab: few whole tensors of the full resolution are held, the rest is made some slices at a time.

No approximation: the norms' statistics are those of the whole volume, and neighbouring slices are the volume's own.
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from support.fast import affine_silu, moments, norm_as_affine


def by_slabs(net, size, blocks):
    """Let a UNet3D work `size` slices at a time from now on.   blocks: the class of its Blocks"""
    net.stem.forward = partial(Remade, net.stem, size)
    net.join = lambda *parts: list(parts)                                # joined slab by slab
    for module in net.modules():
        if isinstance(module, blocks):
            module.forward = partial(block_in_slabs, module, size)


class Remade:
    """conv(x), made each time that it is needed rather than held from the network's beginning to its end."""

    def __init__(self, conv, size, x):
        self.conv, self.size, self.x = conv, size, x

    def make(self):
        return conv_in_slabs(self.conv, [self.x], self.size)[0]


def block_in_slabs(block, size, parts, temb):
    """block(cat(parts), temb), holding one tensor of the output's size beside the parts."""
    parts = [p.make() if isinstance(p, Remade) else p for p in (parts if isinstance(parts, list) else [parts])]
    scale_shift = block.time(F.silu(temb)) if block.time else None
    h, found = conv_in_slabs(block.conv1, parts, size)
    gain, offset = norm_as_affine(block.norm1, found, scale_shift)
    for d in range(0, h.shape[2], size):
        h[:, :, d:d + size] = affine_silu(h[:, :, d:d + size], gain, offset)

    h, found = conv_in_slabs(block.conv2, [h], size, out=h)
    gain, offset = norm_as_affine(block.norm2, found)
    for d in range(0, h.shape[2], size):
        skip = block.skip(torch.cat([p[:, :, d:d + size] for p in parts], 1))
        h[:, :, d:d + size] = affine_silu(h[:, :, d:d + size], gain, offset) + skip
    return h


def conv_in_slabs(conv, parts, size, out=None):
    """conv(cat(parts)) and its moments, `size` slices of D at a time.   out: parts[0], to be overwritten
    -> (B,C',D,H,W), (2,B,C')"""
    D, halo, total = parts[0].shape[2], conv.padding[0] if isinstance(conv, nn.Conv3d) else 0, 0
    before = parts[0][:, :, :0]                        # input slices that `out` has overwritten, but the next slab sees
    for a in range(0, D, size):
        b = min(a + size, D)
        x = torch.cat([p[:, :, a:b + halo] for p in parts], 1)
        x = torch.cat([before, x], 2) if a else x
        seen = min(halo, a)                              # slices of x before a
        before = x[:, :, max(seen + b - a - halo, 0):seen + b - a].clone()
        y = type(conv).forward(conv, x)[:, :, seen:seen + b - a]
        if out is None:
            out = torch.empty(y.shape[0], y.shape[1], D, *y.shape[3:], dtype=y.dtype, device=y.device,
                              memory_format=torch.channels_last_3d)
        out[:, :, a:b] = y
        total = total + moments(y) * ((b - a) / D)
    return out, total
