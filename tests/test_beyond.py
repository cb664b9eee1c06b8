"""What the paper does not have: solver, wrappers, networks, losses, trainers. Each does what it says, and nothing when
it is off."""
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import beyond.train_low
import beyond.train_sr
import diffusion
import train_low
import train_sr
from beyond import losses, sampling, solvers
from beyond.nets import Extended, TextPool, folded, to_depth, to_space
from beyond.sampling import agree, agreeing, shown, tidy_lobes, within
from beyond.solvers import dpm_sample
from data import Cases, cases, decode, encode, upsample
from diffusion import alpha_bar, beside, ddim_sample, guided, held, q_sample, times
from support.options import parse
from support.sampling import wanted
from support.slabs import by_slabs
from test_diffusion import flow_error, held_while_working, point
from test_train import ALONE, CROP, TINY, exported, same, torchrun, weights
from unet3d import Block, UNet3D

TINY_BEYOND = [*TINY, "--warm-up", "0", "--cool", "0"]
PLAIN = ["--no-pooled", "--late", "0", "--cool", "0", "--windows", "0", "--bullae", "0"]


def error(a, b):
    return (a - b).abs().max().item()


def low(phantoms, out, *more):
    beyond.train_low.main([*TINY_BEYOND, "--data", str(phantoms), "--out", str(out), *map(str, more)])


# --- the solver ---

def test_second_order_beats_ddim_and_its_error_falls_with_the_square_of_the_steps():
    e200, e400 = flow_error(200, dpm_sample), flow_error(400, dpm_sample)
    assert 3.5 < e200 / e400 < 4.5 and e200 < flow_error(200) / 4


def test_a_wrong_extrapolation_is_caught(monkeypatch):
    monkeypatch.setattr(solvers, "second_order", lambda x0_hat, x0_before, *_: x0_hat + 0.5 * (x0_before - x0_hat))
    with pytest.raises(AssertionError):
        test_second_order_beats_ddim_and_its_error_falls_with_the_square_of_the_steps()


@pytest.mark.parametrize("n", [1, 7])
def test_the_solver_reproduces_a_point_mass_in_any_number_of_steps(n):
    noise = torch.randn(2, 4, 2, 2, 2, dtype=torch.float64)
    assert error(dpm_sample(point, noise, times(n).double()), torch.full_like(noise, 0.3)) == 0


def test_the_solver_keeps_fixed_channels_and_the_callers_noise():
    known, noise = torch.rand(2, 1, 4, 2, 4, 4)
    before = noise.clone()
    x = dpm_sample(held(shown(point, known, [1, 3]), known, [1, 3]), noise, times(5))
    assert error(x[:, [1, 3]], known[:, [1, 3]]) == 0 and error(x[:, [0, 2]], torch.full((1, 2, 2, 4, 4), 0.3)) == 0
    assert torch.equal(noise, before)


def test_while_the_network_works_the_solver_holds_one_estimate_more():
    assert held_while_working(dpm_sample) == [3, 5, 5, 5]                # and the estimate before


@pytest.mark.parametrize("stage, solver, expected", [
    ("low", "ddim", [1, 0.75, 0.5, 0.25]), ("low", "dpm", [1, 0.75, 0.5, 0.25]), ("sr", "ddim", [1, 0.75, 0.5, 0.25]),
    ("sr", "dpm", [1, 9 / 16, 1 / 4, 1 / 16])])
def test_the_solvers_times_of_stage_2_are_denser_near_data(stage, solver, expected):
    asked = []

    def denoise(xt, t):
        asked.append(t.item())
        return xt
    _, sampler = sampling.dress(stage, dict(solver=solver), denoise, denoise, None, [])
    sampler(denoise, torch.randn(1, 4, 2, 2, 2), times(4))
    assert asked == pytest.approx(expected)


# --- wrappers of a denoiser ---

@pytest.mark.parametrize("sampler", [ddim_sample, dpm_sample])
def test_fixed_channels_are_seen_clean_by_networks_trained_so(sampler):
    known, noise = torch.rand(2, 1, 4, 2, 4, 4)
    before, seen = noise.clone(), []

    def net(x, t):
        seen.append(x)
        return torch.full_like(x, 0.3)
    sampler(held(net, known, [1, 3]), noise, times(3))
    x = sampler(held(shown(net, known, [1, 3]), known, [1, 3]), noise, times(3))
    assert error(x[:, [1, 3]], known[:, [1, 3]]) == 0 and torch.equal(noise, before)
    for noisy, clean in zip(seen[:3], seen[3:]):
        assert torch.equal(clean[:, [1, 3]], known[:, [1, 3]]) and torch.equal(clean[:, [0, 2]], noisy[:, [0, 2]])
        assert not torch.isclose(noisy[:, [1, 3]], known[:, [1, 3]]).any()


