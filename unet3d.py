"""The efficient 3D UNet of both stages: pure convolutions on the way down and up, all attention at the bottom.
Paper sec. 4.5. The layer graph is that of the released weights in their inference order, so those weights load into it.

    G = UNet3D(dim=160, heads=8)                                               # report -> 64^3, 716 M parameters
    H = UNet3D(dim=56, in_channels=8, heads=4, rounds=1, context_dim=0)        # 64^3 -> 256^3, 54 M parameters

Tensors are (B,C,D,H,W) kept in channels-last memory, where a (1,3,3) convolution is a 2D convolution over slices
and a 1x1x1 convolution is a matrix product, both without copying.
"""
import math
import re
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

GROUPS = 8      # of every GroupNorm
HEAD_DIM = 32   # of every attention head


def by_slice(conv2d, x):
    """Run a 2D convolution over every slice.   (B,C,D,H,W) -> (B,C',D,H',W'); both reshapes are views in channels-last"""
    return conv2d(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class SliceConv(nn.Conv2d):
    """Kernel (1,k,k).   (B,C,D,H,W) -> (B,C',D,H',W')"""

    def forward(self, x):
        return by_slice(super().forward, x)


class SliceUp(nn.ConvTranspose2d):
    """Kernel (1,4,4), stride (1,2,2), transposed.   (B,C,D,H,W) -> (B,C',D,2H,2W)"""

    def forward(self, x):
        return by_slice(super().forward, x)


class Pointwise(nn.Linear):
    """Kernel (1,1,1).   (B,C,D,H,W) -> (B,C',D,H,W)"""

    def forward(self, x):
        x = x.movedim(1, -1)                                             # rows of a matrix: torch then adds the bias in the product
        return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1]).movedim(-1, 1)


