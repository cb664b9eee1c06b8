"""Training: it learns, resumes to the bit, and does not depend on the number of processes."""
import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import train_low
import train_sr
from data import Cases, cases, read_safetensors
from diffusion import ddim_sample, times
from unet3d import TextPool, UNet3D

ROOT = Path(__file__).parent.parent
TINY_SR = ["--preset", "demo", "--device", "cpu", "--dim", "8", "--levels", "2", "--heads", "1", "--batch", "4", "--micro", "2", "--workers", "0",
           "--holdout", "1", "--cool", "0", "--show_every", "1000", "--log_every", "1", "--ema_start", "3"]
TINY = [*TINY_SR, "--warm_up", "0"]


def weights(out, kind="low"):
    return torch.load(out / "last.pt", weights_only=True)


def same(a, b):
    return all(torch.equal(a[part][k], b[part][k]) for part in ("net", "ema") for k in a[part])


def torchrun(script, *args, n=2, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", str(ROOT / script), *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, **options)


def low(phantoms, out, *more):
    train_low.main([*TINY, "--data", str(phantoms), "--out", str(out), *map(str, more)])


def test_resume_is_bit_exact_at_odd_places(phantoms, tmp_path):
    low(phantoms, tmp_path / "whole", "--steps", 7, "--save_every", 100, "--warm_up", 2)
    for until in (1, 3, 4, 7):                                           # 5 cases, 4 a step: within and across epochs
        low(phantoms, tmp_path / "parts", "--steps", until, "--save_every", 2, "--warm_up", 2)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    rows = list(csv.DictReader(open(tmp_path / "parts/loss.csv")))
    whole = list(csv.DictReader(open(tmp_path / "whole/loss.csv")))
    assert [(r["step"], r["loss"]) for r in rows] == [(r["step"], r["loss"]) for r in whole] and len(rows) == 7


def test_two_processes_match_one_and_resume_to_the_bit(phantoms, tmp_path):
    common = [*TINY, "--data", phantoms, "--no-amp", "--checkpointing", "blocks"]
    train_low.main([*map(str, common), "--out", str(tmp_path / "one"), "--steps", "5"])
    for out, steps in (("whole", 5), ("parts", 2), ("parts", 5)):
        done = torchrun("train_low.py", *common, "--out", tmp_path / out, "--steps", steps)
        assert done.returncode == 0, done.stderr
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    for steps in (3, 5):                                                 # the optimizer's state in shares, put together and taken apart again
        done = torchrun("train_low.py", *common, "--out", tmp_path / "zero", "--steps", steps, "--zero")
        assert done.returncode == 0, done.stderr
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "zero"))
    one, two = ([(float(r["loss"]), float(r["gradient_norm"])) for r in csv.DictReader(open(tmp_path / out / "loss.csv"))] for out in ("one", "whole"))
    assert len(one) == 5
    for a, b in zip(one, two):                                           # Adam blows up roundings in weights whose gradient is nothing, not in these
        assert a == pytest.approx(b, rel=2e-3)


def test_two_processes_train_stage_2(phantoms, tmp_path):
    done = torchrun("train_sr.py", *TINY_SR, "--data", phantoms, "--out", tmp_path / "sr", "--steps", 2, "--crop", "16,16,16")
    assert done.returncode == 0, done.stderr
    net, about = exported(tmp_path / "sr", "sr")
    assert about["grid"] == 32 and net.args["in_channels"] == 8


def test_a_light_stage_2_trains_and_loads(phantoms, tmp_path):
    train_sr.main([*TINY_SR, "--data", str(phantoms), "--out", str(tmp_path), "--steps", "2", "--crop", "16,16,16", "--patch", "2"])
    net, _ = exported(tmp_path, "sr")
    assert net.args["patch"] == 2 and net(torch.randn(1, 8, 8, 8, 8), torch.tensor([0.5])).shape == (1, 4, 8, 8, 8)