def test_nothing_fixed_is_nothing_shown():
    assert shown(point, None, []) is point


def test_guidance_within_an_interval_is_one_call_a_step_elsewhere():
    calls = []

    def net(xt, t, context=None):
        calls.append((t.item(), context is None))
        return xt
    context = torch.zeros(1, 3, 2)
    denoise = within(guided(net, context, 2), guided(net, context, 1), 0.5, 0.8)
    ddim_sample(denoise, torch.zeros(1, 4, 2, 2, 2), times(4))
    assert calls == [(1, False), (0.75, False), (0.75, True), (0.5, False), (0.5, True), (0.25, False)]


@pytest.mark.parametrize("sampler", [ddim_sample, dpm_sample])
def test_wrappers_nest_and_the_outermost_keeps_the_fixed_channels_exactly(sampler):
    """Stage 2 with all of them, whose network says nothing of what is known."""
    known, low, noise = torch.rand(3, 1, 4, 8, 8, 8) * 2 - 1
    before, fixed, seen = [x.clone() for x in (known, low, noise)], [0, 2], []

    def net(x, t):
        seen.append(x)
        return -x[:, 4:]
    denoise = held(agreeing(shown(beside(net, low), known, fixed), low), known, fixed)
    x = sampler(denoise, noise, times(4))
    assert torch.equal(x[:, fixed], known[:, fixed]) and not torch.isclose(x[:, [1, 3]], known[:, [1, 3]]).all()
    assert len(seen) == 4
    assert all(torch.equal(x[:, :4], low) and torch.equal(x[:, [4, 6]], known[:, fixed]) for x in seen)
    assert all(torch.equal(a, b) for a, b in zip(before, (known, low, noise)))


def test_dress_is_these_wrappers():
    known, low, noise = torch.rand(3, 1, 4, 8, 8, 8) * 2 - 1
    denoise, fixed = beside(lambda x, t: -x[:, 4:], low), [2]
    by_hand = held(agreeing(shown(denoise, known, fixed), low), known, fixed)
    dressed, sampler = sampling.dress("sr", dict(agree=True, shown=["sr"]), denoise, None, known, fixed, low)
    assert torch.equal(sampler(held(dressed, known, fixed), noise, times(3)), ddim_sample(by_hand, noise, times(3)))
    for s in (dict(), dict(agree=False, shown=["low"], solver="ddim")):
        assert sampling.dress("sr", s, denoise, None, known, fixed, low)[0] is denoise
    assert sampling.dress("low", dict(agree=True, tidy=True, shown=["sr"]), denoise, None, known, fixed)[0] is denoise


def test_what_is_wanted_is_named():
    assert wanted({}) == wanted(dict(agree=False, tidy=False, solver="ddim", interval=[0, 1])) == []
    everything = dict(agree=True, tidy=True, shown=["low"], solver="dpm", interval=[0.5, 1])
    assert set(wanted(everything)) == set(everything)


NODES = (slice(None), slice(0, 1), *[slice(None, None, 4)] * 3)


def test_stage_2_agrees_with_stage_1_where_they_differ_faintly():
    low = upsample(torch.rand(1, 4, 3, 3, 3) - 0.5)
    estimate = low + 0.3 * torch.randn(1, 4, 12, 12, 12).clamp(-1, 1)
    got, by = agree(estimate, low), (low - estimate)[NODES]
    tissue = estimate[:, :1] > encode("ct", -300).item()
    assert error(got[NODES], estimate[NODES] + by.clamp(-0.1, 0.1) * tissue[..., ::4, ::4, ::4]) < 1e-6
    assert (by.abs() > 0.1).any() and (by.abs() < 0.1).any()
    assert torch.equal(got[:, :1][~tissue], estimate[:, :1][~tissue]) and 0.3 < tissue.float().mean() < 0.9
    assert torch.equal(got[:, 1:], estimate[:, 1:]) and (got - estimate).abs().max() <= 0.1 + 1e-6


@pytest.mark.parametrize("n", [12, 10])
def test_agreement_is_linear_between_the_voxels_of_stage_1(n):
    """A ramp that is off by a ramp comes back."""
    ramp = torch.arange(n).expand(1, 4, 8, 12, n) / 100
    got = agree(ramp - 0.5 * ramp, upsample(ramp[..., ::4, ::4, ::4])[..., :n])
    assert error(got[:, :1, ..., :9], ramp[:, :1, ..., :9]) < 1e-6


def test_a_sample_agrees_with_its_low_resolution_volume():
    low = upsample(torch.rand(1, 4, 3, 3, 3) - 0.5).abs()                # tissue, all of it

    def net(x, t):
        return low + 0.05 * torch.sin(torch.arange(12.0))
    made = ddim_sample(agreeing(beside(net, low), low), torch.randn_like(low), times(3))
    assert error(made[NODES], low[NODES]) < 1e-6 and error(made[:, 1:], net(0, 0)[:, 1:]) < 1e-6


