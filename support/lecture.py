"""Plumbing of the lecture: a figure below the code that it shows; what a network costs, counted, beside the usual one.
"""
import inspect
import io
import re
from ast import parse
from collections import Counter
from itertools import zip_longest

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from support.fast import SliceConv, SliceUp, attention

# --- figures ---


def code(f):
    """A function's lines without its docstring."""
    source = re.sub(r" {2,}#", "  #", inspect.getsource(f))
    first, lines = parse(source).body[0].body[0], source.rstrip().split("\n")
    return lines[:first.lineno - 1] + lines[first.end_lineno:] if inspect.getdoc(f) else lines


def render(title, draw, shown):
    """A figure: its title, the code of the functions `shown`, what `draw` makes of the figure that it gets, the caption
    that it returns.   -> PNG of few colours"""
    from matplotlib.figure import Figure  # without pyplot: no window, no backend
    from PIL import Image
    rows = list(zip_longest(*map(code, shown), fillvalue=""))
    widths = [max(map(len, column)) + 4 for column in zip(*rows)]
    heights = 0.55 + 0.15 * len(rows), 5.2, 0.45                         # inches
    fig = Figure(figsize=(11, sum(heights)), layout="constrained")
    top, body, bottom = fig.subfigures(3, 1, height_ratios=heights)
    top.set_facecolor("whitesmoke")
    listing = "\n".join("".join(f"{line:{width}}" for line, width in zip(row, widths)) for row in rows)
    top.text(0.01, 1 - 0.1 / heights[0], title, fontsize=14, va="top")
    top.text(0.01, 0.1 / heights[0], listing, family="monospace", fontsize=8, va="bottom", parse_math=False)
    bottom.text(0.01, 0.5, draw(body), fontsize=9, va="center", parse_math=False)
    png, small = io.BytesIO(), io.BytesIO()
    fig.savefig(png, dpi=100)
    Image.open(png).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def show(ax, x, title="", axis=1, at=0.45, outline=None, **options):
    """A plane across an axis of a volume (D,H,W), at a share of its length: superior or anterior up, the patient's left
    on the right."""
    x, mask = (None if v is None else np.take(np.asarray(v), int(at * len(v)), axis)[::-1] for v in (x, outline))
    image = ax.imshow(x, **dict(cmap="gray", vmin=-1, vmax=1, interpolation="nearest") | options)
    if mask is not None and mask.min() < 0 < mask.max():
        ax.contour(mask, [0], colors="cyan", linewidths=1)
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=10)
    return image


