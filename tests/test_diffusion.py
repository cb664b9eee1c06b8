"""The sampler is the original's, and right: golden trajectories, and cases whose answer is known in closed form."""
import gc

import numpy as np
import pytest
import torch

import diffusion
import golden
from diffusion import alpha_bar, augment_low, ddim_sample, ddim_step, guide, loss, q_sample, times
from data import encode, upsample


@pytest.fixture(scope="module")
def z():
    return golden.load("diffusion")


def error(a, b):
    return (a - b).abs().max().item()


def test_functions_are_the_originals(z):
    assert error(alpha_bar(z["alpha_t"]).flatten(), z["alpha_cum"]) < 1e-5
    assert error(alpha_bar(z["alpha_t_int"]).flatten(), z["alpha_cum_int"]) < 1e-5
    assert error(q_sample(z["z_x0"], z["z_t"], z["z_eps"]), z["z_out"]) < 1e-5
    assert error(ddim_step(z["ddim_xt"], z["ddim_x0"], z["ddim_t"], z["ddim_tprev"]), z["ddim_out"]) < 1e-5
    for s in (2, 3):
        assert error(guide(z["cfg_x0_cond"], z["cfg_x0_null"], s), z[f"cfg_x0space_{s}"]) < 1e-5
    assert error(upsample(z["lr_down"]), z["lr_up"]) == 0 and error(z["lr_hr"][..., ::4, ::4, ::4], z["lr_down"]) == 0


@pytest.mark.parametrize("name, network, guidance, fixed", [
    ("eval_s1", "low", 1, ()), ("eval_s2", "low", 2, ()), ("eval50_s1", "low", 1, ()), ("hybrid_s1_ch1", "low", 1, [1]),
    ("hybrid_s2_ch12", "low", 2, [1, 2]), ("sr_eval", "sr", 1, ()), ("sr_eval20", "sr", 1, ())])
def test_whole_samplings_are_the_originals(z, name, network, guidance, fixed):
    ts = z[f"traj_{name}_times"].unique().flip(0) / 1000                 # guided ones list each time twice
    context, low = (golden.load("low")["cond"], None) if network == "low" else (None, z["img_lr"])
    x = ddim_sample(golden.network(network), z["init_noise"], ts, context, guidance, z["image"].clamp(-1, 1), fixed, low)
    assert error((x[golden.EVERY] + 1) / 2, z[f"traj_{name}_final"]) < 1e-3


def test_times_are_n_and_descend_from_one():
    assert times(50).tolist() == pytest.approx([1 - i / 50 for i in range(50)])
    assert times(4, 2).tolist() == pytest.approx([1, 9 / 16, 1 / 4, 1 / 16])


# --- closed forms, in float64 ---

def gaussian(mean, std):
    """The exact x_0 predictor of data ~ N(mean, std^2), scaled so that x_0 hat stays inside the clamp."""
    def net(xt, t, context=None):
        abar = alpha_bar(t)
        gain = abar.sqrt() * std**2 / (abar * std**2 + 1 - abar)
        return mean + gain * (xt - abar.sqrt() * mean)
    return net


def flow_error(n, order=1, mean=0.2, std=0.1):
    """n-step DDIM, or DPM-Solver++(2M), against the closed form of its flow, along which (x - sqrt(abar) mean) / spread is constant. In units of std."""
    noise = torch.linspace(-1.5, 1.5, 64, dtype=torch.float64).reshape(1, 4, 1, 4, 4)
    net, (zero, one) = gaussian(mean, std), torch.eye(2, dtype=torch.float64)[1].split(1)

    def spread(t):
        return (alpha_bar(t) * std**2 + 1 - alpha_bar(t)).sqrt()

    exact = alpha_bar(zero).sqrt() * mean + (noise - alpha_bar(one).sqrt() * mean) / spread(one) * spread(zero)
    made = ddim_sample(net, noise, torch.cat([times(n).double(), zero]), order=order)
    return error(made, net(exact, zero)) / std


