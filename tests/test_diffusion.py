"""The sampler is the original's, and right: golden trajectories, and cases whose answer is known in closed form."""
import gc
import weakref

import pytest
import torch

import diffusion
import golden
from data import upsample
from diffusion import alpha_bar, beside, ddim_sample, ddim_step, guided, held, loss, q_sample, times


@pytest.fixture(scope="module")
def z():
    return golden.load("diffusion")


def error(a, b):
    return (a - b).abs().max().item()


def speaks(text, null):
    """A network that says `text` where it hears some, and `null` where it does not."""
    return lambda xt, t, context=None: null if context is None else text


def test_functions_are_the_originals(z):
    assert error(alpha_bar(z["alpha_t"]).flatten(), z["alpha_cum"]) < 1e-5
    assert error(alpha_bar(z["alpha_t_int"]).flatten(), z["alpha_cum_int"]) < 1e-5
    assert error(q_sample(z["z_x0"], z["z_t"], z["z_eps"]), z["z_out"]) < 1e-5
    assert error(ddim_step(z["ddim_xt"], z["ddim_x0"], z["ddim_t"], z["ddim_tprev"]), z["ddim_out"]) < 1e-5
    for s in (2, 3):                                                     # a tenth of it all: inside the clamp
        net = speaks(z["cfg_x0_cond"] / 10, z["cfg_x0_null"] / 10)
        assert error(10 * guided(net, torch.zeros(5, 1, 1), s)(z["cfg_x0_cond"], None), z[f"cfg_x0space_{s}"]) < 1e-5
    assert error(upsample(z["lr_down"]), z["lr_up"]) == 0 and error(z["lr_hr"][..., ::4, ::4, ::4], z["lr_down"]) == 0


SLOW = pytest.mark.slow


@pytest.mark.parametrize("name, network, guidance, fixed", [
    ("eval_s1", "low", 1, []), ("eval_s2", "low", 2, []), pytest.param("eval50_s1", "low", 1, [], marks=SLOW),
    ("hybrid_s1_ch1", "low", 1, [1]), ("hybrid_s2_ch12", "low", 2, [1, 2]), ("sr_eval", "sr", 1, []),
    pytest.param("sr_eval20", "sr", 1, [], marks=SLOW)])
def test_whole_samplings_are_the_originals(z, name, network, guidance, fixed):
    ts = z[f"traj_{name}_times"].unique().flip(0) / 1000                 # guided ones list each time twice
    net, known = golden.network(network), z["image"].clamp(-1, 1)
    denoise = guided(net, golden.load("low")["cond"], guidance) if network == "low" else beside(net, z["img_lr"])
    x = ddim_sample(held(denoise, known, fixed), z["init_noise"], ts)
    assert error((x[golden.EVERY] + 1) / 2, z[f"traj_{name}_final"]) < 1e-3


def test_times_are_n_and_descend_from_one():
    assert times(50).tolist() == pytest.approx([1 - i / 50 for i in range(50)])


# --- closed forms, in float64 ---

def gaussian(mean, std):
    """The exact x_0 predictor of data ~ N(mean, std^2), scaled so that x_0 hat stays inside the clamp."""
    def denoise(xt, t):
        abar = alpha_bar(t)
        gain = abar.sqrt() * std**2 / (abar * std**2 + 1 - abar)
        return mean + gain * (xt - abar.sqrt() * mean)
    return denoise


def flow_error(n, sampler=ddim_sample, mean=0.2, std=0.1):
    """n steps of a sampler against the closed form of its flow, along which (x - sqrt(abar) mean) / spread is constant.
    In units of std."""
    noise = torch.linspace(-1.5, 1.5, 64, dtype=torch.float64).reshape(1, 4, 1, 4, 4)
    denoise, (zero, one) = gaussian(mean, std), torch.eye(2, dtype=torch.float64)[1].split(1)

    def spread(t):
        return (alpha_bar(t) * std**2 + 1 - alpha_bar(t)).sqrt()

    exact = alpha_bar(zero).sqrt() * mean + (noise - alpha_bar(one).sqrt() * mean) / spread(one) * spread(zero)
    made = sampler(denoise, noise, torch.cat([times(n).double(), zero]))
    return error(made, denoise(exact, zero)) / std