# --- lobes ---

def two_lobes():
    """RUL beside RLL: 4, RML, is between them in number.   -> (40,40,40) in [-1,1]"""
    label = torch.zeros(40, 40, 40)
    label[5:35, 5:35, 5:20], label[5:35, 5:35, 20:35] = 3, 5
    return torch.from_numpy(encode("lobe", label))


def test_blurred_borders_between_lobes_are_not_other_lobes():
    def elsewhere(x):
        return np.isin(decode("lobe", x), (1, 2, 4)).mean()

    sharp, kernel = two_lobes(), torch.ones(1, 1, 5, 5, 5) / 125
    blurred = F.conv3d(F.pad(sharp[None, None], (2,) * 6, mode="replicate"), kernel)[0, 0]
    tidied = tidy_lobes(blurred)
    assert elsewhere(blurred) > 0.15 and elsewhere(tidied) == 0
    inside = (slice(7, 33), slice(7, 33), slice(8, None))    # both lobes, their border, and lobe 5 to where it ends
    assert torch.equal(tidied[inside], sharp[inside])


def test_sharp_lobes_stay_as_they_are():
    sharp = two_lobes()
    sharp[5:35, 5:35, 20:22] = -1                                        # a thin gap between two lobes
    sharp[10:13, 10:13, 5:20] = -1                                       # a tube, and a lobe three voxels thick
    sharp[5:8, 5:35, 5:20] = 0.6
    assert torch.equal(tidy_lobes(sharp), sharp)
    off = sharp + 0.15
    assert torch.equal(tidy_lobes(off, tolerance=0.2), sharp) and torch.equal(tidy_lobes(off), off)


def test_where_no_lobe_fills_a_cube_nothing_is_tidied():
    noise = torch.rand(30, 30, 30) * 2 - 1
    assert torch.equal(tidy_lobes(noise), noise)


@pytest.mark.parametrize("grid, fixed, tidy, tidied", [
    (64, [0], True, True), (64, [0], False, False), (64, [], True, False), (64, [2], True, False),
    (64, [0, 1], True, False), (32, [0], True, False)])
def test_a_ct_s_lobes_are_tidied_at_low_resolution_where_lobes_are_wide_enough(grid, fixed, tidy, tidied, monkeypatch):
    monkeypatch.setattr(sampling, "tidy_lobes", lambda x, tolerance, reach: torch.full_like(x, -0.2))
    x = sampling.sample("low", dict(tidy=tidy), fixed, lambda xt, t: torch.zeros_like(xt),
                        torch.ones(1, 4, grid, grid, grid), times(1))[0]
    assert (x[1] == -0.2).all() == tidied and (x[[0, 2, 3]] == 0).all()


def test_a_sample_that_is_not_finite_is_not_made_so_by_tidying():
    x = sampling.sample("sr", dict(tidy=True), [], lambda xt, t: xt * float("nan"), torch.ones(1, 4, 8, 8, 8), times(1))
    assert x.isnan().all()


# --- losses and draws ---

def test_a_share_of_the_samples_trains_with_channels_without_noise():
    given = losses.choose_given(torch.rand(4000, 4, generator=torch.Generator().manual_seed(0)), 0.4)
    alone = given[:, 0]
    assert not given[alone, 1:].any() and 0.17 < alone.float().mean() < 0.23                   # the CT: half of 0.4
    masks = given[~alone & given.any(1), 1:]
    for n in (1, 2, 3):                                                  # a quarter of 0.2 each; none in the last
        assert 0.04 < (masks.sum(1) == n).sum() / 4000 < 0.06
    assert (masks.float().mean(0) - 2 / 3).abs().max() < 0.05
    assert not losses.choose_given(torch.rand(100, 4), 0.0).any()


def test_given_channels_are_seen_without_noise_the_others_with_it():
    x0, eps = torch.randn(2, 2, 4, 2, 4, 4)
    t, seen = torch.tensor([0.5, 1.0]), []
    given = torch.tensor([[True, False, False, False], [False, True, False, True]])
    losses.loss(lambda x, t: seen.append(x) or x0, x0, t, eps, given)
    xt = q_sample(x0, t, eps)
    assert torch.equal(seen[0][0, 0], x0[0, 0]) and torch.equal(seen[0][0, 1:], xt[0, 1:])
    assert torch.equal(seen[0][1, [1, 3]], x0[1, [1, 3]]) and torch.equal(seen[0][1, [0, 2]], xt[1, [0, 2]])


