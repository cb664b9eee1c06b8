"""What only a GPU can tell: the same numbers as on the CPU, in float32, in bf16 and compiled. Skipped where there is none."""
import csv

import pytest
import torch

import golden
import train_low
import train_sr
from diffusion import ddim_sample, times
from unet3d import UNet3D

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def error(a, b):
    return (a.cpu() - b).abs().max().item()


@pytest.mark.parametrize("name", ["low", "sr"])
@pytest.mark.parametrize("compiled", [False, True])
def test_outputs_are_the_originals(name, compiled):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    z, net = golden.load(name), golden.network(name).cuda()
    if compiled:
        net.compile_blocks()
    context = z["cond"].cuda() if name == "low" else None
    with torch.no_grad():
        x, t = z["x"].cuda(), z["t"].cuda() / 1000
        assert error(net(x, t, context)[golden.EVERY], z["out_eval"]) < 1e-4
        if not compiled:
            net.slab = 5
            assert error(net(x, t, context)[golden.EVERY], z["out_eval"]) < 1e-4
            net.slab = 0
        with torch.autocast("cuda", torch.bfloat16):
            y = net(x, t, context).cpu()[golden.EVERY]
    assert (y - z["out_eval"]).square().mean().sqrt() < 0.03 * z["out_eval"].std()


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_the_cpu(compiled):
    torch.manual_seed(0)
    net = UNet3D(16, levels=2, heads=2, context_dim=16, tokens=5, checkpointing="norms")
    x, t, context, grads = torch.randn(1, 4, 8, 16, 16), torch.tensor([0.5]), torch.randn(1, 5, 16), []
    for device in ("cpu", "cuda"):
        net.to(device).zero_grad()
        if device == "cuda" and compiled:
            net.compile_blocks()
        net(x.to(device), t.to(device), context.to(device)).square().mean().backward()
        grads.append({k: p.grad.cpu().clone() for k, p in net.named_parameters() if p.grad is not None})
    for k, g in grads[0].items():
        assert (g - grads[1][k]).norm() < 2e-2 * g.norm() + 1e-5, k


def test_guidance_in_one_batch_is_guidance_in_two():
    net, noise, context = golden.network("low"), torch.randn(1, 4, 4, 8, 8), torch.randn(1, 192, 16)
    want = ddim_sample(net, noise, times(4), context, 2.0)
    assert error(ddim_sample(net.cuda(), noise.cuda(), times(4), context.cuda(), 2.0), want) < 5e-3


@pytest.mark.parametrize("how", [["--compile"], ["--no-compile", "--checkpointing", "norms"], ["--no-compile", "--checkpointing", "blocks"]])
@pytest.mark.parametrize("stage, more", [(train_low, ["--warm_up", "2"]), (train_sr, ["--crop", "16,16,16"])])
def test_both_stages_train_stop_and_go_on(phantoms, tmp_path, stage, more, how):
    common = ["--preset", "demo", "--device", "cuda", "--dim", "8", "--levels", "2", "--heads", "1", "--batch", "4", "--micro", "2", "--workers", "1", "--holdout", "1",
              "--log_every", "1", "--ema_start", "3", "--data", str(phantoms), "--out", str(tmp_path / "run"), *more, *how]
    rows = []
    for steps in (3, 5):
        stage.main([*common, "--steps", str(steps)])
        before, rows = rows, list(csv.DictReader(open(tmp_path / "run/loss.csv")))
    assert rows[:3] == before                                            # to the hundredth of a second: they were not made anew
    assert [int(r["step"]) for r in rows] == [1, 2, 3, 4, 5] and all(0 < float(r["loss"]) < 10 for r in rows)
    assert list((tmp_path / "run").glob("samples_*.png"))
