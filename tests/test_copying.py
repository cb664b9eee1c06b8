"""Networks that copy what they see where there is little noise, and the measures of it."""
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import beyond.train_low
import copying
from beyond.nets import Extended, Sharp, sharpened, statistics
from data import CHANNELS, cases, encode
from diffusion import alpha_bar, loss, q_sample
from support.slabs import by_slabs
from support.weights import load_stages
from test_train import TINY
from unet3d import Block, UNet3D

OPTIONS = dict(levels=2, heads=1, rounds=1, context_dim=0, patch=2)


def error(a, b):
    return (a - b).abs().max().item()


@pytest.fixture(scope="module")
def volumes(phantoms):
    """Four small chests, (4,4,32,32,32)."""
    return torch.stack([torch.from_numpy(np.stack([encode(c, np.load(case / f"{c}.npy")) for c in CHANNELS]))
                        for case in cases(phantoms)[:4]])


def sharp(volumes, **options):
    torch.manual_seed(0)
    mean, std = statistics([(0, x) for x in volumes])
    return Sharp(8, fine=8, mean=mean, std=std, **OPTIONS, **options)


def test_what_has_learned_nothing_returns_the_best_linear_estimate(volumes):
    net, t = sharp(volumes), torch.tensor([0.02, 0.3, 0.7, 1.0])
    xt = q_sample(volumes, t, torch.randn_like(volumes))
    x0_hat = net.precondition(xt, t, torch.zeros_like(xt))
    mean, std = (torch.tensor(net.args[k]).reshape(1, 4, 1, 1, 1) for k in ("mean", "std"))
    abar = alpha_bar(t)
    gain = abar.sqrt() * std**2 / (abar * std**2 + 1 - abar)             # cov(x0, xt) / var(xt)
    assert error(x0_hat, mean + gain * (xt - abar.sqrt() * mean)) < 1e-5
    for scale in (0.99, 1.01):                                           # no other gain is better, over all voxels
        other = mean + scale * gain * (xt - abar.sqrt() * mean)
        assert (x0_hat - volumes).square().mean() < (other - volumes).square().mean()


@pytest.mark.slow
def test_after_some_hundred_steps_it_copies_better_than_doing_nothing(volumes):
    small, rng = volumes[..., 8:24, 8:24, 8:24], torch.Generator().manual_seed(0)
    net = sharp(small)
    opt = torch.optim.AdamW(net.parameters(), 2e-3)
    for _ in range(200):                                 # where there is little noise
        when, eps = 0.1 * torch.rand(4, generator=rng), torch.randn(small.shape, generator=rng)
        loss(net, small, when, eps).backward()
        opt.step()
        opt.zero_grad()
    found = copying.errors(net.eval(), small[:1], 1)
    for t, bound in ((0.02, 0.0011), (0.05, 0.004)):
        got, idle = (found[who][f"error, t = {t}"] for who in ("network", "doing nothing"))
        assert got < min(bound, 0.8 * idle)


def test_slabs_of_it_give_the_whole_volume(volumes):
    net, t = sharp(volumes).eval(), torch.tensor([0.4])
    with torch.no_grad():
        whole = net(volumes[:1], t)
        by_slabs(net, 5, Block)
        assert error(net(volumes[:1], t), whole) < 2e-5


def test_begun_from_cubes_it_makes_of_noise_what_they_made(volumes):
    torch.manual_seed(1)
    old, net = Extended(8, **OPTIONS), sharp(volumes)
    net.load_state_dict(sharpened(old.state_dict(), net))
    t = torch.tensor([1.0])
    with torch.no_grad():
        noise = torch.randn(1, 4, 32, 32, 32)
        before, after = old(noise, t), net(noise, t)     # the stem's zeros at the edges are other zeros
    assert (before - after).abs().mean() < 0.05 * before.std()


@pytest.mark.slow
def test_it_trains_resumes_to_the_bit_and_loads(phantoms, tmp_path, fails):
    finer = tmp_path / "finer"                           # low-resolution volumes of 16^3
    for case in cases(phantoms):
        shutil.copytree(case, finer / case.name)
        np.save(finer / case.name / "low.npy", np.load(case / "low.npy").repeat(2, 1).repeat(2, 2).repeat(2, 3))
    run = [*TINY, "--warm-up", "0", "--data", str(finer), "--patch", "2", "--fine", "8", "--cool", "0"]
    for out, steps in (("whole/low", (4,)), ("parts/low", (2, 4))):
        for n in steps:
            beyond.train_low.main([*run, "--out", str(tmp_path / out), "--steps", str(n)])
    whole, parts = (torch.load(tmp_path / out / "low/last.pt", weights_only=True) for out in ("whole", "parts"))
    assert all(torch.equal(whole["ema"][k], parts["ema"][k]) for k in whole["ema"])
    net, about = load_stages(tmp_path / "whole", UNet3D)["low"]
    assert isinstance(net, Sharp) and about["args"]["fine"] == 8 and len(about["args"]["mean"]) == 4
    code, err = fails(beyond.train_low.main, *TINY, "--data", finer, "--fine", 8, "--out", tmp_path / "no")
    assert code == 2 and "--patch 2" in err


def test_sharpness_counts_bone_its_place_and_edges():
    ct, bones = np.full((8, 8, 8), -1000, np.int16), np.zeros((8, 8, 8), bool)
    ct[2:4, 2:4, 2:4], ct[5, 5, 5] = 300, 500
    bones[:5] = True
    found = copying.sharpness([ct], bones)
    assert found["per mille > 250 HU"] == pytest.approx(1000 * 9 / 512)
    assert found["per mille > 400 HU"] == pytest.approx(1000 / 512) and found["of bone outside"] == pytest.approx(1 / 9)
    assert copying.sharpness([np.zeros_like(ct)], bones)["gradient, HU a voxel"] == 0