def test_without_tricks_the_loss_is_the_papers():
    x0, eps = torch.randn(2, 2, 4, 2, 4, 4)
    t = torch.tensor([0.3, 0.8])
    assert torch.equal(losses.loss(lambda x, t: 0.5 * x, x0, t, eps), diffusion.loss(lambda x, t: 0.5 * x, x0, t, eps))


@pytest.mark.parametrize("said, true, widths", [(-860, -992, [244]), (55, 5, [400, 760]), (400, 300, [760]),
                                                (-500, -600, [])])
def test_windows_count_faint_differences_of_the_ct_and_nothing_outside(said, true, widths):
    x0, x0_hat = (torch.tensor(encode("ct", np.full((1, 4, 2, 2, 2), hu))) for hu in (true, said))
    t = torch.tensor([0.4])
    x0_hat.requires_grad_()
    value = losses.window_loss(x0_hat, x0, t)
    value.backward()
    expected = alpha_bar(t).item() * sum((2 * (said - true) / width) ** 2 for width in widths)
    assert value.item() == pytest.approx(expected, rel=1e-4)
    assert (x0_hat.grad[:, 0] != 0).all() == bool(widths) and (x0_hat.grad[:, 1:] == 0).all()

    with torch.no_grad():
        x0[:, 1] = 1                                                     # in a lobe
        x0[:, 2] = -1
        more = losses.window_loss(x0_hat, x0, t, bullae=3).item()
        assert more == pytest.approx(expected * (4 if true < -930 else 1), rel=1e-4)
        x0[:, 2] = 1                                                     # in an airway
        assert losses.window_loss(x0_hat, x0, t, bullae=3).item() == pytest.approx(expected, rel=1e-4)
    whole = losses.loss(lambda x, t: x0_hat, x0, t, torch.zeros_like(x0), windows=0.5).item()
    assert whole == pytest.approx((x0_hat - x0).square().mean().item() + 0.5 * expected, rel=1e-4)


STAGES = [(beyond.train_low.Config, beyond.train_low.low_loss), (beyond.train_sr.Config, beyond.train_sr.sr_loss)]


@pytest.mark.parametrize("config, loss_fn", STAGES)
def test_windows_count_in_both_stages(config, loss_fn):
    x0, other = torch.full((2, 2, 4, 4, 4, 4), 0.25)                     # -9 HU

    def net(x, *_):
        return x0 - 0.1                                                  # 81 HU too low
    plain, seen = (loss_fn(config(windows=w), net, (torch.arange(2), x0, other)).item() for w in (0, 0.5))
    assert plain == pytest.approx(0.01) and plain < seen < 0.5


@pytest.mark.parametrize("config, loss_fn", STAGES)
def test_both_stages_show_given_channels_as_asked(config, loss_fn):
    x0, other = torch.full((2, 16, 4, 4, 4, 4), 0.25)
    seen = []

    def net(x, *_):
        seen.append(x[:, -4:])
        return x0
    for share in (0.0, 1.0):
        loss_fn(config(given=share), net, (torch.arange(16), x0, other))
    none, all_of_them = ((x == 0.25).all(-1).all(-1).all(-1) for x in seen)
    assert not none.any() and all_of_them.any(0).all() and not all_of_them.all(0).any()
    assert torch.equal(seen[0][~all_of_them], seen[1][~all_of_them])     # the rest of the noise is the same


@pytest.mark.parametrize("config, loss_fn, plain_config, plain_loss_fn", [
    (*STAGES[0], train_low.Config, train_low.low_loss), (*STAGES[1], train_sr.Config, train_sr.sr_loss)])
def test_without_tricks_both_stages_train_as_the_papers(config, loss_fn, plain_config, plain_loss_fn):
    def net(x, *_):
        return 0.5 * x[:, -4:]
    batch = torch.arange(8), *torch.randn(2, 8, 4, 4, 4, 4)
    assert torch.equal(loss_fn(config(), net, batch), plain_loss_fn(plain_config(), net, batch))


def test_late_draws_more_times_where_the_text_decides():
    x0, text, asked = torch.zeros(400, 4, 1, 1, 1), torch.zeros(400, 1, 1), []
    for late in (0.0, 0.5, 1.0):
        beyond.train_low.low_loss(beyond.train_low.Config(late=late), lambda x, t, *_: asked.append(t) or x,
                                  (torch.arange(400), x0, text))
    none, half, all_of_them = ((t > 0.8).float().mean() for t in asked)
    assert 0.15 < none < 0.25 and 0.53 < half < 0.67 and all_of_them == 1


def test_the_validation_loss_is_without_tricks(phantoms):
    dataset = Cases(cases(phantoms)[:1], 0)
    values = [train_low.validate(beyond.train_low.Config(amp=False, windows=w, given=g), lambda x, *_: x, dataset,
                                 beyond.train_low.low_loss, ALONE) for w, g in ((0, 0), (0.4, 0), (0, 1))]
    assert values[0] == values[1] == values[2]