def test_a_run_on_cubes_begins_from_weights_on_voxels(phantoms, tmp_path, capsys):
    low(phantoms, tmp_path / "a", "--steps", 1)
    small, _ = exported(tmp_path / "a", "low")
    code, err = fails(capsys, *TINY, "--data", phantoms, "--out", tmp_path / "b", "--patch", 2)
    assert code == 2 and "4 voxels" in err
    finer = tmp_path / "finer"                                           # low-resolution volumes of 16^3
    for case in cases(phantoms):
        shutil.copytree(case, finer / case.name)
        np.save(finer / case.name / "low.npy", np.load(case / "low.npy").repeat(2, 1).repeat(2, 2).repeat(2, 3))
    low(finer, tmp_path / "b", "--steps", 1, "--patch", 2, "--init", tmp_path / "a/low.safetensors", "--lr", 0)
    large, _ = exported(tmp_path / "b", "low")
    x, t = torch.randn(1, 4, 8, 8, 8), torch.tensor([0.5])
    with torch.no_grad():
        assert (large(x, t) - F.interpolate(small(F.avg_pool3d(x, 2), t), scale_factor=2)).abs().max() < 1e-2      # both were stored in float16
    code, err = fails(capsys, *TINY, "--data", phantoms, "--out", tmp_path / "c", "--init", tmp_path / "b/low.safetensors")
    assert code == 2 and "'patch': 2" in err


def exported(out, kind):
    state, about = read_safetensors(out / f"{kind}.safetensors")
    assert about["kind"] == kind
    net = UNet3D(**about["args"])
    net.load_state_dict({k: v.float() for k, v in state.items()})
    return net, about


def test_300_steps_on_one_case_give_that_case_back(phantoms, tmp_path):
    one = tmp_path / "data"
    one.mkdir()
    os.symlink(cases(phantoms)[0], one / "only")
    train_low.main(["--preset", "demo", "--device", "cpu", "--dim", "8", "--levels", "1", "--heads", "1", "--lr", "3e-3", "--batch", "2", "--micro", "2", "--workers", "0",
                    "--holdout", "0", "--warm_up", "0", "--data", str(one), "--out", str(tmp_path / "run"), "--steps", "300", "--log_every", "1", "--ema_start", "250"])
    losses = [float(r["loss"]) for r in csv.DictReader(open(tmp_path / "run/loss.csv"))]
    assert sum(losses[-20:]) < sum(losses[:20]) / 10
    net, about = exported(tmp_path / "run", "low")
    assert about["step"] == 300 and about["provenance"]["cases"] == 1
    _, x0, text = Cases(cases(one), 0)[0]
    noise = torch.randn(1, *x0.shape, generator=torch.Generator().manual_seed(5))
    made = ddim_sample(net.eval(), noise, times(20), text[None])
    assert (made - x0).square().mean() < 0.01 < x0.var() / 10