class Stem(nn.Conv3d):
    """Kernel (k,k,k) on few channels.   (B,C,D,H,W) -> (B,C',D,H,W)

    A GPU multiplies matrices of many channels: there it is a 2D convolution over slices that hold their k neighbours along D as channels,
    on an H200 2.4 (H) and 4.5 (G) times faster.
    """

    def forward(self, x):
        return self.as_2d(x) if x.is_cuda else super().forward(x)

    def as_2d(self, x):
        k, D = self.kernel_size[0], x.shape[2]
        x = F.pad(x.movedim(1, -1), (0, 0) * 3 + (k // 2, k // 2))       # (B,D+k-1,H,W,C)
        x = torch.cat([x[:, i:i + D] for i in range(k)], -1).movedim(-1, 1)
        weight = self.weight.transpose(1, 2).flatten(1, 2)               # (C',kC,k,k)
        return by_slice(partial(F.conv2d, weight=weight, bias=self.bias, padding=k // 2), x)


def moments(x):
    """Mean and mean square of every channel.   (B,C,D,H,W) -> (2,B,C) float32; over slabs of equal size they simply average"""
    x = x.movedim(1, -1).flatten(1, 3).float()
    return torch.stack([x.mean(1), x.square().mean(1)])


def norm_as_affine(norm, moments, scale_shift=None):
    """A GroupNorm with these moments, then (1 + scale) and shift, as ONE gain and offset per sample and channel.   -> (B,C) each, float32"""
    mean, square = moments.unflatten(2, (GROUPS, -1)).mean(3)                # (B,groups) each
    spread = ((square - mean.square()).clamp(min=0) + norm.eps).rsqrt()      # rounding alone can make it negative
    mean, spread = (v.repeat_interleave(len(norm.weight) // GROUPS, 1) for v in (mean, spread))
    gain = norm.weight * spread
    offset = norm.bias - mean * gain
    if scale_shift is not None:
        scale, shift = scale_shift.float().chunk(2, dim=1)
        gain, offset = gain * (1 + scale), offset * (1 + scale) + shift
    return gain, offset


def affine_silu(x, gain, offset):
    """SiLU(x * gain + offset), in float32 between, in the dtype of x.   x: (B,C,D,H,W)   gain, offset: (B,C)"""
    gain, offset = (v[..., None, None, None] for v in (gain, offset))
    return F.silu(x.float() * gain + offset).to(x.dtype)


def norm_scale_silu(x, norm, scale_shift=None):
    """SiLU(GroupNorm(x) * (1 + scale) + shift).   x: (B,C,D,H,W)   scale_shift: (B,2C) from the time, or None

    In the dtype of x with statistics in float32: autocast would lift the whole tensor to float32 for nothing.
    On CUDA the native norm runs one thread block per group, 8 on a chip that holds hundreds; means over all voxels, compiled, use it all.
    On a CPU the native norm is the faster one; at batch 1 its affine part absorbs scale and shift.
    """
    with torch.autocast(x.device.type, enabled=False):
        return split_norm(x, norm, scale_shift) if x.is_cuda else native_norm(x, norm, scale_shift)


def split_norm(x, norm, scale_shift):
    return affine_silu(x, *norm_as_affine(norm, moments(x), scale_shift))


def native_norm(x, norm, scale_shift):
    dtype = x.dtype
    if x.requires_grad:
        x = x.float()                                                    # bf16 backward of the norm is 5x slower on a CPU
    weight, bias = norm.weight, norm.bias
    if scale_shift is not None:
        scale, shift = scale_shift.float().chunk(2, dim=1)              # (B,C) each
        weight, bias = weight * (1 + scale), bias * (1 + scale) + shift
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if weight.dim() == 1:
        x = F.group_norm(x, GROUPS, weight, bias, norm.eps)
    elif len(x) == 1:
        x = F.group_norm(x, GROUPS, weight[0], bias[0], norm.eps)
    else:
        x = torch.addcmul(bias[..., None, None, None], F.group_norm(x, GROUPS, eps=norm.eps), weight[..., None, None, None])
    return F.silu(x, inplace=not x.requires_grad).to(dtype)              # x is the norm's own: nobody else sees it


class Block(nn.Module):
    """conv -> norm -> time scale and shift -> SiLU -> conv -> norm -> SiLU, plus the input.   (B,cin,D,H,W) -> (B,cout,D,H,W)

    volume: kernels (3,3,3) instead of (1,3,3).   time_dim: width of the time embedding, 0 for a Block without time.
    """

    def __init__(self, cin, cout, time_dim, volume=False):
        super().__init__()
        conv = nn.Conv3d if volume else SliceConv
        self.time = nn.Linear(time_dim, 2 * cout) if time_dim else None
        self.conv1, self.norm1 = conv(cin, cout, 3, padding=1), nn.GroupNorm(GROUPS, cout)
        self.conv2, self.norm2 = conv(cout, cout, 3, padding=1), nn.GroupNorm(GROUPS, cout)
        self.skip = Pointwise(cin, cout) if cin != cout else nn.Identity()

    def forward(self, x, temb):
        scale_shift = self.time(F.silu(temb)) if self.time else None     # (B, 2 cout)
        h = norm_scale_silu(self.conv1(x), self.norm1, scale_shift)
        h = self.conv2(h)                                                # in two lines: its input is freed before the norm
        h = norm_scale_silu(h, self.norm2)
        h += self.skip(x)
        return h

    def in_slabs(self, parts, temb, size):
        """forward(cat(parts), temb) for inference, holding one tensor of the output's size beside the parts: everything else is
        made `size` slices at a time. The norms' statistics are those of the whole volume, so this is no approximation."""
        scale_shift = self.time(F.silu(temb)) if self.time else None
        h, found = conv_in_slabs(self.conv1, parts, size)
        gain, offset = norm_as_affine(self.norm1, found, scale_shift)
        for d in range(0, h.shape[2], size):
            h[:, :, d:d + size] = affine_silu(h[:, :, d:d + size], gain, offset)
        h, found = conv_in_slabs(self.conv2, [h], size, out=h)
        gain, offset = norm_as_affine(self.norm2, found)
        for d in range(0, h.shape[2], size):
            h[:, :, d:d + size] = affine_silu(h[:, :, d:d + size], gain, offset) + self.skip(torch.cat([p[:, :, d:d + size] for p in parts], 1))
        return h


def conv_in_slabs(conv, parts, size, out=None):
    """conv(cat(parts)) and its moments, `size` slices of D at a time.   out: parts[0], to be overwritten   -> (B,C',D,H,W), (2,B,C')"""
    D, halo, total = parts[0].shape[2], conv.padding[0] if isinstance(conv, nn.Conv3d) else 0, 0
    before = parts[0][:, :, :0]                                          # input slices that `out` has overwritten, but the next slab still sees
    for a in range(0, D, size):
        b = min(a + size, D)
        x = torch.cat([p[:, :, a:b + halo] for p in parts], 1)
        x = torch.cat([before, x], 2) if a else x
        seen = min(halo, a)                                              # slices of x before a
        before = x[:, :, max(seen + b - a - halo, 0):seen + b - a].clone()
        y = conv(x)[:, :, seen:seen + b - a]
        if out is None:
            out = torch.empty(y.shape[0], y.shape[1], D, *y.shape[3:], dtype=y.dtype, device=y.device, memory_format=torch.channels_last_3d)
        out[:, :, a:b] = y
        total = total + moments(y) * ((b - a) / D)
    return out, total


class ChannelNorm(nn.Module):
    """LayerNorm over the last axis with a gain and no bias.   (...,C) -> (...,C)"""

    def __init__(self, dim):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.layer_norm(x, self.gain.shape, self.gain, eps=1e-5)


def attention(q, k, v):
    """softmax(q k^T / sqrt(32)) v, without ever holding the product.   q: (B,heads,L,32)   k, v: (B,heads,N,32)"""
    if not q.requires_grad or q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast(q.device.type, enabled=False):                   # its bf16 backward is 4x slower on a CPU
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)


class Attention(nn.Module):
    """Softmax attention, heads x 32.   x: (B,L,C), context: (B,N,context_dim) or None for self-attention -> (B,L,C)"""

    def __init__(self, dim, heads, context_dim=0):
        super().__init__()
        self.heads, inner = heads, heads * HEAD_DIM
        self.q = nn.Linear(dim, inner, bias=False)
        self.kv = nn.Linear(context_dim or dim, 2 * inner, bias=False)
        self.out = nn.Linear(inner, dim, bias=context_dim > 0)

    def forward(self, x, context=None):
        q, (k, v) = self.q(x), self.kv(x if context is None else context).chunk(2, dim=-1)
        q, k, v = (z.unflatten(-1, (self.heads, HEAD_DIM)).transpose(1, 2) for z in (q, k, v))   # (B,heads,L,32)
        return self.out(attention(q, k, v).transpose(1, 2).flatten(2))


class TextPool(nn.Module):
    """Learned queries attend to the text, and a small network reads what they find.   (B,N,context_dim) -> (B,out)   Not in the paper."""

    def __init__(self, context_dim, out, queries=16):
        super().__init__()
        self.q, self.kv = nn.Parameter(torch.randn(1, 1, queries, HEAD_DIM)), nn.Linear(context_dim, 2 * HEAD_DIM, bias=False)
        self.read = nn.Sequential(nn.Linear(queries * HEAD_DIM, 64), nn.SiLU(), nn.Linear(64, out))

    def forward(self, context):
        k, v = self.kv(context)[:, None].chunk(2, dim=-1)                # (B,1,N,32) each: one head
        return self.read(attention(self.q.expand(len(context), -1, -1, -1), k, v).flatten(1))


class Round(nn.Module):
    """One round of the bottom: self-attention [-> cross-attention to the text], both residual; then the volume Block, which UNet3D runs.

    The self-attention's projections are passed in: all rounds share one set, each has its own norm.
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
        if context is not None:
            tokens = x.reshape(B, D * H * W, C)
            x = (tokens + self.cross(self.cross_norm(tokens), context)).reshape(x.shape)
        return x.movedim(-1, 1)


class Down(nn.Module):
    """slice Block -> slice Block (the skip) -> halve H and W -> volume Block.   Depth is kept. Holds the layers; UNet3D.forward calls them."""

    def __init__(self, cin, cout, time_dim, last):
        super().__init__()
        self.slice1, self.slice2 = Block(cin, cout, time_dim), Block(cout, cout, time_dim)
        self.resize = nn.Identity() if last else SliceConv(cout, cout, 4, stride=2, padding=1)
        self.volume = Block(cout, cout, time_dim, volume=True)


class Up(nn.Module):
    """slice Block -> slice Block -> volume Block -> double H and W.   Holds the layers; UNet3D.forward calls them."""

    def __init__(self, cin, cout, time_dim, last):
        super().__init__()
        self.slice1, self.slice2 = Block(cin, cout, time_dim), Block(cout, cout, time_dim)
        self.volume = Block(cout, cout, time_dim, volume=True)
        self.resize = nn.Identity() if last else SliceUp(cout, cout, 4, stride=2, padding=1)


def sinusoidal(t, dim):
    """Sines and cosines of t at dim/2 frequencies from 1 to 1/10000.   t: (B,) -> (B,dim)"""
    freq = torch.exp(torch.arange(dim // 2, device=t.device) * (-math.log(10000) / (dim // 2 - 1)))
    return torch.cat([(t[:, None] * freq).sin(), (t[:, None] * freq).cos()], dim=1)


def to_depth(x, p):
    """Space to depth: each cube of p^3 voxels becomes one voxel of p^3 times the channels.   (B,C,D,H,W) -> (B,C p^3,D/p,H/p,W/p)"""
    B, C, D, H, W = x.shape
    return x.reshape(B, C, D // p, p, H // p, p, W // p, p).permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(B, C * p**3, D // p, H // p, W // p)


def to_space(x, p):
    """The inverse of to_depth.   (B,C p^3,D,H,W) -> (B,C,pD,pH,pW)"""
    B, C, D, H, W = x.shape
    return x.reshape(B, C // p**3, p, p, p, D, H, W).permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(B, C // p**3, p * D, p * H, p * W)


# What checkpointing "norms" keeps of a Block: the results of convolutions and matrix products. The rest is cheap to do again.
DEAR = [torch.ops.aten.convolution.default, torch.ops.aten.mm.default, torch.ops.aten.addmm.default]


class UNet3D(nn.Module):
    """The x_0 predictor of both stages (sec. 4.5).

    dim: width w of the first level; the levels are w, 2w, 4w, 8w (a multiple of 8).   levels: how many of them.
    in_channels: 4 for G; 8 for H, whose input is [low, xt].   heads: of 32 channels each.   rounds: at the bottom, 4 in G, 1 in H.
    context_dim, tokens: of the text (B,tokens,context_dim); context_dim 0 is a network without text.
    bottom: self-attention within a slice, "plane" (released weights), or along D, "depth" (the paper's words for H).
    pooled: the text, pooled, is also added to the time embedding, so that every Block knows it. Not in the paper.
    patch: 2 works on cubes of 2^3 voxels, for a seventh of the arithmetic. A pointwise layer squeezes a cube to `in_channels` numbers, so that all but
        the head costs what it does on one voxel; the head sees whole cubes, and is at least as wide as the cubes that it makes. Not in the paper.
    checkpointing: "none"; "norms" recomputes norms and activations in the backward pass; "blocks" recomputes whole Blocks.
    net.slab = n: inference holds few whole tensors of the full resolution and makes the rest n slices at a time, to the same result.
    Inputs: H and W are multiples of patch * 2^(levels - 1), D of patch; D is never halved.
    """

    def __init__(self, dim, in_channels=4, out_channels=4, heads=8, rounds=4, context_dim=768, tokens=192, levels=4,
                 bottom="plane", pooled=False, patch=1, checkpointing="none"):
        super().__init__()
        if dim % GROUPS or bottom not in ("plane", "depth"):
            raise ValueError(f"dim {dim}, bottom {bottom!r}; dim is a multiple of {GROUPS}, bottom plane or depth; change them")
        if checkpointing not in ("none", "norms", "blocks"):
            raise ValueError(f"checkpointing {checkpointing!r}; none, norms or blocks; choose one")
        self.args = dict(dim=dim, in_channels=in_channels, out_channels=out_channels, heads=heads, rounds=rounds,
                         context_dim=context_dim, tokens=tokens, levels=levels, bottom=bottom, pooled=pooled, patch=patch)
        self.dim, self.plane, self.patch, self.checkpointing, self.slab, self.compiled = dim, bottom == "plane", patch, checkpointing, 0, False
        w, T = [dim] + [dim * 2**i for i in range(levels)], 4 * dim
        self.null_text = nn.Parameter(torch.randn(1, tokens, context_dim)) if context_dim else None
        self.squeeze = Pointwise(in_channels * patch**3, in_channels) if patch > 1 else None
        self.stem = Stem(in_channels, dim, 7, padding=3)
        self.time = nn.Sequential(nn.Linear(dim, T), nn.GELU(), nn.Linear(T, T))
        if pooled:
            self.pool = TextPool(context_dim, T)
        self.downs = nn.ModuleList(Down(w[i], w[i + 1], T, i == levels - 1) for i in range(levels))
        self.first = Block(w[-1], w[-1], T)
        self.attend = Attention(w[-1], heads)
        self.rounds = nn.ModuleList(Round(w[-1], heads, context_dim, T) for _ in range(rounds))
        self.last = Block(w[-1], w[-1], T)
        self.ups = nn.ModuleList(Up(2 * w[i + 1], w[i], T, i == 0) for i in reversed(range(levels)))
        cube = patch**3 if patch > 1 else 0                              # voxels of a cube that the head sees beside the features
        wide = dim * max(1, math.ceil(out_channels * cube / dim))
        self.head = Block(2 * dim + in_channels * cube, wide, 0)
        self.out = Pointwise(wide, out_channels * patch**3)
        for p in self.parameters():                                      # by rank: Module.to cannot do both
            if p.dim() in (4, 5):
                p.data = p.data.contiguous(memory_format=(torch.channels_last, torch.channels_last_3d)[p.dim() - 4])

    def compile_blocks(self):
        """Compile every Block by itself: like Blocks share their code, so this takes a minute where the whole network would take many."""
        torch._dynamo.config.recompile_limit = 128                       # one version for each shape of Block; the default is 8
        torch._dynamo.config.accumulated_recompile_limit = 1024
        torch._dynamo.config.optimize_ddp = False                        # would cut Blocks in two at the borders of DDP's buckets
        torch._functorch.config.ban_recompute_used_far_apart = False     # would keep float32 copies of what the norms see: twice the memory
        for module in self.modules():
            if isinstance(module, Block):
                module.compile(dynamic=False)
        self.compiled = True

    def run(self, module, *inputs):
        """The module's output, recomputed in the backward pass as `checkpointing` says."""
        norms = self.checkpointing == "norms"
        if not self.training or self.checkpointing == "none" or norms and (self.compiled or not isinstance(module, Block)):
            return module(*inputs)                                       # a compiled Block recomputes its norms unasked
        keep = {"context_fn": partial(create_selective_checkpoint_contexts, DEAR)} if norms else {}
        return checkpoint(module, *inputs, use_reentrant=False, **keep)

    def block(self, block, temb, x):
        """A Block on x, a tensor or, for slabs, a list of tensors to be concatenated."""
        if self.slab:
            return block.in_slabs(x if isinstance(x, list) else [x], temb, self.slab)
        return self.run(block, x, temb)

    def join(self, *parts):
        """Tensors side by side along the channels; with slabs they stay a list, joined slab by slab."""
        return list(parts) if self.slab else torch.cat([p.movedim(1, -1) for p in parts], dim=-1).movedim(-1, 1)    # as they lie in memory

    def forward(self, xt, t, context=None, drop=None):
        """xt: (B,in_channels,D,H,W)   t: (B,) in [0,1]   context: (B,N,context_dim), or None for the learned null text
        drop: (B,) bool, True where the null text replaces this sample's (training for guidance)   -> x0_hat (B,4,D,H,W)
        """
        if self.null_text is None:
            context = None                                               # H is given no text
        elif context is None:
            context = self.null_text.expand(len(xt), -1, -1)
        elif drop is not None:
            context = torch.where(drop[:, None, None], self.null_text, context)
        temb = self.time(sinusoidal(1000 * t, self.dim))                 # (B,4w)
        if self.args["pooled"]:
            temb = temb + self.pool(context)
        if torch.is_autocast_enabled(xt.device.type):
            xt = xt.to(torch.get_autocast_dtype(xt.device.type))         # as the stem would, but before the copy
        xt = to_depth(xt, self.patch).contiguous(memory_format=torch.channels_last_3d)
        seen = self.squeeze(xt) if self.patch > 1 else xt
        x = r = self.stem_of(seen)
        if self.slab:
            r = None                                                     # made again at the end rather than held
        skips = []
        for down in self.downs:
            x = self.block(down.slice1, temb, x)
            x = self.block(down.slice2, temb, x)
            skips.append(x)
            x = down.resize(x)                                           # (B,2w,D,H/2,W/2): depth is kept
            x = self.block(down.volume, temb, x)
        x = self.block(self.first, temb, x)
        for round in self.rounds:
            x = self.run(round, x, context, self.attend, self.plane)
            x = self.block(round.volume, temb, x)
        x = self.block(self.last, temb, x)
        for up in self.ups:
            x = self.join(x, skips.pop())                                # always the same name, so that what it stood for is freed
            x = self.block(up.slice1, temb, x)
            x = self.block(up.slice2, temb, x)
            x = up.resize(self.block(up.volume, temb, x))
        parts = [x, self.stem_of(seen) if r is None else r] + ([xt] if self.patch > 1 else [])
        x = self.join(*parts)
        del parts, r
        x = self.block(self.head, temb, x)
        x = self.out(x)
        return to_space(x, self.patch).float()

    def stem_of(self, xt):
        return conv_in_slabs(self.stem, [xt], self.slab)[0] if self.slab else self.stem(xt)


def folded(state, net):
    """The weights of a network with patch 1, rewritten for `net`, the same one with patch > 1, so that it first makes of a volume what the old one makes of
    the means over its cubes of patch^3 voxels. A network trained on a small grid goes on so on one twice as fine. Not in the paper.
    state: name -> tensor   -> the same
    """
    cube, copies, channels = net.patch**3, len(net.head.norm1.weight) // net.dim, net.stem.in_channels
    new = dict(state)
    new["squeeze.weight"] = torch.eye(channels).repeat_interleave(cube, 1) / cube
    new["squeeze.bias"] = torch.zeros(channels)
    for name in ("head.conv1", "head.skip", "head.conv2", "head.norm1", "head.norm2"):
        for part in ("weight", "bias"):
            new[f"{name}.{part}"] = state[f"{name}.{part}"].repeat_interleave(copies, 0)
    for name in ("head.conv1", "head.skip"):                             # the folded input is not heard yet
        w = new[f"{name}.weight"]
        new[f"{name}.weight"] = torch.cat([w, w.new_zeros(len(w), channels * cube, *w.shape[2:])], 1)
    new["out.weight"], new["out.bias"] = (state[f"out.{part}"].repeat_interleave(cube, 0) for part in ("weight", "bias"))
    for name in ("head.conv2.weight", "out.weight"):                     # their inputs are copies; random weights of sum 0 over them change no output, but let them part
        apart = net.get_parameter(name).detach().unflatten(1, (-1, copies))
        new[name] = new[name].repeat_interleave(copies, 1) / copies + (apart - apart.mean(2, keepdim=True)).flatten(1, 2)
    return new


# --- the released weights: their names, in order of substitution, and ours ---

RELEASED = [(r"init_conv0?\.", "stem."), (r"null_cond_emb", "null_text"), (r"time_mlp\.1", "time.0"), (r"time_mlp\.3", "time.2"),
            (r"final_conv0?\.0", "head"), (r"final_conv0?\.1", "out"), (r"mid_block1\.", "first."), (r"mid_block2\.", "last."),
            (r"mid_spatial_attn(\d?)\.fn\.norm\.gamma", r"rounds.\1.self_norm.gain"),
            (r"mid_spatial_attn\d?\.fn\.fn\.fn\.to_", "attend."),
            (r"mid_cross_attn(\d)\.fn\.norm\.gamma", r"rounds.\1.cross_norm.gain"), (r"mid_cross_attn(\d)\.fn\.fn\.to_", r"rounds.\1.cross."),
            (r"mid_temporal_(?:attn|conv)(\d?)\.", r"rounds.\1.volume."),
            (r"((?:down|up)s\.\d)\.0\.", r"\1.slice1."), (r"((?:down|up)s\.\d)\.1\.", r"\1.slice2."),
            (r"((?:down|up)s\.\d)\.[24]\.", r"\1.volume."), (r"((?:down|up)s\.\d)\.[35]\.", r"\1.resize."),
            (r"\.mlp\.1\.", ".time."), (r"\.block([12])\.proj\.", r".conv\1."), (r"\.block([12])\.norm\.", r".norm\1."),
            (r"\.res_conv\.", ".skip.")]


def rename(key):
    """A released key -> ours. Rounds count from 1 there (or carry no number), from 0 here."""
    for pattern, ours in RELEASED:
        key = re.sub("^" + pattern if pattern[0].isalpha() else pattern, ours, key)
    return re.sub(r"^rounds\.(\d?)\.", lambda m: f"rounds.{int(m[1] or 1) - 1}.", key)


def from_released(state, **options):
    """A state dict of the authors' networks -> UNet3D with those weights, its arguments read off the shapes.

    state: name -> tensor, with or without the prefix `denoise_fn.`; the diffusion schedule's own buffers are ignored.
    options: bottom, checkpointing.   ValueError names every key that is missing, left over or of another shape.
    """
    if any(k.startswith("denoise_fn.") for k in state):
        state = {k.removeprefix("denoise_fn."): v for k, v in state.items() if k.startswith("denoise_fn.")}
    new, shared = {}, {}
    for key, value in state.items():
        name = rename(key)
        if name.startswith("attend."):                                   # stored once per round: they must agree
            if not torch.equal(shared.setdefault(name, value), value):
                raise ValueError(f"{key}: differs from the other rounds; all share one self-attention; use whole released weights")
        if name.endswith("attend.qkv.weight"):
            q, k, v = value.chunk(3)
            new["attend.q.weight"], new["attend.kv.weight"] = q, torch.cat([k, v])
        else:
            new[name] = value
    missing = [k for k in ("stem.weight", "out.weight", "attend.q.weight") if k not in new]
    if missing:
        raise ValueError(f"weights without {', '.join(missing)}; these are not a MedSyn network's; name the authors' checkpoint")
    cross = new.get("rounds.0.cross.kv.weight")
    net = UNet3D(dim=len(new["stem.weight"]), in_channels=new["stem.weight"].shape[1], out_channels=len(new["out.weight"]),
                 heads=len(new["attend.q.weight"]) // HEAD_DIM, rounds=len({k.split(".")[1] for k in new if k.startswith("rounds.")}),
                 context_dim=0 if cross is None else cross.shape[1], tokens=new["null_text"].shape[1] if "null_text" in new else 192,
                 levels=len({k.split(".")[1] for k in new if k.startswith("downs.")}), **options)
    ours = net.state_dict()
    wrong = [f"missing {k}" for k in ours.keys() - new.keys()] + [f"left over {k}" for k in new.keys() - ours.keys()]
    wrong += [f"{k} {tuple(new[k].shape)} for {tuple(ours[k].shape)}" for k in ours.keys() & new.keys()
              if new[k].numel() != ours[k].numel()]
    if wrong:
        raise ValueError(f"released weights: {'; '.join(sorted(wrong))}; every layer must be there once; use an unmodified checkpoint")
    net.load_state_dict({k: v.reshape(ours[k].shape) for k, v in new.items()})      # (o,i,1,3,3) -> (o,i,3,3) and the like
    return net