def test_masks_are_misplaced_lobes_inside_the_lung():
    masks = torch.full((1, 3, 8, 16, 16), -1.0)
    masks[:, 0, :, 2:14, :8], masks[:, 0, :, 2:14, 8:14] = -0.6, 1.0     # two lobes and a border, nothing around
    masks[:, 1, :, :, 10] = masks[:, 2, 3] = 1.0                         # an airway, a vessel
    by = torch.zeros(1, 3, 3, 3, 3)
    assert torch.equal(losses.misplace(masks, by), masks)
    by[:, 2] = 1                                                         # what lies one low voxel to the left
    expected = masks.clone()
    expected[:, 0, :, 2:14, 4:8] = 1.0
    expected[:, 1, :, :, 10], expected[:, 1, :, :, 6] = -1.0, 1.0
    assert torch.equal(losses.misplace(masks, by), expected)


def test_crops_for_a_network_on_cubes_begin_where_low_was_taken_from(phantoms, tmp_path):
    def data(patch):
        return beyond.train_sr.placed_data(beyond.train_sr.Config(
            data=str(phantoms), out=str(tmp_path), crop="16,16,16", holdout=1, patch=patch))

    for dataset in data(2):
        for _, x0, low in (dataset[k] for k in range(12)):
            assert torch.equal(x0[:, ::4, ::4, ::4].half(), low[:, ::4, ::4, ::4].half())
    loose = [dataset[k][2] for dataset in data(1) for k in range(12)]
    assert any((low[:, 0] != low[:, 3]).any() for low in loose)          # others begin anywhere


def test_masks_are_misplaced_where_the_ct_is_given_alone():
    low, seen = torch.full((32, 4, 8, 16, 16), -1.0), []
    low[:, 0] = 0
    low[:, 1, :, 2:14, :8], low[:, 1, :, 2:14, 8:14] = -0.6, 1.0
    low[:, 2, :, :, 10] = low[:, 3, :, :, 10] = 1.0                      # what every displacement moves
    for share in (0.0, 1.0):
        beyond.train_sr.sr_loss(beyond.train_sr.Config(given=share, augment=0), lambda x, t: seen.append(x) or x[:, 4:],
                                (torch.arange(32), low, low))
    apart = (seen[1][:, :4] != seen[0][:, :4]).flatten(2).any(2)
    alone = (seen[1][:, 4] == low[:, 0]).flatten(1).all(1)               # the CT was seen without noise
    assert torch.equal(seen[0][:, :4], low) and not apart[:, 0].any()
    assert alone.any() and not alone.all() and all(torch.equal(apart[:, c], alone) for c in (1, 2, 3))


# --- networks ---

def test_space_to_depth_is_undone_and_keeps_neighbours_together():
    x = torch.arange(2 * 3 * 4 * 4 * 8.0).reshape(2, 3, 4, 4, 8)
    y = to_depth(x, 2)
    assert y.shape == (2, 24, 2, 2, 4) and torch.equal(to_space(y, 2), x)
    assert set(y[0, :8, 0, 1, 2].tolist()) == set(x[0, 0, 0:2, 2:4, 4:6].flatten().tolist())
    net = Extended(8, in_channels=8, heads=1, rounds=1, context_dim=0, levels=2, patch=2)
    assert net(torch.randn(1, 8, 6, 8, 12), torch.tensor([0.5])).shape == (1, 4, 6, 8, 12)


@pytest.mark.parametrize("dim", [8, 24, 40])                             # a head wider four times, twice, not at all
def test_folded_weights_do_to_means_of_cubes_what_they_did_to_voxels(dim):
    torch.manual_seed(0)
    options = dict(heads=1, rounds=1, context_dim=8, tokens=4, levels=2)
    small, large = UNet3D(dim, **options), Extended(dim, **options, patch=2)
    large.load_state_dict(folded(small.state_dict(), large))
    x, t, text = torch.randn(2, 4, 8, 16, 8), torch.tensor([0.2, 0.9]), torch.randn(2, 4, 8)
    expected = F.interpolate(small(F.avg_pool3d(x, 2), t, text), scale_factor=2)
    assert error(large(x, t, text), expected) < 1e-4

    large(x, t, text).sub(x).square().mean().backward()  # copies of a channel are told apart, the folded input is heard
    head = large.head.conv1.weight.grad
    copies = head.unflatten(0, (dim, -1))
    assert head[:, 2 * dim:].abs().amax() > 0
    assert copies.shape[1] == 1 or error(copies[:, 0], copies[:, 1]) > 1e-3


