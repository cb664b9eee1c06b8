"""The network is the released one: outputs, null outputs, loss, gradients, sizes and keys; however it is run."""
import json

import pytest
import torch
import torch.nn.functional as F

import golden
from data import HU, decode, encode
from support.fast import Stem, VolumeConv, compile_blocks, native_norm, place, recompute, split_norm
from support.released import from_released, rename
from support.slabs import by_slabs
from unet3d import Block, Round, UNet3D


def error(a, b):
    return (a - b).abs().max().item()


def test_low_outputs_are_the_originals():
    z, net = golden.load("low"), golden.network("low")
    with torch.no_grad():
        assert error(net(z["x"], z["t"] / 1000, z["cond"])[golden.EVERY], z["out_eval"]) < 1e-4
        assert error(net(z["x"], z["t"] / 1000)[golden.EVERY], z["out_eval_null"]) < 1e-4


def test_sr_outputs_are_the_originals():
    z, net = golden.load("sr"), golden.network("sr")
    with torch.no_grad():
        assert error(net(z["x"], z["t"] / 1000)[golden.EVERY], z["out_eval"]) < 1e-4


@pytest.mark.parametrize("how", ["none", pytest.param("norms", marks=pytest.mark.slow),
                                 pytest.param("blocks", marks=pytest.mark.slow)])
def test_loss_and_every_gradient_norm_are_the_originals(how):
    z, net = golden.load("low"), golden.network("low").train()
    recompute(net, how, Block, (Round,))
    loss = (net(z["x"], z["t"] / 1000, z["cond"]) - z["target"]).square().mean()
    loss.backward()
    assert error(loss, z["loss_eval"]) < 1e-4
    ours = {name: p.grad.norm() for name, p in net.named_parameters() if p.grad is not None}
    ours["attend.qkv.weight"] = torch.cat([net.attend.q.weight.grad, net.attend.kv.weight.grad]).norm()
    theirs = {rename(str(name)): norm for name, norm in zip(z["grad_names"], z["grad_norms_eval"])}
    assert len(theirs) == 371
    for name, norm in theirs.items():
        assert abs(ours.get(name, torch.zeros(())) - norm) < 1e-4 * max(1, norm), name


@pytest.mark.parametrize("placed", [False, True])
def test_with_bfloat16_a_ramp_keeps_steps_of_one_hu(placed):
    """The last layer adds what it is given, coarse and fine, which bfloat16 can hold each; their sum it cannot."""
    hu = torch.arange(*HU)
    ramp = torch.from_numpy(encode("ct", hu))
    coarse = (ramp * 32).round() / 32
    net = small()
    if placed:
        place(net, "cpu", amp=True)
    with torch.no_grad():
        net.out.weight[0] = torch.tensor([1.0, 1.0, *[0.0] * 6])
        net.out.bias[0] = 0
        with torch.autocast("cpu", torch.bfloat16):
            h = torch.stack([coarse, ramp - coarse, *torch.zeros(6, len(ramp))]).reshape(1, 8, 1, 1, -1).bfloat16()
            made = net.out(h)[0, 0].flatten()
            assert made.dtype == net(torch.zeros(1, 8, 8, 8, 8), torch.ones(1)).dtype == torch.float32
    assert (decode("ct", made) == hu.numpy()).all()


def small():
    return UNet3D(8, in_channels=8, heads=1, rounds=1, context_dim=0, levels=2)


def test_recomputing_holds_less_and_changes_no_gradient():
    torch.manual_seed(0)
    net, x, t = small(), torch.randn(1, 8, 8, 8, 8), torch.tensor([0.5])
    state, grads, kept = net.state_dict(), {}, {}
    for how in ("none", "norms", "blocks"):
        net = small()
        net.load_state_dict(state)
        recompute(net, how, Block, (Round,))
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda v, held=held: held.append(v.nbytes) or v, lambda v: v):
            value = net(x, t).square().mean()
        grads[how] = torch.autograd.grad(value, [p for p in net.parameters() if p.requires_grad])
        kept[how] = sum(held)
    assert kept["blocks"] < kept["none"]                         # what "norms" keeps, autograd's hooks do not see
    assert all(error(a, b) < 1e-6 for how in ("norms", "blocks") for a, b in zip(grads["none"], grads[how]))