def test_error_halves_when_steps_double():
    e50, e100 = flow_error(50), flow_error(100)
    assert 1.8 < e50 / e100 < 2.2 and 0.14 < e50 < 0.16


def point(xt, t):
    return torch.full_like(xt, 0.3)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_a_point_mass_is_reproduced_in_any_number_of_steps(n):
    noise = torch.randn(2, 4, 2, 2, 2, dtype=torch.float64)
    assert error(ddim_sample(point, noise, times(n).double()), torch.full_like(noise, 0.3)) == 0


def test_true_x0_makes_ddim_return_to_where_q_sample_would_be():
    x0, eps = torch.randn(2, 3, 4, 2, 2, 2, dtype=torch.float64)[:, :3]
    t, s = torch.tensor([0.9, 0.5, 0.2]).double(), torch.tensor([0.7, 0.1, 0.0]).double()
    assert error(ddim_step(q_sample(x0, t, eps), x0, t, s), q_sample(x0, s, eps)) < 1e-14


def test_two_steps_with_one_estimate_are_one_step():
    x, x0 = torch.randn(2, 1, 4, 2, 2, 2, dtype=torch.float64)
    t, m, s = (torch.tensor([v], dtype=torch.float64) for v in (0.9, 0.6, 0.3))
    assert error(ddim_step(ddim_step(x, x0, t, m), x0, m, s), ddim_step(x, x0, t, s)) < 1e-14


def stale_t(xt, x0_hat, t, s):
    return q_sample(x0_hat, s, (xt - alpha_bar(s).sqrt() * x0_hat) / (1 - alpha_bar(s)).sqrt())


def no_sqrt(xt, x0_hat, t, s):
    return q_sample(x0_hat, s, (xt - alpha_bar(t) * x0_hat) / (1 - alpha_bar(t)).sqrt())


def wrong_sigma(xt, x0_hat, t, s):
    return q_sample(x0_hat, s, (xt - alpha_bar(t).sqrt() * x0_hat) / (1 - alpha_bar(t)))


@pytest.mark.parametrize("mutant", [stale_t, no_sqrt, wrong_sigma])
def test_the_checks_catch_a_wrong_sampler(mutant, monkeypatch):
    monkeypatch.setattr(diffusion, "ddim_step", mutant)
    with pytest.raises(AssertionError):
        test_error_halves_when_steps_double()


# --- what a denoiser is told ---

def test_guidance_zero_and_one_are_identities():
    text, null = torch.rand(2, 1, 4, 2, 2, 2)
    none, whole = (guided(speaks(text, null), torch.zeros(1, 3, 2), scale)(text, None) for scale in (0, 1))
    assert error(none, null) == 0 and error(whole, text) == 0
    nearly = guided(speaks(text, null), torch.zeros(1, 3, 2), 1 + 1e-7)(text, None)
    assert error(nearly, text) < 1e-6                                    # by the formula, not by leaving it out


def test_without_text_guidance_of_any_scale_is_the_null_text_once():
    heard = []
    denoise = guided(lambda xt, t, context: heard.append(context) or xt, None, 3)
    assert error(denoise(torch.full((1, 4, 2, 2, 2), 0.5), None), torch.full((1, 4, 2, 2, 2), 0.5)) == 0
    assert heard == [None]


def test_stage_2_sees_low_first():
    low, xt = torch.randn(2, 1, 4, 2, 4, 4)
    seen = []
    beside(lambda x, t: seen.append(x) or x[:, :4], low)(xt, None)
    assert error(seen[0], torch.cat([low, xt], dim=1)) == 0


def test_what_a_denoiser_says_of_the_text_and_of_low_is_clamped():
    loud, context = torch.full((1, 4, 2, 2, 2), 3.0), torch.zeros(1, 3, 2)
    for denoise in (guided(speaks(loud, -loud), context, 1), guided(speaks(loud, -loud), context, 2),
                    beside(speaks(None, loud), loud)):
        assert error(denoise(loud, None), torch.ones_like(loud)) == 0


