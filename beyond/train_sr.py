"""Stage 2 with what the paper does not have; the loop is train_low.train. The shipped demonstration weights were made
so.

    python -m beyond.train_sr --preset demo                         # two CPU cores, 32^3 -> 128^3
    python -m beyond.train_sr --preset demo-256 --init checkpoints/demo/sr.safetensors --data data/train256
    torchrun --nproc_per_node=4 -m beyond.train_sr --preset light   # the paper's sizes on cubes of 2^3 voxels
"""
from dataclasses import dataclass
from typing import ClassVar

import torch

import train_sr
from beyond.losses import choose_given, draw_given, loss, misplace
from beyond.nets import begin_from
from beyond.train_low import Tricks, make_net
from data import SCALE
from support.cli import exits
from support.options import arg, parse
from support.runs import is_new
from train_low import draw, run
from train_sr import augment_low, sr_data, sr_samples

DEMO = train_sr.DEMO | dict(windows=0.4, bullae=0.5, given=0.5, cool=1.0, agree=True)


@dataclass
class Config(Tricks, train_sr.Config):
    agree: bool = arg(False, "the weights' samples are moved to stage 1's HU, by at most 81 (sampling.json)")
    validated: ClassVar = dict(windows=0.0, given=0.0, augment=0.4)
    presets: ClassVar = {"paper": {}, "light": dict(patch=2, crop="256,80,80"), "demo": DEMO,
                         "demo-256": DEMO | dict(patch=2, steps=1300, ema_start=50, crop="96,80,80")}

    def sampling(self):
        return super().sampling() | self.shown() | dict(tidy=True) | ({"agree": True} if self.agree else {})


def placed_data(cfg):
    """`train_sr.sr_data`. A network on cubes is not told where the voxels that `low` was taken from lie: its crops
    begin at one, as whole volumes do."""
    data = sr_data(cfg)
    for dataset in data:
        if dataset and cfg.patch > 1:
            dataset.step = SCALE
    return data


def sr_net(cfg, dataset):
    net = make_net(cfg, dataset, in_channels=8, heads=cfg.heads, rounds=1, context_dim=0, levels=cfg.levels,
                   bottom=cfg.bottom)
    if cfg.init and is_new(cfg.out):
        begin_from(cfg.init, "sr", net)
    return net


def sr_loss(cfg, net, batch):
    """`train_sr.sr_loss` with channels shown without noise, and narrow windows of HU. Where the CT is given, the
    low-resolution masks are misplaced by up to 4 of their voxels."""
    keys, x0, low = batch
    shape, given = (8,) + x0.shape[2:], None
    t, u, eps = draw(keys, shape, x0.device, cfg.seed)
    if cfg.given:
        v, by = draw_given(keys, shape, x0.device, cfg.seed)
        given = choose_given(v, cfg.given)
        masks = torch.where(given[:, :1, None, None, None], misplace(low[:, 1:], 8 * by - 4), low[:, 1:])
        low = torch.cat([low[:, :1], masks], dim=1)
    low = augment_low(low, cfg.augment * u, eps[:, 4:])
    return loss(lambda xt, t: net(torch.cat([low, xt], 1), t), x0, t, eps[:, :4], given, cfg.windows, cfg.bullae)


def main(argv=None):
    with exits():
        run(parse(Config, __doc__, argv), placed_data, sr_net, sr_loss, sr_samples)


if __name__ == "__main__":
    main()