def test_error_halves_when_steps_double():
    e50, e100 = flow_error(50), flow_error(100)
    assert 1.8 < e50 / e100 < 2.2 and 0.14 < e50 < 0.16


def test_second_order_beats_ddim_and_its_error_falls_with_the_square_of_the_steps():
    e200, e400 = flow_error(200, order=2), flow_error(400, order=2)
    assert 3.5 < e200 / e400 < 4.5 and e200 < flow_error(200) / 4


def test_a_wrong_extrapolation_is_caught(monkeypatch):
    monkeypatch.setattr(diffusion, "second_order", lambda x0_hat, x0_before, *_: x0_hat + 0.5 * (x0_before - x0_hat))
    with pytest.raises(AssertionError):
        test_second_order_beats_ddim_and_its_error_falls_with_the_square_of_the_steps()


def point(xt, t, context=None):
    return torch.full_like(xt, 0.3)


@pytest.mark.parametrize("n, order", [(1, 1), (2, 1), (7, 1), (1, 2), (7, 2)])
def test_a_point_mass_is_reproduced_in_any_number_of_steps(n, order):
    noise = torch.randn(2, 4, 2, 2, 2, dtype=torch.float64)
    assert error(ddim_sample(point, noise, times(n).double(), order=order), torch.full_like(noise, 0.3)) == 0


def test_true_x0_makes_ddim_return_to_where_q_sample_would_be():
    x0, eps = torch.randn(2, 3, 4, 2, 2, 2, dtype=torch.float64)[:, :3]
    t, s = torch.tensor([0.9, 0.5, 0.2]).double(), torch.tensor([0.7, 0.1, 0.0]).double()
    assert error(ddim_step(q_sample(x0, t, eps), x0, t, s), q_sample(x0, s, eps)) < 1e-14


def test_two_steps_with_one_estimate_are_one_step():
    x, x0 = torch.randn(2, 1, 4, 2, 2, 2, dtype=torch.float64)
    t, m, s = (torch.tensor([v], dtype=torch.float64) for v in (0.9, 0.6, 0.3))
    assert error(ddim_step(ddim_step(x, x0, t, m), x0, m, s), ddim_step(x, x0, t, s)) < 1e-14