def test_without_its_tricks_the_extended_network_is_the_papers():
    options = dict(dim=8, heads=1, rounds=1, context_dim=8, tokens=4, levels=2)
    nets = []
    for kind in (UNet3D, Extended):
        torch.manual_seed(3)
        nets.append(kind(**options))
    x, t, text = torch.randn(1, 4, 4, 8, 8), torch.tensor([0.5]), torch.randn(1, 4, 8)
    a, b = (net.state_dict() for net in nets)
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
    assert torch.equal(*(net(x, t, text) for net in nets))


def test_pooled_text_reaches_every_block_the_null_text_too():
    torch.manual_seed(0)
    net = Extended(8, heads=1, rounds=1, context_dim=8, tokens=4, levels=1, pooled=True)
    t, texts = torch.tensor([0.5]), torch.randn(2, 1, 4, 8)
    with torch.no_grad():
        a, b, null = (net.embed(t, context) for context in (*texts, net.text(None, None, 1)))
    assert error(a, b) > 1e-3 and error(a, null) > 1e-3
    net(torch.randn(1, 4, 4, 4, 4), t).square().mean().backward()
    assert net.pool.q.grad.abs().max() > 0 and net.null_text.grad.abs().max() > 0


@pytest.mark.parametrize("size", [2, 3])
def test_slabs_of_cubes_with_pooled_text_give_the_whole_volume(size):
    net = Extended(8, heads=1, rounds=1, context_dim=8, tokens=4, levels=2, pooled=True, patch=2).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, t, text = torch.randn(1, 4, 14, 8, 8) + 3, torch.tensor([0.2]), torch.randn(1, 4, 8)
    with torch.no_grad():
        whole = net(x, t, text)
        by_slabs(net, size, Block)
        assert error(net(x, t, text), whole) < 2e-5 * whole.abs().max()


@pytest.mark.slow
def test_the_pooled_text_learns_to_say_what_a_chest_looks_like(phantoms):
    dataset, values = Cases(cases(phantoms), 0), []
    for steps in (1, 250):
        torch.manual_seed(0)
        cfg = beyond.train_low.Config(warm_up=steps, workers=0)
        values.append(beyond.train_low.warm_up(cfg, TextPool(16, 32), dataset, batch=5))
    x0 = torch.stack([F.adaptive_avg_pool3d(dataset[k][1], 8) for k in range(5)])
    mean_chest = ((x0 - x0.mean(0)) / x0.std(0).clamp(min=0.01)).square().mean()
    assert values[1] < 0.5 * mean_chest < values[0]                      # it read whose report it is


class TwoFindings:
    """Text says two bits; the first changes half of the volume by 1, the second the other half by a twentieth. All else
    is noise."""

    def __len__(self):
        return 1000

    @functools.cache                                                     # noqa: B019, it is one object
    def __getitem__(self, k):
        rng = torch.Generator().manual_seed(k)
        bits = torch.randint(2, (2,), generator=rng)
        x0, text = 0.03 * torch.randn(4, 8, 8, 8, generator=rng), torch.randn(8, 16, generator=rng)
        x0[:, :, :, :4] += bits[0]
        x0[:, :, :, 4:] += 0.05 * bits[1]
        text[:2, :2] += 6 * torch.diag(2.0 * bits - 1)
        return k, x0, text


@pytest.mark.slow
def test_the_pooled_text_hears_faint_findings_as_loud_ones():
    torch.manual_seed(0)
    pool, dataset = TextPool(16, 32), TwoFindings()
    beyond.train_low.warm_up(beyond.train_low.Config(warm_up=100, workers=0), pool, dataset)
    text = torch.stack([dataset[k][2] for k in range(400)])
    bits = text.diagonal(dim1=1, dim2=2)[:, :2] > 0
    with torch.no_grad():
        code = pool(text)
    apart = [(code[b].mean(0) - code[~b].mean(0)).norm().item() for b in bits.unbind(1)]
    assert apart[1] > 0.5 * apart[0]


# --- trainers ---

@pytest.mark.parametrize("kind, names", [(beyond.train_low, ["paper", "demo", "demo-256"]),
                                         (beyond.train_sr, ["paper", "light", "demo", "demo-256"])])
def test_every_preset_with_tricks_is_a_configuration(kind, names):
    assert list(kind.Config.presets) == names
    for name in names:
        cfg = parse(kind.Config, "", ["--preset", name, "--device", "cpu"])
        assert cfg.preset == name and cfg.batch % cfg.micro == 0
        if cfg.kind == "sr":
            D, H, W = map(int, cfg.crop.split(","))
            depth, plane = cfg.multiples()
            assert D % depth == H % plane == W % plane == 0 and depth == cfg.patch


def test_the_demo_preset_is_what_the_shipped_weights_were_trained_with():
    low, sr = (parse(kind.Config, "", ["--preset", "demo", "--device", "cpu"]) for kind in (beyond.train_low,
                                                                                           beyond.train_sr))
    assert (low.pooled, low.late, low.cool, low.windows, low.bullae) == (True, 0.5, 0.35, 0.4, 3.0)
    assert (sr.windows, sr.bullae, sr.given, sr.cool) == (0.4, 0.5, 0.5, 1.0)