def spectrum(x, fov):
    """Power by frequency, where white noise of variance 1 has 1.   x: (G,G,G)   fov: mm along each axis
    -> f, cycles/mm, up to what G voxels hold; power at these; share(f) of the variance below a frequency"""
    g = len(x)
    power = torch.fft.fftn(x - x.mean(), norm="ortho").abs().square().numpy()
    away = np.sqrt(sum(v ** 2 for v in np.meshgrid(*(np.fft.fftfreq(g, mm / g) for mm in fov), indexing="ij")))
    f = np.arange(1, g // 2 + 1) / max(fov)
    mean = np.array([power[abs(away - v) <= 0.5 / max(fov)].mean() for v in f])
    return f, mean, lambda limit: power[away < limit].sum() / power.sum()


# --- cost ---

def count(build, *shapes):
    """A training step's forward pass on meta tensors: nothing is computed, no memory is taken.

    build: () -> the network   shapes: of its inputs
    -> {"parameters", "flops", "kept"}: each a Counter over names of modules, of what a module does itself, not those in
    it. flops: 2 for a multiplication and an addition, of convolutions and matrix products. kept: numbers that stay in
    memory for the backward pass, each counted once, where it is first kept; parameters are not among them
    """
    with FakeTensorMode():                               # of meta tensors that say they lie on the CPU
        return watched(build(), [torch.zeros(shape) for shape in shapes])


def watched(net, inputs):
    """`count` of a network that is there."""
    found, running = dict(parameters=Counter(), flops=Counter(), kept=Counter()), [""]
    for name, p in net.named_parameters():               # a shared module has one name
        found["parameters"][name.rpartition(".")[0]] += p.numel()
    seen = {p.untyped_storage()._cdata: p for p in net.parameters()}

    class Arithmetic(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            out, op = op(*args, **kwargs), op._overloadpacket
            if op is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:    # torch lists the GPU's alone
                found["flops"][running[-1]] += sdpa_flop_count(*(x.shape for x in args[:3]))
            elif op in flop_registry:
                found["flops"][running[-1]] += flop_registry[op](*args, **kwargs, out_val=out)
            return out

    def keep(x):
        if x.untyped_storage()._cdata not in seen:
            found["kept"][running[-1]] += x.untyped_storage().nbytes() // x.element_size()
        seen[x.untyped_storage()._cdata] = x             # held, so that no other tensor comes to lie there
        return x

    hooks = []
    for name, module in net.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda module, args, name=name: running.append(name)))
        hooks.append(module.register_forward_hook(lambda module, args, out: running.pop() and None))
    with Arithmetic(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        net(*inputs)
    for hook in hooks:
        hook.remove()
    return found


def by_level(counts, levels=4):
    """Sums over the modules of a level: 1, the finest, to `levels`; the bottom; the ends, before and after all.
    -> Counter"""
    total = Counter()
    for name, n in counts.items():
        part, i = (name.split(".") + [""])[:2]
        at = {"downs": lambda i: f"level {int(i) + 1}", "ups": lambda i: f"level {levels - int(i)}"}
        bottom = part in ("first", "attend", "rounds", "last")
        total[at[part](i) if part in at else "bottom" if bottom else "ends"] += n
    return total


def bars(fig, counts):
    """What the first and the last network of `counts` cost, level by level, and a table of all.   counts: {name: what
    `count` found}   -> share of the first one's parameters that lies at the deepest level and the bottom"""
    kinds = dict(parameters=("parameters, M", 1e6), flops=("TFLOP, forward", 1e12), kept=("kept, GB in bfloat16", 5e8))
    names, parts = list(counts), ("ends", "level 1", "level 2", "level 3", "level 4", "bottom")
    top, below = fig.subfigures(2, 1, height_ratios=[3, 2])
    for ax, (kind, (title, unit)) in zip(top.subplots(1, 3), kinds.items()):
        for name, aside in ((names[0], -0.2), (names[-1], 0.2)):
            sums = by_level(counts[name][kind])
            ax.bar(np.arange(6) + aside, [sums[part] / unit for part in parts], 0.4, label=name)
        ax.set_xticks(range(6), parts, rotation=40, ha="right")
        ax.set_title(title)
    ax.legend(fontsize=8)
    ax = below.subplots()
    ax.set_axis_off()
    rows = [[f"{sum(c[kind].values()) / unit:,.1f}" for kind, (_, unit) in kinds.items()] for c in counts.values()]
    table = ax.table(rows, rowLabels=names, colLabels=[title for title, _ in kinds.values()], bbox=(0.3, 0, 0.65, 1))
    table.auto_set_font_size(False)
    table.set_fontsize(10)
    first = by_level(counts[names[0]]["parameters"])
    return (first["level 4"] + first["bottom"]) / sum(first.values())


# --- the usual UNet ---

class Attentive(nn.Module):
    """A Block, then self-attention among all voxels of the volume, residual, heads of 32 channels."""

    def __init__(self, block, dim, heads=8):
        super().__init__()
        self.block, self.heads, self.norm = block, heads, nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * 32 * heads, bias=False), nn.Linear(32 * heads, dim, bias=False)

    def forward(self, x, temb):
        x = self.block(x, temb)
        tokens = self.norm(x.flatten(2).transpose(1, 2))                 # (B,DHW,C)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, 32)).permute(2, 0, 3, 1, 4)
        return x + self.out(attention(q, k, v).transpose(1, 2).flatten(2)).transpose(1, 2).reshape(x.shape)


def usual(net, halve=False, attend=False):
    """A UNet3D made usual, step by step: all its kernels (1,3,3) become (3,3,3); halve: D is halved with H and W;
    attend: the volume Block of each level, on the way down and up, is followed by self-attention among all voxels."""
    for module in list(net.modules()):
        for name, old in list(module.named_children()):
            if isinstance(old, SliceConv | SliceUp) and (halve or old.stride == (1, 1)):
                kind = nn.ConvTranspose3d if isinstance(old, SliceUp) else nn.Conv3d
                setattr(module, name, kind(old.in_channels, old.out_channels, old.kernel_size[0], old.stride[0], 1))
    for level in [*net.downs, *net.ups] if attend else []:
        level.volume = Attentive(level.volume, level.volume.conv1.out_channels)
    return net