def test_an_unknown_way_to_recompute_is_refused():
    with pytest.raises(ValueError, match="none, norms or blocks"):
        recompute(small(), "all", Block)


def test_an_impossible_network_is_refused():
    for wrong in (dict(dim=12), dict(dim=8, bottom="top")):
        with pytest.raises(ValueError, match="multiple of 8, bottom plane or depth"):
            UNet3D(**wrong)


def test_a_batch_is_its_samples():
    net, x, context = golden.network("low"), torch.randn(2, 4, 4, 8, 8), torch.randn(2, 192, 16)
    t = torch.tensor([0.1, 0.9])
    with torch.no_grad():
        both = net(x, t, context)
        assert error(both, torch.cat([net(x[i:i + 1], t[i:i + 1], context[i:i + 1]) for i in (0, 1)])) < 1e-4
        dropped = net(x, t, context, drop=torch.tensor([True, False]))
        assert error(dropped, torch.cat([net(x[:1], t[:1]), both[1:]])) < 1e-4


@pytest.mark.parametrize("name, args, parameters", [
    ("low", dict(dim=160), 716_215_684),
    ("sr", dict(dim=56, in_channels=8, heads=4, rounds=1, context_dim=0), 54_307_908)])
def test_paper_sizes_and_every_released_key(name, args, parameters):
    released = json.loads((golden.FOLDER / f"{name}_keys.json").read_text())
    with torch.device("meta"):
        ours = UNet3D(**args)
    assert sum(p.numel() for p in ours.parameters()) == parameters
    shapes = {k: v.numel() for k, v in ours.state_dict().items()}
    shapes["attend.qkv.weight"] = shapes.pop("attend.q.weight") + shapes.pop("attend.kv.weight")
    theirs = {rename(k.removeprefix("denoise_fn.")): torch.Size(v).numel() for k, v in released.items()}
    assert theirs == shapes


def test_released_weights_load_with_prefix_and_buffers_and_say_what_is_wrong():
    state = {f"denoise_fn.{k}": v for k, v in golden.weights("sr").items()}
    state["betas"], state["alphas_cumprod"] = torch.zeros(1000), torch.zeros(1000)
    net = from_released(state, UNet3D, bottom="depth")
    assert net.args["in_channels"] == 8 and not net.plane

    lost = state.pop("denoise_fn.mid_block2.block2.norm.bias")
    with pytest.raises(ValueError, match="missing last.norm2.bias"):
        from_released(state, UNet3D)
    state.update({"denoise_fn.mid_block2.block2.norm.bias": lost, "denoise_fn.mid_block3.x": lost})
    with pytest.raises(ValueError, match="left over mid_block3.x"):
        from_released(state, UNet3D)
    del state["denoise_fn.mid_block3.x"]
    state["denoise_fn.downs.1.0.block1.proj.weight"] = torch.zeros(16, 8, 1, 3, 5)
    with pytest.raises(ValueError, match=r"downs.1.slice1.conv1.weight \(16, 8, 1, 3, 5\)"):
        from_released(state, UNet3D)
    with pytest.raises(ValueError, match="not a MedSyn network"):
        from_released({"weight": torch.zeros(1)}, UNet3D)


def test_rounds_that_do_not_share_their_attention_are_refused():
    state, name = golden.weights("low"), "mid_spatial_attn3.fn.fn.fn.to_qkv.weight"
    state[name] = torch.zeros_like(state[name])
    with pytest.raises(ValueError, match="share one self-attention"):
        from_released(state, UNet3D)