def test_a_bare_network_is_clamped_by_the_sampler():
    assert error(ddim_sample(lambda xt, t: 3 * torch.ones_like(xt), torch.randn(1, 4, 2, 2, 2), times(2)),
                 torch.ones(1, 4, 2, 2, 2)) == 0


def test_fixed_channels_come_out_unchanged_and_the_others_do_not():
    known, noise = torch.rand(2, 1, 4, 2, 4, 4)
    x = ddim_sample(held(point, known, [1, 3]), noise, times(5))
    assert error(x[:, [1, 3]], known[:, [1, 3]]) == 0 and error(x[:, [0, 2]], torch.full((1, 2, 2, 4, 4), 0.3)) == 0


def test_holding_changes_no_tensor_of_the_denoiser_or_the_caller():
    own, known = torch.rand(2, 1, 4, 2, 4, 4)
    before = own.clone(), known.clone()
    x = ddim_sample(held(lambda xt, t: own, known, [0, 2]), torch.randn(1, 4, 2, 4, 4), times(3))
    assert torch.equal(own, before[0]) and torch.equal(known, before[1]) and not torch.equal(x, own)


def test_nothing_held_is_the_denoiser_itself():
    assert held(point, None, []) is point


def test_sampling_leaves_the_noise_as_it_was():
    known, low, noise = torch.rand(3, 1, 4, 2, 4, 4)
    before = noise.clone()
    for denoise in (point, lambda xt, t: xt, guided(lambda xt, t, context: xt, torch.zeros(1, 3, 2), 2),
                    beside(lambda x, t: x[:, 4:], low), held(point, known, [1, 3])):
        for n in (1, 3):
            ddim_sample(denoise, noise, times(n))
            assert torch.equal(noise, before)


def held_while_working(sampler):
    """How many tensors of the sample's size are there at each call of stage 2's network -> list; it alone holds what it
    sees"""
    def net(seen, t):
        x0_hat, held = seen[:, 4:].clone(), weakref.ref(seen)
        del seen
        assert held() is None
        tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.shape == (1, 4, 6, 10, 14)]
        counts.append(len({x.untyped_storage().data_ptr() for x in tensors}))
        return x0_hat

    counts, low = [], torch.zeros(1, 4, 6, 10, 14)
    sampler(beside(net, low), torch.randn(1, 4, 6, 10, 14), times(4))
    return counts


def test_while_the_network_works_the_sampler_holds_little():
    assert held_while_working(ddim_sample) == [3, 4, 4, 4]               # low, noise, then xt, and what net makes


def test_steps_are_network_evaluations_twice_when_guided():
    calls = []

    def net(xt, t, context=None):
        calls.append((t.item(), context is None))
        return xt
    noise, context = torch.zeros(1, 4, 2, 2, 2), torch.zeros(1, 3, 2)
    ddim_sample(guided(net, context, 2), noise, times(4))
    assert calls == [(t, null) for t in (1, 0.75, 0.5, 0.25) for null in (False, True)]
    calls.clear()
    ddim_sample(guided(net, context, 1), noise, times(4))
    assert calls == [(t, False) for t in (1, 0.75, 0.5, 0.25)]


def test_times_may_be_any_descending_sequence():
    noise = torch.randn(1, 4, 2, 2, 2)
    made = [ddim_sample(gaussian(0.2, 0.1), noise, ts) for ts in ([1, 0.5, 0.25], torch.tensor([1, 0.5, 0.25]))]
    assert torch.equal(*made)


def test_loss_is_the_mean_square_on_x0():
    x0, eps = torch.randn(2, 2, 4, 2, 4, 4)
    t, seen = torch.tensor([0.3, 0.8]), []
    value = loss(lambda xt, t: seen.append((xt, t)) or torch.zeros_like(xt), x0, t, eps)
    assert value.item() == pytest.approx(x0.square().mean().item())
    assert error(seen[0][0], q_sample(x0, t, eps)) == 0 and seen[0][1] is t