@pytest.mark.slow
def test_a_run_with_tricks_resumes_bit_exactly(phantoms, tmp_path):
    low(phantoms, tmp_path / "whole", "--steps", 5, "--warm-up", 2, "--given", 0.5)
    for until in (1, 3, 5):
        low(phantoms, tmp_path / "parts", "--steps", until, "--warm-up", 2, "--given", 0.5)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


@pytest.mark.slow
def test_two_processes_train_with_tricks(phantoms, tmp_path):
    done = torchrun(["-m", "beyond.train_low"], *TINY, "--data", phantoms, "--out", tmp_path, "--steps", 2,
                    "--warm-up", 2)
    assert done.returncode == 0, done.stderr
    net, about = exported(tmp_path, "low")
    assert about["step"] == 2 and net.args["pooled"]


def test_a_light_stage_2_trains_and_loads(phantoms, tmp_path, fails):
    args = [*TINY, *CROP, "--cool", "0", "--patch", "2", "--steps", "1", "--data", str(phantoms)]
    beyond.train_sr.main([*args, "--out", str(tmp_path / "sr")])
    net, _ = exported(tmp_path / "sr", "sr")
    assert net.args["patch"] == 2 and net(torch.randn(1, 8, 8, 8, 8), torch.tensor([0.5])).shape == (1, 4, 8, 8, 8)
    code, err = fails(beyond.train_sr.main, *args, "--out", tmp_path / "odd", "--crop", "15,16,16")
    assert code == 2 and "D of 2" in err


def test_a_run_on_cubes_begins_from_weights_on_voxels(phantoms, tmp_path, fails):
    low(phantoms, tmp_path / "a", "--steps", 1)
    small, _ = exported(tmp_path / "a", "low")
    code, err = fails(beyond.train_low.main, *TINY_BEYOND, "--data", phantoms, "--out", tmp_path / "b", "--patch", 2)
    assert code == 2 and "4 voxels" in err

    finer = tmp_path / "finer"                                           # low-resolution volumes of 16^3
    for case in cases(phantoms):
        shutil.copytree(case, finer / case.name, ignore=shutil.ignore_patterns("case.json"))   # no hashes
        np.save(finer / case.name / "low.npy", np.load(case / "low.npy").repeat(2, 1).repeat(2, 2).repeat(2, 3))
    low(finer, tmp_path / "b", "--steps", 1, "--patch", 2, "--init", tmp_path / "a/low.safetensors", "--lr", 0)
    large, _ = exported(tmp_path / "b", "low")
    x, t = torch.randn(1, 4, 8, 8, 8), torch.tensor([0.5])
    with torch.no_grad():                                                # both were stored in float16
        assert error(large(x, t), F.interpolate(small(F.avg_pool3d(x, 2), t), scale_factor=2)) < 1e-2
    again = ["--data", phantoms, "--out", tmp_path / "c", "--init", tmp_path / "b/low.safetensors"]
    for main, args in ((beyond.train_low.main, TINY_BEYOND), (train_low.main, TINY)):
        code, err = fails(main, *args, *again)
        assert code == 2 and "'patch': 2" in err and err.count("\n") == 1


@pytest.mark.slow
def test_weights_with_pooled_text_are_not_warmed_up_again_and_not_begun_from_without(phantoms, tmp_path, monkeypatch,
                                                                                     fails):
    asked = []
    monkeypatch.setattr(beyond.train_low, "warm_up", lambda cfg, pool, dataset: asked.append(Path(cfg.out).name))
    low(phantoms, tmp_path / "a", "--steps", 1, "--warm-up", 1)
    train_low.main([*TINY, "--data", str(phantoms), "--out", str(tmp_path / "plain"), "--steps", "1"])
    low(phantoms, tmp_path / "b", "--steps", 1, "--warm-up", 1, "--init", tmp_path / "a/low.safetensors")
    low(phantoms, tmp_path / "c", "--steps", 1, "--warm-up", 1, "--init", tmp_path / "plain/low.safetensors")
    assert asked == ["a", "c"]

    pooled = ["--data", phantoms, "--out", tmp_path / "d", "--init", tmp_path / "a/low.safetensors"]
    code, err = fails(beyond.train_low.main, *TINY_BEYOND, *pooled, "--no-pooled")
    assert code == 2 and "has besides pool." in err and err.count("\n") == 1
    code, err = fails(train_low.main, *TINY, *pooled)                    # the paper's network has none
    assert code == 2 and "'pooled': True" in err and err.count("\n") == 1