@pytest.mark.parametrize("norm_scale_silu", [native_norm, split_norm])
def test_norm_scale_silu_is_its_formula(norm_scale_silu):
    x, norm, ss = torch.randn(3, 16, 4, 5, 6), torch.nn.GroupNorm(8, 16), torch.randn(3, 32)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    scale, shift = ss[..., None, None, None].chunk(2, dim=1)
    want = torch.nn.functional.silu(norm(x) * (1 + scale) + shift)
    assert error(norm_scale_silu(x, norm, ss), want) < 1e-5
    assert error(norm_scale_silu(x[:1], norm, ss[:1]), want[:1]) < 1e-5
    assert error(norm_scale_silu(x, norm, None), torch.nn.functional.silu(norm(x))) < 1e-5


@pytest.mark.parametrize("bottom, seen", [("depth", (slice(None), 1, 1)), ("plane", 3)])
def test_depth_attention_sees_the_column_and_plane_attention_the_slice(bottom, seen):
    torch.manual_seed(0)
    net = UNet3D(8, in_channels=8, heads=2, rounds=1, context_dim=0, levels=1, bottom=bottom)
    x = torch.randn(1, 8, 12, 4, 4)
    other = x.clone()
    other[0, :, 3, 1, 1] += torch.randn(8)
    with torch.no_grad():
        a, b = (net.rounds[0](v, None, net.attend, net.plane) for v in (x, other))
    expected = torch.zeros(12, 4, 4, dtype=torch.bool)
    expected[seen] = True
    assert (((a - b).abs().sum(1)[0] > 1e-7) == expected).all()


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_slabs_give_the_whole_volume(size):
    """Not an approximation: statistics are of the whole volume, halos are the neighbours' own slices. 13 slices: no
    slab divides it."""
    net = small().eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)                                # gains of 1, offsets of 0 would hide mistakes
    x, t = torch.randn(2, 8, 13, 8, 8) + 3, torch.tensor([0.2, 0.7])
    with torch.no_grad():
        whole = net(x, t)
        by_slabs(net, size, Block)
        assert error(net(x, t), whole) < 2e-5 * whole.abs().max()


def test_slabs_agree_with_the_original():
    z, net = golden.load("sr"), golden.network("sr")
    by_slabs(net, 5, Block)
    with torch.no_grad():
        assert error(net(z["x"], z["t"] / 1000)[golden.EVERY], z["out_eval"]) < 1e-4


def test_the_stem_over_slices_is_its_convolution():
    torch.manual_seed(0)
    stem, x = Stem(4, 8, 7, padding=3), torch.randn(2, 4, 5, 8, 9).contiguous(memory_format=torch.channels_last_3d)
    assert error(stem.as_2d(x), stem(x)) < 1e-5 and stem.as_2d(x).is_contiguous(memory_format=torch.channels_last_3d)
    grads = [torch.autograd.grad(f(x).square().mean(), stem.parameters()) for f in (stem, stem.as_2d)]
    assert all(error(a, b) < 1e-5 for a, b in zip(*grads))


@pytest.mark.parametrize("amp", [False, True])
def test_a_small_volume_is_convolved_as_ever(amp):
    """(1,16,8,8,8) is one of the sizes at which torch would choose another convolution than oneDNN's."""
    torch.manual_seed(0)
    conv, x = VolumeConv(16, 8, 3, padding=1), torch.randn(1, 16, 8, 8, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        wanted = F.conv3d(x, conv.weight, conv.bias, padding=1)
        with torch.no_grad():
            assert (conv(x) - wanted).abs().max() < 1e-5
            assert (conv(x.to(memory_format=torch.channels_last_3d)) - wanted).abs().max() < 1e-5


@pytest.mark.slow
def test_compiled_blocks_give_the_same_output_and_gradients():
    net = torch.nn.ModuleList([Block(8, 16, 32, volume=True)])
    x, temb = torch.randn(1, 8, 4, 8, 8), torch.randn(1, 32)
    results = []
    for _ in range(2):
        y = net[0](x, temb)
        y.square().mean().backward()
        results.append([y.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)])
        net.zero_grad()
        compile_blocks(net, Block)
    assert all(error(a, b) < 1e-4 for a, b in zip(*results, strict=True))
