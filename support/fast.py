"""The layers of the UNet written for speed, each beside its plain form; recomputation, and compilation of Blocks.

Tensors are (B,C,D,H,W) kept in channels-last memory, where a (1,3,3) convolution is a 2D convolution over slices and a
1x1x1 convolution is a matrix product, both without copying. benchmarks/reference.py is the same network by plain
layers.
"""
import os
import shutil
import sys
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

# What recomputing "norms" keeps of a Block: results of convolutions and matrix products. The rest is cheap to do again.
DEAR = [torch.ops.aten.convolution.default, torch.ops.aten.mm.default, torch.ops.aten.addmm.default]


# --- convolutions ---

def by_slice(conv2d, x):
    """A 2D convolution over every slice.   (B,C,D,H,W) -> (B,C',D,H',W'); both reshapes are views in channels-last"""
    return conv2d(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class SliceConv(nn.Conv2d):
    """Conv3d, kernel (1,k,k).   (B,C,D,H,W) -> (B,C',D,H',W')"""

    def forward(self, x):
        return by_slice(super().forward, x)


class SliceUp(nn.ConvTranspose2d):
    """ConvTranspose3d, kernel (1,4,4), stride (1,2,2).   (B,C,D,H,W) -> (B,C',D,2H,2W)"""

    def forward(self, x):
        return by_slice(super().forward, x)


class Pointwise(nn.Linear):
    """Conv3d, kernel (1,1,1).   (B,C,D,H,W) -> (B,C',D,H,W)"""

    def forward(self, x):
        x = x.movedim(1, -1)                             # rows of a matrix: torch then adds the bias in the product
        return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1]).movedim(-1, 1)


class Last(Pointwise):
    """Pointwise in float32, whatever autocast says: bfloat16 would round HU in steps of 3 to 6. Some slices at a time,
    for no copy of a whole volume.   (B,C,D,H,W) -> (B,C',D,H,W) float32"""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            parts = (super(Last, self).forward(part.to(self.weight.dtype)) for part in x.split(16, dim=2))
            return torch.cat(list(parts), dim=2)


class VolumeConv(nn.Conv3d):
    """Conv3d, kernel (3,3,3), padding 1.   (B,C,D,H,W) -> (B,C',D,H,W)

    For one sample of few values, C x D x H up to 20,480, in float32 on a CPU torch would choose a convolution of its
    own, which takes 4 to 18 times as long as oneDNN's at the sizes of the demonstration's stage 1: while sampling,
    oneDNN's is called by name.
    """

    def forward(self, x):
        few = len(x) == 1 and x[0, :, :, :, 0].numel() <= 20480 and x.device.type == "cpu" and x.dtype == torch.float32
        plain = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
        if not few or plain or type(x) is not torch.Tensor or not torch.backends.mkldnn.is_available():
            return super().forward(x)
        one = (1, 1, 1)
        return torch.mkldnn_convolution(x, self.weight, self.bias, self.padding, one, one, 1)


