"""The efficient 3D UNet of both stages: pure convolutions on the way down and up, all attention at the bottom.
Paper sec. 4.5. The layer graph is that of the released weights in their inference order, so those weights load into it.

    G = UNet3D(dim=160, heads=8)                                               # report -> 64^3, 716 M parameters
    H = UNet3D(dim=56, in_channels=8, heads=4, rounds=1, context_dim=0)        # 64^3 -> 256^3, 54 M parameters

Tensors are (B,C,D,H,W) kept in channels-last memory, where a (1,3,3) convolution is a 2D convolution over slices
and a 1x1x1 convolution is a matrix product, both without copying.
"""
import math
import re

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

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
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def norm_scale_silu(x, norm, scale_shift=None):
    """SiLU(GroupNorm(x) * (1 + scale) + shift).   x: (B,C,D,H,W)   scale_shift: (B,2C) from the time, or None

    In the dtype of x with statistics in float32: autocast would lift the whole tensor to float32 for nothing.
    Per sample and channel, norm, scale and shift are ONE affine map, so the affine part of the norm absorbs them at batch 1.
    """
    dtype = x.dtype
    with torch.autocast(x.device.type, enabled=False):
        if x.requires_grad and not x.is_cuda:
            x = x.float()                                                # bf16 backward of the norm is 5x slower on a CPU
        weight, bias = norm.weight, norm.bias
        if scale_shift is not None:
            scale, shift = scale_shift.float().chunk(2, dim=1)          # (B,C) each
            weight, bias = weight * (1 + scale), bias * (1 + scale) + shift
        if weight.dim() == 1:
            x = F.group_norm(x, GROUPS, weight.to(x.dtype), bias.to(x.dtype), norm.eps)
        elif len(x) == 1:
            x = F.group_norm(x, GROUPS, weight[0].to(x.dtype), bias[0].to(x.dtype), norm.eps)
        else:
            x = F.group_norm(x, GROUPS, eps=norm.eps)
            x = torch.addcmul(bias.to(x.dtype)[..., None, None, None], x, weight.to(x.dtype)[..., None, None, None])
        return F.silu(x).to(dtype)


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
        h = norm_scale_silu(self.conv2(h), self.norm2)
        return h + self.skip(x)


class ChannelNorm(nn.Module):
    """LayerNorm over the last axis with a gain and no bias.   (...,C) -> (...,C)"""

    def __init__(self, dim):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.layer_norm(x, self.gain.shape, self.gain, eps=1e-5)


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
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Round(nn.Module):
    """One round of the bottom: [self-attention -> cross-attention to the text ->] volume Block; the attentions are residual.

    The self-attention's projections are passed in: all rounds share one set, each has its own norm.
    """

    def __init__(self, dim, heads, context_dim, time_dim):
        super().__init__()
        self.self_norm = ChannelNorm(dim)
        if context_dim:
            self.cross_norm, self.cross = ChannelNorm(dim), Attention(dim, heads, context_dim)
        self.volume = Block(dim, dim, time_dim, volume=True)

    def forward(self, x, temb, context, attend, plane):
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
        return self.volume(x.movedim(-1, 1), temb)


class Down(nn.Module):
    """slice Block -> slice Block (the skip) -> halve H and W -> volume Block.   Depth is kept."""

    def __init__(self, cin, cout, time_dim, last):
        super().__init__()
        self.slice1, self.slice2 = Block(cin, cout, time_dim), Block(cout, cout, time_dim)
        self.resize = nn.Identity() if last else SliceConv(cout, cout, 4, stride=2, padding=1)
        self.volume = Block(cout, cout, time_dim, volume=True)


class Up(nn.Module):
    """slice Block -> slice Block -> volume Block -> double H and W."""

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

    dim: width w of the first level; the levels are w, 2w, 4w, 8w (a multiple of 8).   levels: how many of them.
    in_channels: 4 for G; 8 for H, whose input is [low, xt].   heads: of 32 channels each.   rounds: at the bottom, 4 in G, 1 in H.
    context_dim, tokens: of the text (B,tokens,context_dim); context_dim 0 is a network without text.
    bottom: self-attention within a slice, "plane" (released weights), or along D, "depth" (the paper's words for H).
    checkpointing: recompute every Block in the backward pass, for a sixth of the memory.
    """

    def __init__(self, dim, in_channels=4, out_channels=4, heads=8, rounds=4, context_dim=768, tokens=192, levels=4,
                 bottom="plane", checkpointing=False):
        super().__init__()
        if dim % GROUPS or bottom not in ("plane", "depth"):
            raise ValueError(f"dim {dim}, bottom {bottom!r}; dim is a multiple of {GROUPS}, bottom plane or depth; change them")
        self.args = dict(dim=dim, in_channels=in_channels, out_channels=out_channels, heads=heads, rounds=rounds,
                         context_dim=context_dim, tokens=tokens, levels=levels, bottom=bottom)
        self.dim, self.plane, self.checkpointing = dim, bottom == "plane", checkpointing
        w, T = [dim] + [dim * 2**i for i in range(levels)], 4 * dim
        self.null_text = nn.Parameter(torch.randn(1, tokens, context_dim)) if context_dim else None
        self.stem = nn.Conv3d(in_channels, dim, 7, padding=3)
        self.time = nn.Sequential(nn.Linear(dim, T), nn.GELU(), nn.Linear(T, T))
        self.downs = nn.ModuleList(Down(w[i], w[i + 1], T, i == levels - 1) for i in range(levels))
        self.first = Block(w[-1], w[-1], T)
        self.attend = Attention(w[-1], heads)
        self.rounds = nn.ModuleList(Round(w[-1], heads, context_dim, T) for _ in range(rounds))
        self.last = Block(w[-1], w[-1], T)
        self.ups = nn.ModuleList(Up(2 * w[i + 1], w[i], T, i == 0) for i in reversed(range(levels)))
        self.head = Block(2 * dim, dim, 0)
        self.out = Pointwise(dim, out_channels)
        for p in self.parameters():                                      # by rank: Module.to cannot do both
            if p.dim() in (4, 5):
                p.data = p.data.contiguous(memory_format=(torch.channels_last, torch.channels_last_3d)[p.dim() - 4])

    def run(self, module, *inputs):
        return checkpoint(module, *inputs, use_reentrant=False) if self.checkpointing and self.training else module(*inputs)

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
        x = r = self.stem(xt.contiguous(memory_format=torch.channels_last_3d))
        skips = []
        for down in self.downs:
            x = self.run(down.slice1, x, temb)
            x = self.run(down.slice2, x, temb)
            skips.append(x)
            x = self.run(down.volume, down.resize(x), temb)              # (B,2w,D,H/2,W/2): depth is kept
        x = self.run(self.first, x, temb)
        for round in self.rounds:
            x = self.run(round, x, temb, context, self.attend, self.plane)
        x = self.run(self.last, x, temb)
        for up in self.ups:
            x = self.run(up.slice1, torch.cat([x, skips.pop()], dim=1), temb)
            x = self.run(up.slice2, x, temb)
            x = up.resize(self.run(up.volume, x, temb))
        x = self.run(self.head, torch.cat([x, r], dim=1), temb)
        return self.out(x).float()


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
