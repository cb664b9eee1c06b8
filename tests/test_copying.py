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
from beyond.nets import Extended, Sharp, sharpened, statistics, to_depth, to_space
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


def sharp(volumes, fine):
    torch.manual_seed(0)
    return Sharp(8, fine=fine, std=statistics([(0, x) for x in volumes], 2), **OPTIONS)


def test_what_has_learned_cubes_alone_returns_the_best_average_with_what_it_sees(volumes):
    net, rng = sharp(volumes, 0), torch.Generator().manual_seed(0)
    F = to_space(to_depth(volumes, 2).unflatten(1, (4, 8)).mean(2).repeat_interleave(8, 1), 2)   # means over cubes
    var = (volumes - F).square().mean((0, 2, 3, 4)).reshape(-1, 1, 1, 1)
    for t in (0.02, 0.1, 0.3, 0.7):
        t = torch.full((4,), t)
        xt, abar = q_sample(volumes, t, torch.randn(volumes.shape, generator=rng)), alpha_bar(t)
        gain = abar.sqrt() * var / (abar * var + 1 - abar)               # cov(x0, xt) / var(xt), about F
        away = xt - abar.sqrt() * F
        assert error(net.average(xt, t, F, torch.zeros_like(xt)), F + gain * away) < 1e-5
        assert error(net.average(xt, t, F, torch.full_like(xt, -9)), F) < 0.01       # where it is sure, nothing of xt
        best, *others = ((F + scale * gain * away - volumes).square().mean() for scale in (1, 0.9, 1.1))
        assert best < min(others)                                        # no other gain is better


@pytest.mark.slow
def test_after_some_hundred_steps_it_copies_better_than_doing_nothing(volumes):
    small, rng, steps = volumes[..., 8:24, 8:24, 8:24], torch.Generator().manual_seed(0), 200
    net = sharp(small, 8)
    opt = torch.optim.AdamW(net.parameters())
    for step in range(steps):                            # where there is little noise
        opt.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        when, eps = 0.1 * torch.rand(4, generator=rng), torch.randn(small.shape, generator=rng)
        loss(net, small, when, eps).backward()
        opt.step()
        opt.zero_grad()
    found = copying.errors(net.eval(), small[:1], 1)
    for t, bound in ((0.02, 0.0012), (0.05, 0.0048)):
        got, idle = (found[who][f"error, t = {t}"] for who in ("network", "doing nothing"))
        assert got < min(bound, 0.95 * idle)


@pytest.mark.parametrize("fine", [0, 8])
def test_slabs_of_it_give_the_whole_volume(volumes, fine):
    net, t = sharp(volumes, fine).eval(), torch.tensor([0.4])
    with torch.no_grad():
        whole = net(volumes[:1], t)
        by_slabs(net, 5, Block)
        assert error(net(volumes[:1], t), whole) < 5e-5


@pytest.mark.parametrize("fine", [0, 8])
def test_begun_from_cubes_it_makes_of_noise_what_they_made_and_copies_at_once(volumes, fine):
    torch.manual_seed(1)
    old, net = Extended(8, **OPTIONS), sharp(volumes, fine)
    net.load_state_dict(sharpened(old.state_dict(), net))
    with torch.no_grad():
        noise, t = torch.randn(1, 4, 32, 32, 32), torch.tensor([1.0])
        assert error(old(noise, t), net(noise, t)) < 0.01        # noise is worth 1e-4 * std^2 there
        t = torch.tensor([0.02])
        xt = q_sample(volumes[:1], t, noise)
        before, after = ((m(xt, t) - volumes[:1]).square().mean() for m in (old, net))
        assert after < 0.05 * before


@pytest.mark.slow
def test_it_trains_resumes_to_the_bit_and_loads(phantoms, tmp_path, fails):
    finer = tmp_path / "finer"                           # low-resolution volumes of 16^3
    for case in cases(phantoms):
        shutil.copytree(case, finer / case.name, ignore=shutil.ignore_patterns("case.json"))   # no hashes
        np.save(finer / case.name / "low.npy", np.load(case / "low.npy").repeat(2, 1).repeat(2, 2).repeat(2, 3))
    run = [*TINY, "--warm-up", "0", "--data", str(finer), "--patch", "2", "--sharp", "--fine", "8", "--cool", "0"]
    for out, steps in (("whole/low", (4,)), ("parts/low", (2, 4))):
        for n in steps:
            beyond.train_low.main([*run, "--out", str(tmp_path / out), "--steps", str(n)])
    whole, parts = (torch.load(tmp_path / out / "low/last.pt", weights_only=True) for out in ("whole", "parts"))
    assert all(torch.equal(whole["ema"][k], parts["ema"][k]) for k in whole["ema"])
    net, about = load_stages(tmp_path / "whole", UNet3D)["low"]
    assert isinstance(net, Sharp) and about["args"]["fine"] == 8 and not torch.equal(net.std, torch.full((4,), 0.2))
    weights, halved = tmp_path / "whole/low/low.safetensors", tmp_path / "halved"        # cases of another std
    for case in cases(finer):
        shutil.copytree(case, halved / case.name)
        np.save(halved / case.name / "low.npy", np.load(case / "low.npy") / 2)
    for _ in range(2):                                   # begun, and gone on with
        beyond.train_low.main([*run, "--data", str(halved), "--init", str(weights), "--out", str(tmp_path / "on/low"),
                               "--steps", "1"])
    assert torch.equal(load_stages(tmp_path / "on", UNet3D)["low"][0].std, net.std)
    for options, way in ((["--sharp"], "--patch 2"), (["--fine", 8], "--sharp")):
        code, err = fails(beyond.train_low.main, *TINY, "--data", finer, *options, "--out", tmp_path / "no")
        assert code == 2 and way in err


def test_sharpness_counts_bone_its_place_and_edges():
    ct, bones = np.full((8, 8, 8), -1000, np.int16), np.zeros((8, 8, 8), bool)
    ct[2:4, 2:4, 2:4], ct[5, 5, 5] = 300, 500
    bones[:5] = True
    found = copying.sharpness([ct], bones)
    assert found["per mille > 250 HU"] == pytest.approx(1000 * 9 / 512)
    assert found["per mille > 400 HU"] == pytest.approx(1000 / 512) and found["of bone outside"] == pytest.approx(1 / 9)
    assert copying.sharpness([np.zeros_like(ct)], bones)["gradient, HU a voxel"] == 0
