"""Networks that the paper does not have: the text pooled into the time embedding; work on cubes of voxels; and on these
networks that copy what they see."""
import math

import torch
from torch import nn

from diffusion import alpha_bar
from support.fast import Last, Pointwise, attention, lay_out, lay_out_weights
from support.weights import read_init
from unet3d import HEAD_DIM, Block, UNet3D

# Parts as the weights and checkpoints of these networks list them; the optimizer's state goes by this order.
PARTS = ("squeeze", "stem", "time", "pool", "downs", "first", "attend", "rounds", "last", "ups", "head", "out")


def form(args):
    """The class of network that arguments ask for."""
    return Sharp if args.get("sharp") else Extended


class TextPool(nn.Module):
    """Learned queries attend to the text, and a small network reads what they find.   (B,N,context_dim) -> (B,out)"""

    def __init__(self, context_dim, out, queries=16):
        super().__init__()
        self.q = nn.Parameter(torch.randn(1, 1, queries, HEAD_DIM))
        self.kv = nn.Linear(context_dim, 2 * HEAD_DIM, bias=False)
        self.read = nn.Sequential(nn.Linear(queries * HEAD_DIM, 64), nn.SiLU(), nn.Linear(64, out))

    def forward(self, context):
        k, v = self.kv(context)[:, None].chunk(2, dim=-1)                # (B,1,N,32) each: one head
        return self.read(attention(self.q.expand(len(context), -1, -1, -1), k, v).flatten(1))