def test_a_signal_stops_after_a_step_and_the_same_command_goes_on(phantoms, tmp_path):
    command = [sys.executable, str(ROOT / "train_low.py"), *TINY, "--data", str(phantoms), "--out", str(tmp_path / "a"), "--save_every", "100000"]
    process = subprocess.Popen([*command, "--steps", "100000"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "a/lock").exists() and process.poll() is None:
        time.sleep(0.1)
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped at step" in out, err
    step = weights(tmp_path / "a")["step"]
    for out in "ab":                                                     # processes like the first: the tests before may have left other settings in this one
        subprocess.run([*command, "--out", str(tmp_path / out), "--steps", str(step + 1)], cwd=ROOT, check=True, timeout=120)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def fails(capsys, *args, run=train_low.main):
    with pytest.raises(SystemExit) as e:
        run(list(map(str, args)))
    return e.value.code, capsys.readouterr().err


def test_wrong_input_is_one_line_and_code_2(phantoms, tmp_path, capsys):
    low(phantoms, tmp_path / "a", "--steps", 1)
    capsys.readouterr()
    for args, words in [(["--data", tmp_path / "none"], "phantom.py"), (["--data", phantoms, "--out", tmp_path / "a", "--dim", "16"], "dim 8 -> 16"),
                        (["--data", phantoms, "--batch", "3"], "multiple"), (["--data", phantoms, "--lr", "nan"], "--lr nan"),
                        (["--data", phantoms, "--preset", "huge"], "presets are paper, demo"), (["--data", phantoms, "--steps", "0"], "--steps 0"),
                        (["--data", phantoms, "--seed", 2**23], "below 2^23"), (["--data", phantoms, "--ema", "1.5"], "at most 1"),
                        *[(["--data", phantoms, "--device", "cuda"], "no GPU")] * (not torch.cuda.is_available()), (["--data", phantoms, "--device", "tpu"], "cuda or cpu")]:
        code, err = fails(capsys, *TINY, *args)
        assert code == 2 and words in err and err.count("\n") == 1, err
    code, err = fails(capsys, *TINY_SR, "--data", phantoms, "--crop", "16,15,16", run=train_sr.main)
    assert code == 2 and "--crop" in err
    code, err = fails(capsys, *TINY_SR, "--data", phantoms, "--augment", "1.5", run=train_sr.main)
    assert code == 2 and "at most 1" in err
    code, err = fails(capsys, *TINY_SR, "--data", phantoms, "--crop", "15,16,16", "--patch", "2", run=train_sr.main)
    assert code == 2 and "D of 2" in err
    code, err = fails(capsys, *TINY_SR, "--data", phantoms, "--out", tmp_path / "a", "--crop", "16,16,16", run=train_sr.main)
    assert code == 2 and "kind low" in err
    code, err = fails(capsys, *TINY, "--data", phantoms, "--levels", 5)
    assert code == 2 and "multiple of 64, or lower --levels" in err     # 8^3, halved four times


def test_a_run_goes_on_with_the_cases_it_began_with(phantoms, tmp_path, capsys):
    for case in cases(phantoms)[:4]:
        os.symlink(case, tmp_path / case.name)
    low(tmp_path, tmp_path / "run", "--steps", 1)
    before = (tmp_path / "run/last.pt").read_bytes()
    os.symlink(cases(phantoms)[4], tmp_path / "phantom_9")               # the last by name: it would be held out, what was held out trained on
    capsys.readouterr()
    code, err = fails(capsys, *TINY, "--data", tmp_path, "--out", tmp_path / "run", "--steps", 2)
    assert code == 2 and "4 cases to train on, which differ in cases" in err and (tmp_path / "run/last.pt").read_bytes() == before
    (tmp_path / "phantom_9").unlink()
    low(tmp_path, tmp_path / "run", "--steps", 2)
    assert weights(tmp_path / "run")["step"] == 2
    (tmp_path / "run/low.safetensors").unlink()                          # as if killed between the last checkpoint and this
    low(tmp_path, tmp_path / "run", "--steps", 2)
    assert exported(tmp_path / "run", "low")


def test_cases_that_do_not_fit_are_told_before_training(phantoms, tmp_path, capsys):
    for case in cases(phantoms):
        shutil.copytree(case, tmp_path / case.name)
    last, text = tmp_path / case.name, np.load(case / "text.npy")
    for harm, words in ((lambda: np.save(last / "text.npy", text[:24]), "of one size"), (lambda: (last / "text.npy").write_bytes(b""), "text.npy: not readable")):
        harm()                                                           # to the one that is held out
        code, err = fails(capsys, *TINY, "--data", tmp_path, "--out", tmp_path / "run", "--steps", 2)
        assert code == 2 and words in err and err.count("\n") == 1, err


def test_a_gradient_that_is_not_finite_leaves_the_checkpoint(phantoms, tmp_path, capsys, monkeypatch):
    low(phantoms, tmp_path / "a", "--steps", 2)
    before = weights(tmp_path / "a")
    monkeypatch.setattr(train_low, "loss", lambda net, x0, *a, **k: net(x0, torch.zeros(len(x0))).mean() * float("nan"))
    code, err = fails(capsys, *TINY, "--data", phantoms, "--out", tmp_path / "a", "--steps", 4)
    assert code == 1 and "not finite" in err and same(before, weights(tmp_path / "a"))


def test_a_damaged_checkpoint_falls_back_to_the_one_before(phantoms, tmp_path, capsys):
    low(phantoms, tmp_path / "a", "--steps", 4, "--save_every", 2)
    low(phantoms, tmp_path / "b", "--steps", 5)
    raw = (tmp_path / "a/last.pt").read_bytes()
    (tmp_path / "a/last.pt").write_bytes(raw[:len(raw) // 2])
    low(phantoms, tmp_path / "a", "--steps", 5)
    assert "trying the one before" in capsys.readouterr().err
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    (tmp_path / "a/last.pt").write_bytes(b"junk")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "a/previous.pt")  # somebody else's
    for there in ("last.pt", "previous.pt"):                             # both; then the older alone, as a kill between two renames leaves it
        code, err = fails(capsys, *TINY, "--data", phantoms, "--out", tmp_path / "a", "--steps", 6)
        assert code == 2 and "no checkpoint is readable" in err
        (tmp_path / "a" / there).unlink()


def test_the_pooled_text_learns_to_say_what_a_chest_looks_like(phantoms):
    dataset, losses = Cases(cases(phantoms), 0), []
    for steps in (1, 250):
        torch.manual_seed(0)
        losses.append(train_low.warm_up(train_low.Config(warm_up=steps, workers=0), TextPool(16, 32), dataset, batch=5))
    x0 = torch.stack([F.adaptive_avg_pool3d(dataset[k][1], 8) for k in range(5)])
    mean_chest = ((x0 - x0.mean(0)) / x0.std(0).clamp(min=0.01)).square().mean()
    assert losses[1] < 0.5 * mean_chest < losses[0]                      # it read whose report it is


class TwoFindings:
    """Text says two bits; the first changes half of the volume by 1, the second the other half by a twentieth. All else is noise."""

    def __len__(self):
        return 1000

    def __getitem__(self, k):
        rng = torch.Generator().manual_seed(k)
        bits = torch.randint(2, (2,), generator=rng)
        x0, text = 0.03 * torch.randn(4, 8, 8, 8, generator=rng), torch.randn(8, 16, generator=rng)
        x0[:, :, :, :4] += bits[0]
        x0[:, :, :, 4:] += 0.05 * bits[1]
        text[:2, :2] += 6 * torch.diag(2.0 * bits - 1)
        return k, x0, text


def test_the_pooled_text_hears_faint_findings_as_loud_ones():
    torch.manual_seed(0)
    pool = TextPool(16, 32)
    train_low.warm_up(train_low.Config(warm_up=100, workers=0), pool, TwoFindings())
    text = torch.stack([TwoFindings()[k][2] for k in range(400)])
    bits = text.diagonal(dim1=1, dim2=2)[:, :2] > 0
    with torch.no_grad():
        code = pool(text)
    apart = [(code[b].mean(0) - code[~b].mean(0)).norm().item() for b in bits.unbind(1)]
    assert apart[1] > 0.5 * apart[0]


def test_a_run_begins_from_the_weights_of_another(phantoms, tmp_path, capsys):
    low(phantoms, tmp_path / "a", "--steps", 2)
    low(phantoms, tmp_path / "b", "--steps", 1, "--init", tmp_path / "a/low.safetensors", "--lr", 0)
    (a, _), (b, about) = (exported(tmp_path / out, "low") for out in "ab")
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items()) and about["provenance"]["config"]["init"]
    (tmp_path / "a/low.safetensors").rename(tmp_path / "moved.safetensors")
    low(phantoms, tmp_path / "b", "--steps", 2, "--init", tmp_path / "a/low.safetensors", "--lr", 0)      # a run that has begun needs it no more
    (tmp_path / "moved.safetensors").rename(tmp_path / "a/low.safetensors")
    for name, about in (("list", "[]"), ("bare", '{"kind": "low"}')):
        save_file({"x": torch.zeros(1)}, tmp_path / name, metadata={"medsyn": about})
    save_file({"x": torch.zeros(1)}, tmp_path / "others")
    capsys.readouterr()
    for args, words in [(["--init", tmp_path / "none"], "not readable"), (["--init", tmp_path / "list"], "no network of this project"), (["--init", tmp_path / "bare"], "no network of this project"),
                        (["--init", tmp_path / "others"], "kind None"), (["--init", tmp_path / "a/low.safetensors", "--dim", 16], "'dim': 8"),
                        (["--init", tmp_path / "a/low.safetensors", "--no-pooled"], "has besides pool.")]:
        code, err = fails(capsys, *TINY, "--data", phantoms, "--out", tmp_path / "c", *args)
        assert code == 2 and words in err and err.count("\n") == 1, err


def test_weights_with_pooled_text_are_not_warmed_up_again(phantoms, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(train_low, "warm_up", lambda cfg, pool, dataset: asked.append(cfg.out))
    low(phantoms, tmp_path / "a", "--steps", 1, "--warm_up", 1)
    low(phantoms, tmp_path / "plain", "--steps", 1, "--no-pooled")
    low(phantoms, tmp_path / "b", "--steps", 1, "--warm_up", 1, "--init", tmp_path / "a/low.safetensors")
    low(phantoms, tmp_path / "c", "--steps", 1, "--warm_up", 1, "--init", tmp_path / "plain/low.safetensors")
    assert asked == [str(tmp_path / "a"), str(tmp_path / "c")]


def test_the_learning_rate_falls_at_the_end(phantoms, tmp_path):
    rate = lambda: torch.load(tmp_path / "last.pt", weights_only=True)["opt"]["param_groups"][0]["lr"]      # of the last update
    low(phantoms, tmp_path, "--steps", 2, "--lr", 1e-3)
    assert rate() == 1e-3
    low(phantoms, tmp_path, "--steps", 4, "--lr", 1e-3, "--cool", 0.5)   # 1, 1, 1, 1/2
    assert rate() == 0.5e-3


@pytest.mark.parametrize("kind", [train_low, train_sr])
def test_every_preset_is_a_configuration(kind):
    for name in kind.Config.presets:
        cfg = train_low.parse(kind.Config, "", ["--preset", name, "--device", "cpu"])
        assert cfg.preset == name and cfg.batch % cfg.micro == 0
        if kind is train_sr:
            D, H, W = map(int, cfg.crop.split(","))
            assert H % (cfg.patch * 2 ** (cfg.levels - 1)) == W % (cfg.patch * 2 ** (cfg.levels - 1)) == D % cfg.patch == 0


def test_windows_count_in_both_stages():
    x0, other = torch.full((2, 2, 4, 4, 4, 4), 0.25)                     # -9 HU
    net = lambda x, *_: x0 - 0.1                                         # 81 HU too low
    keys = torch.arange(2)
    for kind, loss_fn in ((train_low, train_low.low_loss), (train_sr, train_sr.sr_loss)):
        plain, seen = (loss_fn(kind.Config(windows=w), net, (keys, x0, other)).item() for w in (0, 0.5))
        assert plain == pytest.approx(0.01) and plain < seen < 0.5


def test_both_stages_show_given_channels_as_asked():
    x0, other = torch.full((2, 16, 4, 4, 4, 4), 0.25)
    for kind, loss_fn in ((train_low, train_low.low_loss), (train_sr, train_sr.sr_loss)):
        seen = []
        net = lambda x, *_: seen.append(x[:, -4:]) or x0
        for share in (0.0, 1.0):
            loss_fn(kind.Config(given=share), net, (torch.arange(16), x0, other))
        none, all_of_them = ((x == 0.25).all(-1).all(-1).all(-1) for x in seen)
        assert not none.any() and all_of_them.any(0).all() and not all_of_them.all(0).any()
        assert torch.equal(seen[0][~all_of_them], seen[1][~all_of_them])     # the rest of the noise is the same


def test_masks_are_misplaced_lobes_inside_the_lung_and_where_the_ct_is_given_alone():
    masks = torch.full((1, 3, 8, 16, 16), -1.0)
    masks[:, 0, :, 2:14, :8], masks[:, 0, :, 2:14, 8:14] = -0.6, 1.0     # two lobes and a border between them, nothing around
    masks[:, 1, :, :, 10] = masks[:, 2, 3] = 1.0                         # an airway, a vessel
    by = torch.zeros(1, 3, 3, 3, 3)
    assert torch.equal(train_sr.misplace(masks, by), masks)
    by[:, 2] = 1                                                         # what lies one low voxel to the left
    moved = train_sr.misplace(masks, by)
    expected = masks.clone()
    expected[:, 0, :, 2:14, 4:8] = 1.0
    expected[:, 1, :, :, 10], expected[:, 1, :, :, 6] = -1.0, 1.0
    assert torch.equal(moved, expected)

    low, seen = torch.cat([torch.zeros(1, 1, 8, 16, 16), masks], 1).repeat(32, 1, 1, 1, 1), []
    low[:, 3] = masks[:, 1]                                              # a vessel that every displacement moves
    net = lambda x, *_: seen.append(x) or x[:, 4:]
    for share in (0.0, 1.0):
        train_sr.sr_loss(train_sr.Config(given=share, augment=0), net, (torch.arange(32), low, low))
    apart = (seen[1][:, :4] != seen[0][:, :4]).flatten(2).any(2)
    alone = (seen[1][:, 4] == low[:, 0]).flatten(1).all(1)                # the CT was seen without noise
    assert torch.equal(seen[0][:, :4], low) and all(torch.equal(apart[:, c], alone) for c in (1, 2, 3)) and alone.any() and not alone.all() and not apart[:, 0].any()


def test_the_low_resolution_input_is_as_noisy_as_asked():
    low = torch.full((8, 4, 4, 4, 4), 0.5)
    seen = []
    net = lambda x, *_: seen.append(x[:, :4]) or x[:, 4:]
    for most in (0, 0.1):
        train_sr.sr_loss(train_sr.Config(augment=most), net, (torch.arange(8), low, low))
    share = 1 - seen[1].mean((1, 2, 3, 4)) / 0.5                         # of the value, lost: a, but for the mean of 256 noises
    assert torch.equal(seen[0], low) and (share < 0.13).all() and share.max() > 0.05 and (seen[1].std((1, 2, 3, 4)) < 0.12).all()


def test_the_running_average_remembers_no_gradients(phantoms, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train_low, "export", lambda path, cfg, ema, *rest: seen.extend(ema.parameters()))
    low(phantoms, tmp_path, "--steps", 5)
    assert seen and not any(p.requires_grad or p.grad_fn for p in seen)


def test_a_chest_is_trained_on_or_held_out(phantoms, tmp_path):
    for name in ("a", "a_text1", "a_text2", "b", "b_text1", "b_text2"):
        os.symlink(cases(phantoms)[0], tmp_path / name)
    train, held_out = train_low.all_folders(train_low.Config(data=str(tmp_path), holdout=2))
    assert [f.name for f in train] == ["a", "a_text1", "a_text2"] and [f.name for f in held_out] == ["b_text1", "b_text2"]
    for holdout in (4, 9):
        with pytest.raises(ValueError, match="a trainer needs cases"):
            train_low.all_folders(train_low.Config(data=str(tmp_path), holdout=holdout))