MUTANTS = {
    "stale t": lambda xt, x0_hat, t, s: q_sample(x0_hat, s, (xt - alpha_bar(s).sqrt() * x0_hat) / (1 - alpha_bar(s)).sqrt()),
    "no sqrt": lambda xt, x0_hat, t, s: q_sample(x0_hat, s, (xt - alpha_bar(t) * x0_hat) / (1 - alpha_bar(t)).sqrt()),
    "wrong sigma": lambda xt, x0_hat, t, s: q_sample(x0_hat, s, (xt - alpha_bar(t).sqrt() * x0_hat) / (1 - alpha_bar(t))),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_checks_catch_a_wrong_sampler(name, monkeypatch):
    monkeypatch.setattr(diffusion, "ddim_step", MUTANTS[name])
    with pytest.raises(AssertionError):
        test_error_halves_when_steps_double()


def test_guidance_zero_and_one_are_identities():
    a, b = torch.randn(2, 1, 4, 2, 2, 2)
    assert error(guide(a, b, 0), b) == 0 and error(guide(a, b, 1), a) < 1e-6


@pytest.mark.parametrize("order", [1, 2])
def test_fixed_channels_come_out_unchanged_and_the_others_do_not(order):
    known, noise = torch.rand(2, 1, 4, 2, 4, 4)
    x = ddim_sample(point, noise, times(5), known=known, fixed=[1, 3], order=order)
    assert error(x[:, [1, 3]], known[:, [1, 3]]) == 0 and error(x[:, [0, 2]], torch.full((1, 2, 2, 4, 4), 0.3)) == 0


@pytest.mark.parametrize("order", [1, 2])
def test_fixed_channels_are_seen_clean_by_networks_trained_so(order):
    known, noise = torch.rand(2, 1, 4, 2, 4, 4)
    before, seen = noise.clone(), []

    def net(x, t, context=None):
        seen.append(x)
        return torch.full_like(x, 0.3)
    ddim_sample(net, noise, times(3), known=known, fixed=[1, 3], order=order)
    x = ddim_sample(net, noise, times(3), known=known, fixed=[1, 3], clean=True, order=order)
    assert error(x[:, [1, 3]], known[:, [1, 3]]) == 0 and torch.equal(noise, before)
    for noisy, clean in zip(seen[:3], seen[3:]):
        assert torch.equal(clean[:, [1, 3]], known[:, [1, 3]]) and torch.equal(clean[:, [0, 2]], noisy[:, [0, 2]])
        assert not torch.isclose(noisy[:, [1, 3]], known[:, [1, 3]]).any()


def test_a_share_of_the_samples_trains_with_channels_without_noise():
    given = diffusion.choose_given(torch.rand(4000, 4, generator=torch.Generator().manual_seed(0)), 0.4)
    alone = given[:, 0]
    assert not given[alone, 1:].any() and 0.17 < alone.float().mean() < 0.23                          # the CT: half of 0.4
    masks = given[~alone & given.any(1), 1:]
    for n in (1, 2, 3):                                                                                # a quarter of 0.2 each; none in the last
        assert 0.04 < (masks.sum(1) == n).sum() / 4000 < 0.06
    assert (masks.float().mean(0) - 2 / 3).abs().max() < 0.05
    assert not diffusion.choose_given(torch.rand(100, 4), 0.0).any()

    x0, eps = torch.randn(2, 2, 4, 2, 4, 4)
    t, seen = torch.tensor([0.5, 1.0]), []
    loss(lambda x, *_: seen.append(x) or x0, x0, t, eps, given=torch.tensor([[True, False, False, False], [False, True, False, True]]))
    xt = q_sample(x0, t, eps)
    assert torch.equal(seen[0][0, 0], x0[0, 0]) and torch.equal(seen[0][0, 1:], xt[0, 1:])
    assert torch.equal(seen[0][1, [1, 3]], x0[1, [1, 3]]) and torch.equal(seen[0][1, [0, 2]], xt[1, [0, 2]])


def test_while_the_network_works_the_sampler_holds_little():
    held = []

    def net(seen, t, context=None):
        assert seen.dtype == torch.bfloat16 and seen.is_contiguous(memory_format=torch.channels_last_3d)
        held.append(len({x.untyped_storage().data_ptr() for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.shape == (1, 4, 6, 10, 14)}))
        return seen[:, 4:].float()
    for order in (1, 2):
        low = torch.zeros(1, 4, 6, 10, 14)
        with torch.autocast("cpu", torch.bfloat16):
            ddim_sample(net, torch.randn(1, 4, 6, 10, 14), times(4), low=low, order=order)
    assert held == [2, 3, 3, 3, 2, 4, 4, 4]                              # low, noise, then xt; with DPM-Solver++ the estimate before


def test_steps_are_network_evaluations_twice_when_guided():
    calls = []

    def net(xt, t, context=None):
        calls.append((t.item(), context is None))
        return xt
    ddim_sample(net, torch.zeros(1, 4, 2, 2, 2), times(4), context=torch.zeros(1, 3, 2), guidance=2)
    assert calls == [(t, null) for t in (1, 0.75, 0.5, 0.25) for null in (False, True)]
    calls.clear()
    ddim_sample(net, torch.zeros(1, 4, 2, 2, 2), times(4), context=torch.zeros(1, 3, 2), guidance=2, interval=(0.5, 0.8))
    assert calls == [(1, False), (0.75, False), (0.75, True), (0.5, False), (0.5, True), (0.25, False)]


def test_loss_is_the_mean_square_on_x0_and_low_is_seen_first():
    x0, eps, low, aug = torch.randn(4, 2, 4, 2, 4, 4)
    t, a = torch.tensor([0.3, 0.8]), torch.tensor([0.0, 0.4])
    seen = {}

    def net(xt, t, context, drop):
        seen["xt"] = xt
        return torch.zeros_like(x0)
    lows = augment_low(low, a, aug)
    assert loss(net, x0, t, eps, low=lows).item() == pytest.approx(x0.square().mean().item())
    assert error(seen["xt"], torch.cat([lows, q_sample(x0, t, eps)], 1)) == 0
    assert error(lows[0], low[0]) == 0 and error(lows[1], 0.6 * low[1] + 0.4 * aug[1]) < 1e-6


def test_stage_2_agrees_with_stage_1_where_they_differ_faintly():
    low = upsample(torch.rand(1, 4, 3, 3, 3) - 0.5)
    nodes = (slice(None), slice(0, 1), *[slice(None, None, 4)] * 3)
    estimate = low + 0.3 * torch.randn(1, 4, 12, 12, 12).clamp(-1, 1)
    got, by = diffusion.agree(estimate, low), (low - estimate)[nodes]
    tissue = estimate[:, :1] > encode("ct", -300).item()
    assert error(got[nodes], estimate[nodes] + by.clamp(-0.1, 0.1) * tissue[..., ::4, ::4, ::4]) < 1e-6 and (by.abs() > 0.1).any() and (by.abs() < 0.1).any()
    assert torch.equal(got[:, :1][~tissue], estimate[:, :1][~tissue]) and 0.3 < tissue.float().mean() < 0.9
    assert torch.equal(got[:, 1:], estimate[:, 1:]) and (got - estimate).abs().max() <= 0.1 + 1e-6
    for n in (12, 10):                                                   # in between it is linear: a ramp that is off by a ramp comes back
        ramp = torch.arange(n).expand(1, 4, 8, 12, n) / 100
        got = diffusion.agree(ramp - 0.5 * ramp, upsample(ramp[..., ::4, ::4, ::4])[..., :n])
        assert error(got[:, :1, ..., :9], ramp[:, :1, ..., :9]) < 1e-6

    low = low.abs()                                                      # tissue, all of it
    net = lambda x, t, context: low + 0.05 * torch.sin(torch.arange(12.0))
    made = ddim_sample(net, torch.randn_like(low), times(3), low=low, agreeing=True)
    assert error(made[nodes], low[nodes]) < 1e-6 and error(made[:, 1:], net(0, 0, 0)[:, 1:]) < 1e-6


@pytest.mark.parametrize("said, true, width", [(-860, -992, 244), (55, 5, 400), (-500, -600, None), (400, 300, None)])
def test_windows_count_faint_differences_of_the_ct_and_nothing_outside(said, true, width):
    x0, x0_hat = (torch.tensor(encode("ct", np.full((1, 4, 2, 2, 2), hu))) for hu in (true, said))
    t = torch.tensor([0.4])
    x0_hat.requires_grad_()
    value = diffusion.window_loss(x0_hat, x0, t)
    value.backward()
    expected = alpha_bar(t).item() * (2 * (said - true) / width) ** 2 if width else 0
    assert value.item() == pytest.approx(expected, rel=1e-4)
    assert (x0_hat.grad[:, 0] != 0).all() == bool(width) and (x0_hat.grad[:, 1:] == 0).all()
    with torch.no_grad():
        x0[:, 1] = 1                                                     # in a lobe
        x0[:, 2] = -1
        more = diffusion.window_loss(x0_hat, x0, t, bullae=3).item()
        assert more == pytest.approx(expected * (4 if true < -930 else 1), rel=1e-4)
        x0[:, 2] = 1                                                     # in an airway
        assert diffusion.window_loss(x0_hat, x0, t, bullae=3).item() == pytest.approx(expected, rel=1e-4)
    zero = torch.zeros_like(x0)
    assert loss(lambda *a: x0_hat, x0, t, zero, windows=0.5).item() == pytest.approx((x0_hat - x0).square().mean().item() + 0.5 * expected, rel=1e-4)
