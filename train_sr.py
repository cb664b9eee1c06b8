"""Stage 2: the 64^3 volume of four channels becomes 256^3. Only what differs from stage 1; the loop is train_low.train.
Paper sec. 4.2.2, eq. 8 and 10; numbers from sec. 4.6 unless a line says otherwise.

    torchrun --nproc_per_node=4 train_sr.py --data data/train       # four GPUs
    python train_sr.py --preset demo                                # two CPU cores, 32^3 -> 128^3

The network sees [low, x_t], no text and no position. So it can be trained on crops and run on whole volumes.
"""
from dataclasses import dataclass
from typing import ClassVar

import torch

from data import Cases, split_cases
from diffusion import beside, ddim_sample, loss, times
from support.checks import channels_of, crop_of, one_size
from support.cli import exits
from support.options import arg, parse
from support.runs import is_new
from support.weights import begin_from
from train_low import Common, draw, run
from unet3d import UNet3D

DEMO = dict(dim=16, levels=3, augment=0.1, batch=2, micro=2, lr=8e-4, steps=2300, ema_start=100, ema=0.99, ema_every=1,
            crop="64,48,48", checkpointing="none", workers=1, save_every=100, show_every=500)


@dataclass
class Config(Common):
    out: str = arg("runs/sr", "run folder: last.pt, sr.safetensors, loss.csv, pictures")
    batch: int = arg(32, "samples per optimizer step over all processes", 1)
    ema: float = arg(0.995, "decay of the running average; released code", 0, 1)
    ema_every: int = arg(10, "steps between its updates; released code", 1)
    dim: int = arg(56, "width of the first level", 1)
    heads: int = arg(4, "attention heads of 32 channels; released code", 1)
    crop: str = arg("256,72,72", "D,H,W of the training crops; released code; up to 256,256,256")
    bottom: str = arg("plane", "self-attention at the bottom: plane (released weights) or depth (the paper's words)")
    augment: float = arg(0.4, "most noise on the low-resolution input, drawn from 0 to this; released code", 0, 1)
    kind: ClassVar = "sr"
    validated: ClassVar = dict(augment=0.4)
    presets: ClassVar = {"paper": {}, "demo": DEMO}

    def sampling(self):
        return dict(sr_steps=20)


def sr_data(cfg):
    """Crops of the training cases and of those held out."""
    crop = crop_of(cfg.crop, *cfg.multiples())
    folders, held_out = split_cases(cfg.data, cfg.holdout, cfg.out)
    dataset = Cases(folders, cfg.seed, crop, channels_of(cfg.channels, folders + held_out))
    one_size(folders[:1] + held_out, ("low",))
    return dataset, Cases(held_out, cfg.seed, crop, dataset.channels) if held_out else None


def sr_net(cfg, dataset):
    C = len(dataset.channels)
    net = UNet3D(cfg.dim, 2 * C, C, heads=cfg.heads, rounds=1, context_dim=0, levels=cfg.levels, bottom=cfg.bottom)
    if cfg.init and is_new(cfg.out):
        begin_from(cfg.init, "sr", net, dataset.channels)
    return net


def augment_low(low, a, eps):
    """(1 - a) low + a eps, so that stage 2 forgives the faults of stage 1. Not in the paper; released code, a <= 0.4.
    The network is not told a; sampling adds none.   low, eps: (B,4,D,H,W)   a: (B,)"""
    a = a.reshape(-1, 1, 1, 1, 1)
    return (1 - a) * low + a * eps


def sr_loss(cfg, net, batch):
    """Eq. 8 for x', all four channels, which is eq. 10: || H(x'_t, x'_0^l) - x'_0 ||^2, x'_0^l the low-resolution
    volume, here with noise on it.   batch: k (B,), x0 and low (B,4,d,h,w), has (B,5), see Cases"""
    keys, x0, low, *has = batch
    t, u, eps = draw(keys, (2, *x0.shape[1:]), x0.device, cfg.seed)
    low = augment_low(low, cfg.augment * u, eps[:, 1])
    return loss(lambda xt, t: net(torch.cat([low, xt], 1), t), x0, t, eps[:, 0], *(it[:, :-1] for it in has))


def sr_samples(cfg, net, dataset, device):
    """A held-out case (at most 128^3 of it), its low-resolution volume, the sample made of that.   -> these, titles"""
    crop = (min(128, dataset.grid) // cfg.multiples()[1] * cfg.multiples()[1],) * 3
    key, x0, low, *_ = Cases(dataset.folders[:1], 0, crop, dataset.channels, dataset.step)[0]
    _, _, eps = draw(torch.tensor([key]), x0.shape, device, cfg.seed)
    made = ddim_sample(beside(net, low[None].to(device)), eps, times(10))[0].cpu()
    return [x0, low, made], ["held out", "its low resolution", "sample"]


def main(argv=None):
    with exits():
        run(parse(Config, __doc__, argv), sr_data, sr_net, sr_loss, sr_samples)


if __name__ == "__main__":
    main()
