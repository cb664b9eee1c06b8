"""The efficient 3D UNet of both stages: pure convolutions on the way down and up, all attention at the bottom.
Paper sec. 4.5. The layer graph is that of the released weights in their inference order, so those weights load into it.

    G = UNet3D(dim=160, heads=8)                                               # report -> 64^3, 716 M parameters
    H = UNet3D(dim=56, in_channels=8, heads=4, rounds=1, context_dim=0)        # 64^3 -> 256^3, 54 M parameters

One volume's way through G, whose widths are w = 160, 320, 640, 1280; depth D is never halved, H and W are three times:

    xt (4,64,64,64) -> stem -> 4 x Down -> bottom (1280,64,8,8), which attends to text -> 4 x Up -> head -> x0_hat
                         |       |______ skips, level by level ______________________________|        |
                         |____________________________________________________________________________|

Layers from support/fast.py are torch's own, written for speed: SliceConv is Conv3d with kernel (1,k,k), SliceUp its
transpose, Pointwise Conv3d with (1,1,1), Last the same in float32, VolumeConv and Stem Conv3d, lay_out a cast and copy;
norm_scale_silu(x, norm, [scale, shift]) = SiLU(norm(x) (1 + scale) + shift), attention is scaled dot-product.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from support.fast import (
    Last,
    Pointwise,
    SliceConv,
    SliceUp,
    Stem,
    VolumeConv,
    attention,
    lay_out,
    lay_out_weights,
    norm_scale_silu,
)

GROUPS = 8      # of every GroupNorm
HEAD_DIM = 32   # of every attention head


class Block(nn.Module):
    """conv -> norm -> time scale and shift -> SiLU -> conv -> norm -> SiLU, plus the input.
    (B,cin,D,H,W) -> (B,cout,D,H,W)

    volume: kernels (3,3,3) instead of (1,3,3).   time_dim: width of the time embedding, 0 for a Block without time.
    """

    def __init__(self, cin, cout, time_dim, volume=False):
        super().__init__()
        conv = VolumeConv if volume else SliceConv
        self.time = nn.Linear(time_dim, 2 * cout) if time_dim else None
        self.conv1, self.norm1 = conv(cin, cout, 3, padding=1), nn.GroupNorm(GROUPS, cout)
        self.conv2, self.norm2 = conv(cout, cout, 3, padding=1), nn.GroupNorm(GROUPS, cout)
        self.skip = Pointwise(cin, cout) if cin != cout else nn.Identity()

    def forward(self, x, temb):
        scale_shift = self.time(F.silu(temb)) if self.time else None     # (B, 2 cout)
        h = norm_scale_silu(self.conv1(x), self.norm1, scale_shift)
        h = self.conv2(h)                                             # in two lines: its input is freed before the norm
        h = norm_scale_silu(h, self.norm2)
        h += self.skip(x)
        return h


class ChannelNorm(nn.Module):
    """LayerNorm over the last axis with a gain and no bias.   (...,C) -> (...,C)"""

    def __init__(self, dim):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.layer_norm(x, self.gain.shape, self.gain, eps=1e-5)


class Attention(nn.Module):
    """softmax(q k^T / sqrt(32)) v with heads x 32.   x: (B,L,C), context: (B,N,context_dim) or None for self-attention
    -> (B,L,C)"""

    def __init__(self, dim, heads, context_dim=0):
        super().__init__()
        self.heads, inner = heads, heads * HEAD_DIM
        self.q = nn.Linear(dim, inner, bias=False)
        self.kv = nn.Linear(context_dim or dim, 2 * inner, bias=False)
        self.out = nn.Linear(inner, dim, bias=context_dim > 0)           # as in the released weights

    def forward(self, x, context=None):
        q, (k, v) = self.q(x), self.kv(x if context is None else context).chunk(2, dim=-1)
        q, k, v = (z.unflatten(-1, (self.heads, HEAD_DIM)).transpose(1, 2) for z in (q, k, v))   # (B,heads,L,32)
        return self.out(attention(q, k, v).transpose(1, 2).flatten(2))


class Round(nn.Module):
    """One round of the bottom: self-attention [-> cross-attention to the text], both residual; then the volume Block,
    which UNet3D.body runs. The self-attention's projections are passed in: all rounds share one set of them.
    """

    def __init__(self, dim, heads, context_dim, time_dim):
        super().__init__()
        self.self_norm = ChannelNorm(dim)
        if context_dim:
            self.cross_norm, self.cross = ChannelNorm(dim), Attention(dim, heads, context_dim)
        self.volume = Block(dim, dim, time_dim, volume=True)

    def forward(self, x, context, attend, plane):
        x = x.movedim(1, -1)                                             # (B,D,H,W,C), a view
        B, D, H, W, C = x.shape
        if plane:                                                        # the voxels of one slice see each other
            tokens = x.reshape(B * D, H * W, C)
            x = (tokens + attend(self.self_norm(tokens))).reshape(x.shape)
        else:                                                            # the voxels of one column along D do
            tokens = x.permute(0, 2, 3, 1, 4).reshape(B * H * W, D, C)
            x = (tokens + attend(self.self_norm(tokens))).reshape(B, H, W, D, C).permute(0, 3, 1, 2, 4)

        if context is not None:                  # every voxel asks the N tokens of the text, padding too: released code
            tokens = x.reshape(B, D * H * W, C)
            x = (tokens + self.cross(self.cross_norm(tokens), context)).reshape(x.shape)
        return x.movedim(-1, 1)


class Down(nn.Module):
    """Way down: slice Block -> slice Block (the skip) -> halve H and W -> volume Block.   last: the deepest, which does
    not halve. It only holds the layers: UNet3D.body calls them, so that a tensor is freed as soon as it is used."""

    def __init__(self, cin, cout, time_dim, last):
        super().__init__()
        self.slice1, self.slice2 = Block(cin, cout, time_dim), Block(cout, cout, time_dim)
        self.resize = nn.Identity() if last else SliceConv(cout, cout, 4, stride=2, padding=1)
        self.volume = Block(cout, cout, time_dim, volume=True)


class Up(nn.Module):
    """Way up: slice Block -> slice Block -> volume Block -> double H and W.   last: the topmost, which does not."""

    def __init__(self, cin, cout, time_dim, last):
        super().__init__()
        self.slice1, self.slice2 = Block(cin, cout, time_dim), Block(cout, cout, time_dim)
        self.volume = Block(cout, cout, time_dim, volume=True)
        self.resize = nn.Identity() if last else SliceUp(cout, cout, 4, stride=2, padding=1)


def sinusoidal(t, dim):
    """Sines and cosines of t at dim/2 frequencies from 1 to 1/10000.   t: (B,) -> (B,dim)"""
    freq = torch.exp(torch.arange(dim // 2, device=t.device) * (-math.log(10000) / (dim // 2 - 1)))
    return torch.cat([(t[:, None] * freq).sin(), (t[:, None] * freq).cos()], dim=1)


class UNet3D(nn.Module):
    """The x_0 predictor of both stages (sec. 4.5).

    dim: width w of the first level, a multiple of 8; the levels are w, 2w, 4w, 8w wide.   levels: how many of them.
    in_channels: 4 in stage 1; 8 in stage 2, whose input is [low, xt].   heads: of 32 channels each.   rounds: at the
    bottom, 4 in stage 1, 1 in stage 2.   context_dim, tokens: of the text (B,tokens,context_dim); 0: a network without.
    bottom: self-attention within a slice, "plane" (released weights), or along D, "depth" (the paper, of stage 2).
    Inputs: H and W are multiples of 2^(levels - 1); D is never halved.
    """

    def __init__(self, dim, in_channels=4, out_channels=4, heads=8, rounds=4, context_dim=768, tokens=192, levels=4,
                 bottom="plane"):
        super().__init__()
        if dim % GROUPS or bottom not in ("plane", "depth"):
            raise ValueError(f"dim {dim}, bottom {bottom!r}; dim is a multiple of {GROUPS}, bottom plane or depth; "
                             "change them")
        self.args = dict(dim=dim, in_channels=in_channels, out_channels=out_channels, heads=heads, rounds=rounds,
                         context_dim=context_dim, tokens=tokens, levels=levels, bottom=bottom)
        self.dim, self.plane = dim, bottom == "plane"
        w, T = [dim] + [dim * 2**i for i in range(levels)], 4 * dim
        self.null_text = nn.Parameter(torch.randn(1, tokens, context_dim)) if context_dim else None
        self.stem = Stem(in_channels, dim, 7, padding=3)
        self.time = nn.Sequential(nn.Linear(dim, T), nn.GELU(), nn.Linear(T, T))
        self.downs = nn.ModuleList(Down(w[i], w[i + 1], T, i == levels - 1) for i in range(levels))
        self.first = Block(w[-1], w[-1], T)
        self.attend = Attention(w[-1], heads)
        self.rounds = nn.ModuleList(Round(w[-1], heads, context_dim, T) for _ in range(rounds))
        self.last = Block(w[-1], w[-1], T)
        self.ups = nn.ModuleList(Up(2 * w[i + 1], w[i], T, i == 0) for i in reversed(range(levels)))
        self.head = Block(2 * dim, dim, 0)
        self.out = Last(dim, out_channels)
        lay_out_weights(self)

    def forward(self, xt, t, context=None, drop=None):
        """xt: (B,in_channels,D,H,W)   t: (B,) in [0,1]   context: (B,N,context_dim), or None for the learned null text
        drop: (B,) bool, True where the null text replaces this sample's (training for guidance)   -> x0_hat (B,4,D,H,W)
        """
        context = self.text(context, drop, len(xt))
        temb = self.embed(t, context)                                    # (B,4w)
        xt = lay_out(xt)
        stem = self.stem(xt)                                             # (B,w,D,H,W), also the last skip
        x = self.join(self.body(stem, temb, context), stem)              # (B,2w,D,H,W)
        del stem                                                         # its memory is wanted, 1.9 GB at 256^3
        x = self.head(x, temb)                                           # and the head ends with a 1x1x1 convolution
        return self.out(x)

    def text(self, context, drop, B):
        """What the bottom attends to: the text, the learned null text instead (released code), or nothing (H).
        context: (B,N,context_dim) or None   drop: (B,) bool or None   -> (B,N,context_dim) or None"""
        if self.null_text is None:
            return None
        if context is None:
            return self.null_text.expand(B, -1, -1)
        return context if drop is None else torch.where(drop[:, None, None], self.null_text, context)

    def embed(self, t, context):
        """What every Block knows beside its input: the time. The text, given here for networks that pool it, is not
        used. t: (B,) in [0,1] -> (B,4w)"""
        return self.time(sinusoidal(1000 * t, self.dim))

    def body(self, x, temb, context):
        """Way down, bottom, way up.   (B,w,D,H,W) -> (B,w,D,H,W)"""
        # down: widths after the levels are w, 2w, 4w, 8w
        skips = []
        for down in self.downs:
            x = down.slice1(x, temb)
            x = down.slice2(x, temb)
            skips.append(x)
            x = down.resize(x)                                           # H/2, W/2, but at the last; depth is kept
            x = down.volume(x, temb)

        # bottom: the only attention
        x = self.first(x, temb)
        for turn in self.rounds:
            x = turn(x, context, self.attend, self.plane)
            x = turn.volume(x, temb)
        x = self.last(x, temb)

        # up: each level takes the skip of its resolution
        for up in self.ups:
            x = self.join(x, skips.pop())                             # always the same name: what it stood for is freed
            x = up.slice1(x, temb)
            x = up.slice2(x, temb)
            x = up.volume(x, temb)
            x = up.resize(x)
        return x

    def join(self, *parts):
        """Tensors side by side along the channels (support/slabs.py joins them slab by slab instead)."""
        return torch.cat(parts, 1)