class Stem(nn.Conv3d):
    """Conv3d, kernel (k,k,k), on few channels.   (B,C,D,H,W) -> (B,C',D,H,W)

    A GPU multiplies matrices of many channels: there it is a 2D convolution over slices that hold their k neighbours
    along D as channels, on an H200 2.4 (H) and 4.5 (G) times faster.
    """

    def forward(self, x):
        return self.as_2d(x) if x.is_cuda else super().forward(x)

    def as_2d(self, x):
        k, D = self.kernel_size[0], x.shape[2]
        x = F.pad(x.movedim(1, -1), (0, 0) * 3 + (k // 2, k // 2))       # (B,D+k-1,H,W,C)
        x = torch.cat([x[:, i:i + D] for i in range(k)], -1).movedim(-1, 1)
        weight = self.weight.transpose(1, 2).flatten(1, 2)               # (C',kC,k,k)
        return by_slice(partial(F.conv2d, weight=weight, bias=self.bias, padding=k // 2), x)


def lay_out(x):
    """x in channels-last memory, and in autocast's dtype where that is on, as the first convolution would cast it."""
    cast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if cast else x.dtype
    return x.to(dtype, memory_format=torch.channels_last_3d)


def lay_out_weights(net):
    """Kernels in channels-last memory, by rank: Module.to cannot do both 2D and 3D."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for p in net.parameters():
        if p.dim() in formats:
            p.data = p.data.contiguous(memory_format=formats[p.dim()])


# --- norms ---

def moments(x):
    """Mean and mean square of every channel.   (B,C,D,H,W) -> (2,B,C) float32; over slabs of equal size they average"""
    x = x.movedim(1, -1).flatten(1, 3).float()
    return torch.stack([x.mean(1), x.square().mean(1)])


def norm_as_affine(norm, moments, scale_shift=None):
    """A GroupNorm with these moments, then (1 + scale) and shift, as ONE gain and offset per sample and channel.
    -> (B,C) each, float32"""
    mean, square = moments.unflatten(2, (norm.num_groups, -1)).mean(3)       # (B,groups) each
    spread = ((square - mean.square()).clamp(min=0) + norm.eps).rsqrt()      # rounding alone can make it negative
    mean, spread = (v.repeat_interleave(len(norm.weight) // norm.num_groups, 1) for v in (mean, spread))
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
    On CUDA the native norm runs one thread block per group, 8 on a chip that holds hundreds; means over all voxels,
    compiled, use it all. On a CPU the native norm is the faster one; at batch 1 its affine part absorbs scale and
    shift.
    """
    with torch.autocast(x.device.type, enabled=False):
        return split_norm(x, norm, scale_shift) if x.is_cuda else native_norm(x, norm, scale_shift)


def split_norm(x, norm, scale_shift):
    return affine_silu(x, *norm_as_affine(norm, moments(x), scale_shift))


def native_norm(x, norm, scale_shift):
    dtype = x.dtype
    if x.requires_grad:
        x = x.float()                                                    # bf16 backward is 5x slower on a CPU
    weight, bias = norm.weight, norm.bias
    if scale_shift is not None:
        scale, shift = scale_shift.float().chunk(2, dim=1)               # (B,C) each
        weight, bias = weight * (1 + scale), bias * (1 + scale) + shift
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if weight.dim() == 1:
        x = F.group_norm(x, norm.num_groups, weight, bias, norm.eps)
    elif len(x) == 1:
        x = F.group_norm(x, norm.num_groups, weight[0], bias[0], norm.eps)
    else:
        weight, bias = weight[..., None, None, None], bias[..., None, None, None]
        x = torch.addcmul(bias, F.group_norm(x, norm.num_groups, eps=norm.eps), weight)
    return F.silu(x, inplace=not x.requires_grad).to(dtype)              # x is the norm's own: nobody else sees it


# --- attention, guidance ---

def attention(q, k, v):
    """softmax(q k^T / sqrt(32)) v, without ever holding the product.   q: (B,heads,L,32)   k, v: (B,heads,N,32)"""
    if not q.requires_grad or q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast(q.device.type, enabled=False):                   # its bf16 backward is 4x slower on a CPU
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)


def with_and_without(net, xt, t, context):
    """net(xt, t, context), net(xt, t, None). At once where a GPU would idle otherwise; a CPU gains nothing by it."""
    if not xt.is_cuda:
        return net(xt, t, context), net(xt, t, None)
    null = torch.arange(2 * len(xt), device=xt.device) >= len(xt)
    return net(torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([context, context]), null).chunk(2)


# --- the number format ---

TIMED = {}          # shape of a Block's weight: whether bfloat16 was the quicker; one answer a process


@torch.no_grad()
def quicker_in_bfloat16(block):
    """Whether a Block works about as fast in bfloat16 on this CPU as in float32, or faster, which is as the maker and
    the width will have it: timed in turns on some thousand voxels, best of two, in about half a second. A tie, within
    the 15 % that a busy machine may add, goes to bfloat16, which takes less memory."""
    shape = tuple(block.conv1.weight.shape)
    if shape not in TIMED:
        width, edge, seconds = shape[1], 64 if shape[1] < 64 else 32, {True: [], False: []}
        slices = max(2, min(32, 10**7 // (width * edge)**2))             # a few thousand million multiplications
        x = torch.linspace(-1, 1, width * slices * edge**2).reshape(1, width, slices, edge, edge)
        temb = torch.zeros(1, block.time.in_features)
        for _ in range(3):
            for amp, taken in seconds.items():
                began = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                    block(lay_out(x), temb)
                taken.append(time.perf_counter() - began)
        TIMED[shape] = min(seconds[True][1:]) < 1.15 * min(seconds[False][1:])
    return TIMED[shape]


# --- recomputation and compilation: how a network's parts run, set from outside ---

def recompute(net, how, blocks, others=()):
    """Have parts of a network work again in the backward pass rather than hold what they made.

    how: "none"; "norms": of Blocks all but convolutions, little time, a third of the memory; "blocks": Blocks and
    others whole, a third more time, an eighth   blocks, others: their classes. Compiled Blocks recompute their norms
    unasked.
    """
    if how not in ("none", "norms", "blocks"):
        raise ValueError(f"--checkpointing {how}; none, norms or blocks; choose one")
    keep = {"context_fn": partial(create_selective_checkpoint_contexts, DEAR)} if how == "norms" else {}
    for module in net.modules():
        if how == "blocks" and isinstance(module, (blocks, *others)) or how == "norms" and isinstance(module, blocks):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False, **keep)


def compile_blocks(net, blocks):
    """Compile every Block by itself: like Blocks share their code, so this takes a minute where the whole network would
    take many.   blocks: their class   -> whether there is a compiler for it; without one the network works as it is"""
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), os.environ.get("CXX", "c++"), "gcc", "g++", "clang"))):
        print("warning: no C compiler (cc, gcc or clang) for --compile; works without; install one for the speed",
              file=sys.stderr)
        return False
    torch._dynamo.config.recompile_limit = 128                           # one version for each shape; the default is 8
    torch._dynamo.config.accumulated_recompile_limit = 1024
    torch._dynamo.config.optimize_ddp = False                         # would cut Blocks at the borders of DDP's buckets
    torch._functorch.config.ban_recompute_used_far_apart = False         # would hold what norms see in float32: twice
    for module in net.modules():
        if isinstance(module, blocks):
            module.forward = torch.compile(module.forward, dynamic=False)
    return True


def place(net, device, amp):
    """A network on its device, for inference; with amp its weights in bfloat16 once rather than at every step, which is
    what autocast would do."""
    net.to(device).eval()
    torch.backends.cudnn.benchmark = True                # one shape, many steps: the search for the fastest pays
    kept = {id(p) for module in net.modules() if isinstance(module, Last) for p in module.parameters()}
    for p in net.parameters() if amp else ():
        if p.dim() > 1 and id(p) not in kept:
            p.data = p.data.bfloat16()