def to_depth(x, p):
    """Space to depth: each cube of p^3 voxels becomes one voxel of p^3 times the channels.
    (B,C,D,H,W) -> (B,C p^3,D/p,H/p,W/p)"""
    B, C, D, H, W = x.shape
    x = x.reshape(B, C, D // p, p, H // p, p, W // p, p)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(B, C * p**3, D // p, H // p, W // p)


def to_space(x, p):
    """The inverse of to_depth.   (B,C p^3,D,H,W) -> (B,C,pD,pH,pW)"""
    B, C, D, H, W = x.shape
    x = x.reshape(B, C // p**3, p, p, p, D, H, W)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(B, C // p**3, p * D, p * H, p * W)


class Extended(UNet3D):
    """UNet3D, and

    pooled: the text, pooled, is also added to the time embedding, so that every Block knows it.
    patch: 2 works on cubes of 2^3 voxels, for a seventh of the arithmetic. A pointwise layer squeezes a cube to
        `in_channels` numbers, so that all but the head costs what it does on one voxel; the head sees whole cubes, and
        is at least as wide as the cubes that it makes.
    Inputs: H and W are multiples of patch * 2^(levels - 1), D of patch.
    """

    def __init__(self, dim, pooled=False, patch=1, **args):
        before = torch.get_rng_state()
        super().__init__(dim, **args)
        self.args |= dict(pooled=pooled, patch=patch)
        self.patch = patch
        if pooled:
            self.pool = TextPool(self.args["context_dim"], 4 * dim)
        if patch > 1:
            cin, cout, cube = self.args["in_channels"], self.args["out_channels"], patch**3
            wide = dim * max(1, math.ceil(cout * cube / dim))
            self.squeeze = Pointwise(cin * cube, cin)
            self.head = Block(2 * dim + cin * cube, wide, 0)
            self.out = Last(wide, cout * cube)
            lay_out_weights(self)
        if pooled or patch > 1:
            self._modules = {name: self._modules[name] for name in PARTS if name in self._modules}
            torch.set_rng_state(before)
            self.draw_weights()

    @torch.no_grad()
    def draw_weights(self):
        """The first weights, drawn in the order of PARTS, so that a seed means the same network in all versions."""
        if self.null_text is not None:
            self.null_text.normal_()
        for module in self.modules():
            if isinstance(module, TextPool):
                module.q.normal_()
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def embed(self, t, context):
        temb = super().embed(t, context)
        return temb + self.pool(context) if self.args["pooled"] else temb

    def forward(self, xt, t, context=None, drop=None):
        if self.patch == 1:
            return super().forward(xt, t, context, drop)
        context = self.text(context, drop, len(xt))
        temb = self.embed(t, context)
        xt = lay_out(to_depth(xt, self.patch))                           # (B,8C,D/2,H/2,W/2)
        stem = self.stem(self.squeeze(xt))
        x = self.join(self.body(stem, temb, context), stem, xt)
        del stem, xt
        x = self.head(x, temb)
        x = self.out(x)                                                  # one name: what it stood for is freed
        return to_space(x, self.patch)


class Sharp(Extended):
    """A network on cubes that copies what it sees where there is little noise. Beside its estimate F it predicts at
    every voxel how far from it x_0 may be, s, and averages F and xt by their inverse variances, the Wiener estimate of
    data N(F, s^2):

        x0_hat = (1 - w) F + w xt / sqrt(abar) + sqrt(w (1 - abar) / abar) D
        w = abar s^2 / (abar s^2 + 1 - abar) = sigmoid(2 log s + log(abar / (1 - abar)))

    The root is the error that the average has. It is the preconditioning of Karras et al. 2022 (arXiv 2206.00364) for
    x_0 under our schedule, with F in place of the data's mean, and s at every voxel: edges and bones are copied where
    smooth tissue is not, whose noise would come with it. The head knows the time. D, of a Block of `fine` channels on
    voxels that sees [xt, F, log s, features], mends the average.

    sharp: always True; among the arguments in a file of weights it tells this form from Extended   fine: width of that
    Block, 0 for none   std: s of each channel to begin with, `statistics`
    """

    def __init__(self, dim, sharp=True, fine=0, std=(0.2,) * 4, **args):
        super().__init__(dim, **args)
        cin, cout, cube, wide = self.args["in_channels"], self.args["out_channels"], self.patch**3, self.out.in_features
        self.args |= dict(sharp=sharp, fine=fine)
        self.register_buffer("std", torch.tensor(std))                   # weights carry it along
        self.head = Block(2 * dim + cin * cube, wide, 4 * dim)
        self.out = Last(wide, (2 * cout + fine) * cube)
        if fine:
            self.fine = Block(cin + 2 * cout + fine, fine, 4 * dim, volume=True)
            self.detail = Last(fine, cout)
        lay_out_weights(self)

    def forward(self, xt, t, context=None, drop=None):
        context, n = self.text(context, drop, len(xt)), self.args["out_channels"]
        temb = self.embed(t, context)
        cubes = lay_out(to_depth(xt, self.patch))                        # (B,8C,D/2,H/2,W/2)
        stem = self.stem(self.squeeze(cubes))
        x = self.join(self.body(stem, temb, context), stem, cubes)
        del stem, cubes
        x = self.head(x, temb)
        x = to_space(self.out(x), self.patch)                            # (B,4+4+fine,D,H,W)
        F, D = x[:, :n], None
        if self.args["fine"]:
            x = lay_out(x)
            D = self.detail(self.fine(self.join(lay_out(xt), x), temb))
        return self.average(xt[:, -n:], t, F, x[:, n:2 * n], D)

    def average(self, xt, t, F, log_s, D=None):
        """-> x0_hat, in float32.   log_s: less what it was to begin with   all: (B,4,D,H,W)"""
        abar = alpha_bar(t)
        begin = 2 * self.std.float().log().reshape(1, -1, 1, 1, 1)
        w = (2 * log_s.float().clamp(-5, 5) + begin + torch.logit(abar)).sigmoid()
        x0_hat = torch.lerp(F.float(), xt.float() / abar.sqrt(), w)
        return x0_hat if D is None else x0_hat + (w * ((1 - abar) / abar)).sqrt() * D


def statistics(dataset, patch, n=64):
    """How far voxels lie from the mean of their cube of patch^3 voxels: the standard deviation of each channel of x_0
    over the first items of a dataset; at least 0.001, where a channel is empty.   -> list of 4"""
    x = torch.stack([dataset[k][1] for k in range(min(n, len(dataset)))])                # (n,4,D,H,W)
    x = to_depth(x, patch).unflatten(1, (-1, patch**3))                                  # (n,4,p^3,D/p,H/p,W/p)
    return (x - x.mean(2, keepdim=True)).square().mean((0, 2, 3, 4, 5)).sqrt().clamp(min=1e-3).tolist()


def folded(state, net):
    """The weights of a network with patch 1, rewritten for `net`, the same one with patch > 1, so that it first makes
    of a volume what the old one makes of the means over its cubes of patch^3 voxels. A network trained on a small grid
    goes on so on one twice as fine.   state: name -> tensor   -> the same
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
    for name in ("out.weight", "out.bias"):
        new[name] = state[name].repeat_interleave(cube, 0)

    # their inputs are copies; random weights of sum 0 over them change no output, but let them part
    for name in ("head.conv2.weight", "out.weight"):
        apart = net.get_parameter(name).detach().unflatten(1, (-1, copies))
        apart = (apart - apart.mean(2, keepdim=True)).flatten(1, 2)
        new[name] = new[name].repeat_interleave(copies, 1) / copies + apart
    return new


def sharpened(state, net):
    """The weights of a network on cubes, rewritten for `net`, a Sharp one, so that at first F is what the old one
    makes, s is `std`, and D is 0.   state: name -> tensor   -> the same"""
    new, begun, outputs = dict(state), net.state_dict(), len(state["out.weight"])
    for name in ("out.weight", "out.bias"):                              # F, log s, features: these are still random
        new[name] = torch.cat([state[name], torch.zeros_like(state[name]), begun[name][2 * outputs:]])
    for name in begun:
        if name.startswith(("head.time", "detail")):
            new[name] = torch.zeros_like(begun[name])
    return new | {name: value for name, value in begun.items() if name == "std" or name.startswith("fine.")}


def begin_from(path, kind, net):
    """--init from weights of the same network, of one without pooled text, or of one on voxels for one on cubes.
    -> names of what was not there: of text pooling, or nothing"""
    state, args = read_init(path, kind, net, free=("pooled",))
    try:
        if net.patch > args.get("patch", 1):
            state = folded(state, net)
        if net.args.get("sharp") and not args.get("sharp"):
            state = sharpened(state, net)
        new, excess = net.load_state_dict(state, strict=False)
    except (KeyError, RuntimeError) as e:                                # lacks what is folded, or has other shapes
        raise ValueError(f"--init {path}: the weights do not fit the network that it describes ({str(e)[:200]}); "
                         "weights that a trainer wrote are needed; name another file") from None
    if excess or any(not k.startswith("pool.") for k in new):
        raise ValueError(f"--init {path}: lacks {', '.join(new) or 'nothing'}, has besides "
                         f"{', '.join(excess) or 'nothing'}; the same network is needed, or one without pooled text; "
                         "pass its options or name another file")
    return new
