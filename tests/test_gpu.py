"""What only a GPU can tell: the same numbers as on the CPU, in float32, in bf16 and compiled. Skipped where there is
none."""
import csv

import pytest
import torch

import beyond.train_low
import beyond.train_sr
import golden
from diffusion import ddim_sample, guided, times
from support.fast import compile_blocks, recompute
from support.slabs import by_slabs
from unet3d import Block, Round, UNet3D

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def error(a, b):
    return (a.cpu() - b).abs().max().item()


@pytest.mark.parametrize("name", ["low", "sr"])
@pytest.mark.parametrize("compiled", [False, True])
def test_outputs_are_the_originals(name, compiled):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    z, net = golden.load(name), golden.network(name).cuda()
    if compiled:
        compile_blocks(net, Block)
    x, t, context = z["x"].cuda(), z["t"].cuda() / 1000, z["cond"].cuda() if name == "low" else None
    with torch.no_grad():
        assert error(net(x, t, context)[golden.EVERY], z["out_eval"]) < 1e-4
        with torch.autocast("cuda", torch.bfloat16):
            y = net(x, t, context).cpu()[golden.EVERY]
        if not compiled:
            by_slabs(net, 5, Block)
            assert error(net(x, t, context)[golden.EVERY], z["out_eval"]) < 1e-4
    assert (y - z["out_eval"]).square().mean().sqrt() < 0.03 * z["out_eval"].std()


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_the_cpu(compiled):
    grads = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        net = UNet3D(16, levels=2, heads=2, context_dim=16, tokens=5).to(device)
        x, t, context = torch.randn(1, 4, 8, 16, 16), torch.tensor([0.5]), torch.randn(1, 5, 16)
        if device == "cuda" and compiled:
            compile_blocks(net, Block)
        else:
            recompute(net, "norms", Block, (Round,))
        net(x.to(device), t.to(device), context.to(device)).square().mean().backward()
        grads.append({k: p.grad.cpu() for k, p in net.named_parameters() if p.grad is not None})
    for k, g in grads[0].items():
        assert (g - grads[1][k]).norm() < 2e-2 * g.norm() + 1e-5, k


def test_guidance_in_one_batch_is_guidance_in_two():
    net, noise, context = golden.network("low"), torch.randn(1, 4, 4, 8, 8), torch.randn(1, 192, 16)
    want = ddim_sample(guided(net, context, 2.0), noise, times(4))
    assert error(ddim_sample(guided(net.cuda(), context.cuda(), 2.0), noise.cuda(), times(4)), want) < 5e-3


@pytest.mark.parametrize("how", [["--compile"], ["--no-compile", "--checkpointing", "norms"],
                                 ["--no-compile", "--checkpointing", "blocks"]])
@pytest.mark.parametrize("trainer, more", [(beyond.train_low, ["--warm-up", "2"]),
                                           (beyond.train_sr, ["--crop", "16,16,16"])])
def test_both_stages_train_stop_and_go_on(phantoms, tmp_path, trainer, more, how):
    """Those with tricks, whose loop is the method's."""
    common = ["--preset", "demo", "--device", "cuda", "--dim", "8", "--levels", "2", "--heads", "1", "--batch", "4",
              "--micro", "2", "--workers", "1", "--holdout", "1", "--log-every", "1", "--ema-start", "3",
              "--data", str(phantoms), "--out", str(tmp_path / "run"), *more, *how]
    rows = []
    for steps in (3, 5):
        trainer.main([*common, "--steps", str(steps)])
        before, rows = rows, list(csv.DictReader(open(tmp_path / "run/loss.csv")))
    assert rows[:3] == before                            # to the hundredth of a second: they were not made anew
    assert [int(r["step"]) for r in rows] == [1, 2, 3, 4, 5] and all(0 < float(r["loss"]) < 10 for r in rows)
    assert list((tmp_path / "run").glob("samples_*.png"))
