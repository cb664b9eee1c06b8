"""The network of unet3d.py written the plain way, as the bar to beat: 5D convolutions with contiguous memory, attention
by two einsums, norm, scale, shift and SiLU as separate operations, and nothing recomputed. Same weights, same result;
in float32 this is how the released code runs.
"""
import copy

import torch
import torch.nn.functional as F
from torch import nn

from support.fast import Pointwise, SliceConv, SliceUp
from unet3d import HEAD_DIM, sinusoidal


def conv3d(m):
    """SliceConv, SliceUp or Pointwise as the 5D convolution that it stands for; other modules as they are, with
    contiguous weights."""
    if isinstance(m, Pointwise):
        new = nn.Conv3d(m.in_features, m.out_features, 1)
        new.weight.data = m.weight.data[:, :, None, None, None]
    elif isinstance(m, (SliceConv, SliceUp)):
        kind = nn.ConvTranspose3d if isinstance(m, SliceUp) else nn.Conv3d
        new = kind(m.in_channels, m.out_channels, (1, *m.kernel_size), (1, *m.stride), (0, *m.padding))
        new.weight.data = m.weight.data[:, :, None].contiguous()
    elif isinstance(m, nn.Conv3d):
        new = nn.Conv3d(m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding)
        new.weight.data = m.weight.data.contiguous()
    else:
        return m
    new.bias.data = m.bias.data.clone()
    return new


def swap(module):
    for name, child in module.named_children():
        setattr(module, name, conv3d(child))
        swap(child)


class Reference(nn.Module):
    """net: a UNet3D with bottom "plane".   forward as UNet3D.forward"""

    def __init__(self, net):
        super().__init__()
        self.net, self.args = copy.deepcopy(net), net.args
        swap(self.net)

    def block(self, b, x, temb):
        h = b.norm1(b.conv1(x))
        if b.time:
            scale, shift = b.time(F.silu(temb))[..., None, None, None].chunk(2, dim=1)
            h = h * (scale + 1) + shift
        h = F.silu(b.norm2(b.conv2(F.silu(h))))
        return h + b.skip(x)

    def attention(self, a, x, context=None):
        q, (k, v) = a.q(x), a.kv(x if context is None else context).chunk(2, dim=-1)
        q, k, v = (z.unflatten(-1, (a.heads, HEAD_DIM)).transpose(1, 2) for z in (q, k, v))
        weights = torch.einsum("bhid,bhjd->bhij", q * HEAD_DIM**-0.5, k).softmax(dim=-1)
        return a.out(torch.einsum("bhij,bhjd->bhid", weights, v).transpose(1, 2).flatten(2))

    def forward(self, xt, t, context=None, drop=None):
        net = self.net
        if net.null_text is None:
            context = None
        elif context is None:
            context = net.null_text.expand(len(xt), -1, -1)
        elif drop is not None:
            context = torch.where(drop[:, None, None], net.null_text, context)
        temb = net.time(sinusoidal(1000 * t, net.dim))
        x = r = net.stem(xt.contiguous())                # diffusion.beside lays it out for ours
        skips = []
        for down in net.downs:
            x = self.block(down.slice2, self.block(down.slice1, x, temb), temb)
            skips.append(x)
            x = self.block(down.volume, down.resize(x), temb)

        x = self.block(net.first, x, temb)
        for i in net.rounds:
            B, C, D, H, W = x.shape
            tokens = x.permute(0, 2, 3, 4, 1).reshape(B * D, H * W, C)
            tokens = tokens + self.attention(net.attend, i.self_norm(tokens))
            if context is not None:
                tokens = tokens.reshape(B, D * H * W, C)
                tokens = tokens + self.attention(i.cross, i.cross_norm(tokens), context)
            x = self.block(i.volume, tokens.reshape(B, D, H, W, C).permute(0, 4, 1, 2, 3).contiguous(), temb)
        x = self.block(net.last, x, temb)

        for up in net.ups:
            x = self.block(up.slice2, self.block(up.slice1, torch.cat([x, skips.pop()], dim=1), temb), temb)
            x = up.resize(self.block(up.volume, x, temb))
        return net.out(self.block(net.head, torch.cat([x, r], dim=1), temb)).float()