def test_the_learning_rate_falls_at_the_end(phantoms, tmp_path):
    cfg = beyond.train_low.Config(steps=4, lr=1e-3, cool=0.5)
    assert [cfg.rate(step) for step in range(4)] == pytest.approx([1e-3, 1e-3, 1e-3, 0.5e-3])
    low(phantoms, tmp_path, "--steps", 2, "--lr", 1e-3, "--cool", 1)
    assert weights(tmp_path)["opt"]["param_groups"][0]["lr"] == 0.5e-3   # of the last update


# --- one run, two trainers ---

def test_a_run_with_tricks_is_refused_by_name_in_the_methods_trainer_and_goes_on_beyond(phantoms, tmp_path, fails):
    low(phantoms, tmp_path / "a", "--steps", 1)
    before = (tmp_path / "a/last.pt").read_bytes()
    assert "agree" not in weights(tmp_path / "a")["config"]              # the keys that such runs always had
    code, err = fails(train_low.main, *TINY, "--data", phantoms, "--out", tmp_path / "a", "--steps", 2)
    assert code == 2 and err.count("\n") == 1, err
    for words in ("--pooled True", "--late 0.5", "--windows 0.4", "--bullae 3.0", "python -m beyond.train_low"):
        assert words in err
    assert (tmp_path / "a/last.pt").read_bytes() == before
    low(phantoms, tmp_path / "a", "--steps", 2)
    assert weights(tmp_path / "a")["step"] == 2


@pytest.mark.slow
def test_a_run_of_stage_2_with_tricks_is_refused_by_name_in_the_methods_trainer(phantoms, tmp_path, fails):
    args = [*TINY, *CROP, "--data", str(phantoms), "--out", str(tmp_path), "--steps", "1"]
    beyond.train_sr.main([*args, "--cool", "0"])
    state = weights(tmp_path)
    del state["config"]["agree"]                                         # which such runs did not know
    torch.save(state, tmp_path / "last.pt")
    code, err = fails(train_sr.main, *args, "--steps", 2)
    assert code == 2 and "--windows 0.4" in err and "--given 0.5" in err and "python -m beyond.train_sr" in err
    beyond.train_sr.main([*args, "--cool", "0", "--steps", "2"])
    assert weights(tmp_path)["step"] == 2


@pytest.mark.slow
def test_an_old_run_without_tricks_goes_on_in_the_methods_trainer_to_the_bit(phantoms, tmp_path):
    low(phantoms, tmp_path / "a", "--steps", 1, *PLAIN)                  # old ones say so: pooled False, windows 0
    state = weights(tmp_path / "a")
    config, args = state["config"], state["args"]
    assert config["pooled"] is False and config["windows"] == 0 and args["pooled"] is False and args["patch"] == 1
    for out in ("a", "whole"):
        train_low.main([*TINY, "--data", str(phantoms), "--out", str(tmp_path / out), "--steps", "2"])
    assert same(weights(tmp_path / "a"), weights(tmp_path / "whole"))


@pytest.mark.slow
def test_a_run_of_the_method_may_be_given_loose_tricks_and_no_others(phantoms, tmp_path, fails):
    train_low.main([*TINY, "--data", str(phantoms), "--out", str(tmp_path), "--steps", "1"])
    args = [*TINY_BEYOND, *PLAIN, "--data", phantoms, "--out", tmp_path, "--steps", 2]
    for more, words in ((["--given", 0.5], "given absent -> 0.5"), (["--pooled"], "pooled absent -> True")):
        code, err = fails(beyond.train_low.main, *args, *more)
        assert code == 2 and words in err and err.count("\n") == 1, err
    beyond.train_low.main(list(map(str, [*args, "--windows", 0.4])))
    assert weights(tmp_path)["config"]["windows"] == 0.4


# --- how the weights want to be sampled ---

def test_each_trainer_writes_how_its_weights_want_to_be_sampled(phantoms, tmp_path):
    low(phantoms, tmp_path / "low", "--steps", 1, "--given", 0.5)
    beyond.train_sr.main([*TINY, *CROP, "--data", str(phantoms), "--out", str(tmp_path / "sr"), "--steps", "1"])
    said = {kind: json.loads((tmp_path / kind / "sampling.json").read_text()) for kind in ("low", "sr")}
    assert said == dict(low=dict(low_steps=50, guidance=2.0, shown=["low"]),
                        sr=dict(sr_steps=20, shown=["sr"], tidy=True, agree=True))


def test_what_was_not_trained_so_is_not_asked_for():
    assert beyond.train_low.Config().sampling() == train_low.Config().sampling()
    assert beyond.train_sr.Config().sampling() == dict(sr_steps=20, tidy=True)
    assert beyond.train_sr.Config(given=0.5, agree=True).sampling() == dict(sr_steps=20, shown=["sr"], tidy=True,
                                                                           agree=True)
