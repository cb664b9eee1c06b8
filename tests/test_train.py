"""Training: it learns, resumes to the bit, and does not depend on the number of processes."""
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import train_low
import train_sr
from data import Cases, cases
from diffusion import ddim_sample, guided, q_sample, times
from support import runs
from support.cli import exits
from support.options import parse
from support.weights import read_own
from train_sr import augment_low
from unet3d import UNet3D

ROOT = Path(__file__).parent.parent
TINY = ["--preset", "demo", "--device", "cpu", "--dim", "8", "--levels", "2", "--heads", "1", "--batch", "4",
        "--micro", "2", "--workers", "0", "--holdout", "0", "--log-every", "1", "--ema-start", "3"]   # no pictures
CROP = ["--crop", "16,16,16"]
TRICKY = {"--pooled": [], "--no-pooled": [], "--windows": [0.4], "--given": [0.5], "--patch": [2], "--late": [0.5],
          "--cool": [1], "--bullae": [3], "--warm-up": [9]}
TRAINERS = [(train_low, "low"), (train_sr, "sr")]
ALONE = runs.Machine(torch.device("cpu"), 0, 1)


def weights(out):
    return torch.load(out / "last.pt", weights_only=True)


def same(a, b):
    return all(torch.equal(a[part][k], b[part][k]) for part in ("net", "ema") for k in a[part])


def exported(out, kind):
    return read_own(out / f"{kind}.safetensors", kind, UNet3D)


def rows(out):
    return list(csv.DictReader(open(out / "loss.csv")))


def torchrun(script, *args, n=2, timeout=300):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", *script, *args]
    return subprocess.run(list(map(str, command)), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=timeout)


def low(phantoms, out, *more):
    train_low.main([*TINY, "--data", str(phantoms), "--out", str(out), *map(str, more)])


def sr(phantoms, out, *more):
    train_sr.main([*TINY, *CROP, "--data", str(phantoms), "--out", str(out), *map(str, more)])


def test_seed_and_sample_each_change_the_noise():
    def drawn(seed, k):
        return torch.cat([x.flatten() for x in train_low.draw(torch.tensor([k]), (1, 2, 2, 2), "cpu", seed)])

    numbers = [(seed, k) for seed in (0, 1, 2, 2**31) for k in (0, 1, 2, 2_560_000)]
    assert len({tuple(drawn(*n).tolist()) for n in numbers}) == len(numbers)
    both, alone = train_low.draw(torch.tensor([7, 8]), (1, 2, 2, 2), "cpu", 3), drawn(3, 8)
    assert torch.equal(torch.cat([x[1:].flatten() for x in both]), alone)  # whoever is beside it


@pytest.mark.parametrize("spoil", [lambda b: b.replace(b",", b";"), lambda b: b.replace(b"\n", b",,\n"),
                                   lambda b: b"\xff\xfe" + b.decode().encode("utf-16-le"), lambda b: b[:-9] + b"\n"])
def test_a_log_that_a_spreadsheet_saved_is_set_aside(tmp_path, capsys, spoil):
    log = runs.Log(tmp_path / "loss.csv")
    for step in (1, 2):
        log.add(step, 0.5, 0.1)
    log.write()
    spoiled = spoil(log.path.read_bytes())
    log.path.write_bytes(spoiled)
    for n in (1, 2):                                     # and again, under another name
        log.add(3, 0.4, 0.1)
        log.write()
        assert (tmp_path / f"loss.unread{n}.csv").read_bytes() == spoiled
        assert [row["step"] for row in rows(tmp_path)] == ["3"]
        assert f"loss.unread{n}.csv" in capsys.readouterr().err
        log.path.write_bytes(spoiled)


def test_the_validation_loss_comes_to_a_row_that_was_written_before(tmp_path):
    log = runs.Log(tmp_path / "loss.csv")
    for step in (1, 2):
        log.add(step, 0.5, 0.1)
    log.write()
    log.validated(0.25)
    log.add(3, 0.4, 0.1)
    log.write()
    assert [(row["step"], row["validation"]) for row in rows(tmp_path)] == [("1", ""), ("2", "0.250000"), ("3", "")]


# --- it goes on where it stopped, whoever runs it ---

def test_resume_is_bit_exact_at_odd_places(phantoms, tmp_path):
    low(phantoms, tmp_path / "whole", "--steps", 7, "--save-every", 100)
    for until in (1, 3, 4, 7):                                           # 5 cases, 4 a step: within and across epochs
        low(phantoms, tmp_path / "parts", "--steps", until, "--save-every", 2)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    whole, parts = ([(r["step"], r["loss"]) for r in rows(tmp_path / out)] for out in ("whole", "parts"))
    assert whole == parts and len(parts) == 7


@pytest.mark.slow
def test_two_processes_match_one_and_resume_to_the_bit(phantoms, tmp_path):
    common = [*TINY, "--data", phantoms, "--no-amp", "--checkpointing", "blocks"]
    train_low.main([*map(str, common), "--out", str(tmp_path / "one"), "--steps", "5"])
    for out, steps, *more in (("whole", 5), ("zero", 2, "--zero"), ("zero", 5, "--zero")):
        done = torchrun(["train_low.py"], *common, "--out", tmp_path / out, "--steps", steps, *more)
        assert done.returncode == 0, done.stderr
    whole, zero = weights(tmp_path / "whole"), weights(tmp_path / "zero")
    assert same(whole, zero)                 # the optimizer's state in shares, put together and taken apart again
    states = whole["opt"]["state"], zero["opt"]["state"]
    assert states[0].keys() == states[1].keys()          # so that either goes on from the other's
    assert all(torch.equal(states[0][k][name], states[1][k][name]) for k in states[0] for name in states[0][k])

    one, two = (rows(tmp_path / out) for out in ("one", "whole"))
    assert len(one) == 5
    for a, b in zip(one, two):       # Adam blows up roundings in weights whose gradient is nothing, not in these
        for column in ("loss", "gradient_norm"):
            assert float(a[column]) == pytest.approx(float(b[column]), rel=2e-3)


@pytest.mark.slow
def test_two_processes_train_stage_2(phantoms, tmp_path):
    done = torchrun(["train_sr.py"], *TINY, *CROP, "--data", phantoms, "--out", tmp_path / "sr", "--steps", 2)
    assert done.returncode == 0, done.stderr
    net, about = exported(tmp_path / "sr", "sr")
    assert about["grid"] == 32 and net.args["in_channels"] == 8


@pytest.mark.slow
def test_a_signal_stops_after_a_step_and_the_same_command_goes_on(phantoms, tmp_path):
    command = [sys.executable, str(ROOT / "train_low.py"), *TINY, "--data", str(phantoms), "--save-every", "100000"]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "a"), "--steps", "100000"], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "a/lock").exists() and process.poll() is None:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped at step" in out, err
    step = weights(tmp_path / "a")["step"]
    for out in "ab":         # processes like the first: the tests before may have left other settings in this one
        subprocess.run([*command, "--out", str(tmp_path / out), "--steps", str(step + 1)], cwd=ROOT, check=True,
                       timeout=120)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_a_run_goes_on_with_the_cases_it_began_with(phantoms, tmp_path, fails):
    for case in cases(phantoms)[:4]:
        os.symlink(case, tmp_path / case.name)
    low(tmp_path, tmp_path / "run", "--steps", 1)
    before = (tmp_path / "run/last.pt").read_bytes()
    os.symlink(cases(phantoms)[4], tmp_path / "phantom_9")               # the order of samples would change
    code, err = fails(train_low.main, *TINY, "--data", tmp_path, "--out", tmp_path / "run", "--steps", 2)
    assert code == 2 and "5 cases to train on, which differ in cases" in err
    code, err = fails(train_low.main, *TINY, "--data", tmp_path, "--out", tmp_path / "run", "--holdout", 1)
    assert code == 2 and "holdout 0 -> 1" in err
    assert (tmp_path / "run/last.pt").read_bytes() == before
    (tmp_path / "phantom_9").unlink()
    low(tmp_path, tmp_path / "run", "--steps", 2)
    assert weights(tmp_path / "run")["step"] == 2

    (tmp_path / "run/low.safetensors").unlink()              # as if killed between the last checkpoint and this
    low(tmp_path, tmp_path / "run", "--steps", 2)
    assert exported(tmp_path / "run", "low")


def test_a_damaged_checkpoint_falls_back_to_the_one_before(phantoms, tmp_path, capsys, fails):
    low(phantoms, tmp_path / "a", "--steps", 2, "--save-every", 1)
    low(phantoms, tmp_path / "b", "--steps", 3)
    raw = (tmp_path / "a/last.pt").read_bytes()
    (tmp_path / "a/last.pt").write_bytes(raw[:len(raw) // 2])
    low(phantoms, tmp_path / "a", "--steps", 3)
    assert "trying the one before" in capsys.readouterr().err
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))

    (tmp_path / "a/last.pt").write_bytes(b"junk")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "a/previous.pt")  # somebody else's
    for there in ("last.pt", "previous.pt"):     # both; then the older alone, as a kill between two renames leaves it
        code, err = fails(train_low.main, *TINY, "--data", phantoms, "--out", tmp_path / "a", "--steps", 4)
        assert code == 2 and "no checkpoint is readable" in err
        (tmp_path / "a" / there).unlink()


def test_a_run_begins_from_the_weights_of_another(phantoms, tmp_path, fails):
    first = tmp_path / "a/low.safetensors"
    low(phantoms, tmp_path / "a", "--steps", 2)
    low(phantoms, tmp_path / "b", "--steps", 1, "--init", first, "--lr", 0)
    (a, _), (b, about) = (exported(tmp_path / out, "low") for out in "ab")
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert about["provenance"]["config"]["init"] == str(first)
    first.rename(tmp_path / "moved.safetensors")
    low(phantoms, tmp_path / "b", "--steps", 2, "--init", first, "--lr", 0)      # a run that has begun needs it no more
    (tmp_path / "moved.safetensors").rename(first)

    for name, about in (("list", "[]"), ("bare", '{"kind": "low"}')):
        save_file({"x": torch.zeros(1)}, tmp_path / name, metadata={"medsyn": about})
    save_file({"x": torch.zeros(1)}, tmp_path / "others")
    for name, more, words in (("none", [], "not readable"), ("list", [], "no network of this project"),
                              ("bare", [], "no network of this project"), ("others", [], "kind None"),
                              ("a/low.safetensors", ["--dim", 16], "'dim': 8")):
        args = [*TINY, "--data", phantoms, "--out", tmp_path / "c", "--init", tmp_path / name, *more]
        code, err = fails(train_low.main, *args)
        assert code == 2 and words in err and err.count("\n") == 1, err


# --- it learns ---

@pytest.mark.slow
def test_160_steps_on_one_case_give_that_case_back(phantoms, tmp_path):
    one = tmp_path / "data"
    one.mkdir()
    os.symlink(cases(phantoms)[0], one / "only")
    low(one, tmp_path / "run", "--levels", 1, "--lr", 3e-3, "--batch", 2, "--steps", 160,
        "--ema-start", 130)
    losses = [float(r["loss"]) for r in rows(tmp_path / "run")]
    assert sum(losses[-20:]) < sum(losses[:20]) / 10
    net, about = exported(tmp_path / "run", "low")
    assert about["step"] == 160 and about["provenance"]["cases"] == 1
    _, x0, text = Cases(cases(one), 0)[0]
    noise = torch.randn(1, *x0.shape, generator=torch.Generator().manual_seed(5))
    made = ddim_sample(guided(net.eval(), text[None], 1), noise, times(20))
    assert (made - x0).square().mean() < 0.01 < x0.var() / 10


@pytest.mark.slow
def test_the_learning_rate_is_constant(phantoms, tmp_path):
    low(phantoms, tmp_path, "--steps", 2, "--lr", 1e-3)
    assert weights(tmp_path)["opt"]["param_groups"][0]["lr"] == 1e-3
    assert {train_low.Config(steps=9).rate(step) for step in range(9)} == {1e-4}     # sec. 4.6


def test_the_running_average_remembers_no_gradients(phantoms, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train_low, "export", lambda path, cfg, ema, *rest: seen.extend(ema.parameters()))
    low(phantoms, tmp_path, "--steps", 5)
    assert seen and not any(p.requires_grad or p.grad_fn for p in seen)


def test_a_gradient_that_is_not_finite_leaves_the_checkpoint(phantoms, tmp_path, monkeypatch, fails):
    low(phantoms, tmp_path / "a", "--steps", 2)
    before = weights(tmp_path / "a")
    monkeypatch.setattr(train_low, "loss", lambda denoise, x0, t, eps: denoise(x0, t).mean() * float("nan"))
    code, err = fails(train_low.main, *TINY, "--data", phantoms, "--out", tmp_path / "a", "--steps", 4)
    assert code == 1 and "not finite" in err and same(before, weights(tmp_path / "a"))


def test_the_text_is_dropped_as_often_as_asked():
    x0, text, heard = torch.zeros(400, 4, 1, 1, 1), torch.zeros(400, 1, 1), []

    def net(xt, t, context, drop):
        heard.append(drop)
        return xt
    for share in (0.0, 0.25, 1.0):
        train_low.low_loss(train_low.Config(drop=share), net, (torch.arange(400), x0, text))
    never, some, always = heard
    assert not never.any() and 0.2 < some.float().mean() < 0.3 and always.all()


def test_low_noise_takes_the_share_that_it_is_told_from_the_low_resolution_volume():
    low, eps = torch.randn(2, 2, 4, 2, 4, 4)
    made = augment_low(low, torch.tensor([0.0, 0.4]), eps)
    assert torch.equal(made[0], low[0]) and (made[1] - (0.6 * low[1] + 0.4 * eps[1])).abs().max() < 1e-6


def test_stage_2_trains_on_low_beside_the_noised_crop():
    x0, low, seen = torch.randn(3, 4, 4, 4, 4), torch.randn(3, 4, 4, 4, 4), []
    keys = torch.arange(3)
    value = train_sr.sr_loss(train_sr.Config(augment=0), lambda x, t: seen.append((x, t)) or x0 - 0.1, (keys, x0, low))
    t, _, eps = train_low.draw(keys, (8, 4, 4, 4), "cpu", 0)
    assert value.item() == pytest.approx(0.01, rel=1e-4) and torch.equal(seen[0][1], t)
    assert torch.equal(seen[0][0], torch.cat([low, q_sample(x0, t, eps[:, :4])], dim=1))


def test_the_low_resolution_input_is_as_noisy_as_asked():
    low, seen = torch.full((8, 4, 4, 4, 4), 0.5), []
    for most in (0, 0.1):
        train_sr.sr_loss(train_sr.Config(augment=most), lambda x, t: seen.append(x[:, :4]) or x[:, 4:],
                         (torch.arange(8), low, low))
    share = 1 - seen[1].mean((1, 2, 3, 4)) / 0.5             # of the value, lost: a, but for the mean of 256 noises
    assert torch.equal(seen[0], low) and (share < 0.13).all() and share.max() > 0.05
    assert (seen[1].std((1, 2, 3, 4)) < 0.12).all()


def test_validation_has_the_same_noise_on_the_low_resolution_volume_whatever_training_has(phantoms):
    crops = Cases(cases(phantoms)[:1], 0, (8, 8, 8))
    values = [train_low.validate(train_sr.Config(augment=most, amp=False), lambda x, t: x[:, :4], crops,
                                 train_sr.sr_loss, ALONE) for most in (0.0, 0.4, 1.0)]
    assert values[0] == values[1] == values[2]


# --- what goes wrong in mid-run ---

@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error, code, words", [(EOFError("too short"), 1, "{case}: too short; a case must be whole"),
                                                (KeyError("a defect"), 1, "KeyError: 'a defect'")])
def test_an_error_while_cases_are_read_ends_a_run(phantoms, tmp_path, monkeypatch, fails, workers, error, code, words):
    bad = cases(phantoms)[2]

    def item(self, k, case):
        if case == bad:
            raise error
        return read(self, k, case)

    read = Cases.item
    monkeypatch.setattr(Cases, "item", item)
    began = time.time()
    found, said = fails(train_low.main, *TINY, "--workers", workers, "--data", phantoms, "--out", tmp_path / "low",
                        "--steps", 9)
    line = [x for x in said.splitlines() if x.startswith("error:")]
    assert found == code and len(line) == 1 and words.format(case=bad) in line[0] and len(line[0]) < 600
    assert time.time() - began < 60                      # it did hang for ever


def test_the_traceback_of_a_defect_is_in_the_file_that_its_line_names(fails):
    def main(_):
        with exits():
            {}["nothing"]

    code, said = fails(main)
    report = Path(re.search(r"please report it with (\S+)", said)[1])
    assert code == 1 and said.count("\n") == 1 and '{}["nothing"]' in report.read_text()
    report.unlink()


def test_a_disk_without_locks_is_warned_of(phantoms, tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(runs.fcntl, "flock", flock)
    low(phantoms, tmp_path / "low", "--steps", 1)
    assert "knows no locks" in capsys.readouterr().err and weights(tmp_path / "low")["step"] == 1


@pytest.mark.slow
def test_an_error_on_one_of_two_processes_ends_both(phantoms, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(phantoms, data, ignore=shutil.ignore_patterns("case.json"))      # no hashes: found while training
    bad = cases(data)[2] / "vessel.npy"
    bad.write_bytes(bad.read_bytes()[:9000])             # its header is whole
    done = torchrun(["train_sr.py"], *TINY, *CROP, "--data", data, "--out", tmp_path / "sr", "--steps", 99,
                    "--workers", 1, timeout=60)
    assert done.returncode == 1 and f"error: RuntimeError: {bad.parent}: " in done.stderr


@pytest.mark.slow
def test_processes_that_read_different_checkpoints_refuse_to_go_on(phantoms, tmp_path):
    for name, steps in (("a", 1), ("b", 2)):
        low(phantoms, tmp_path / name, "--steps", steps)
    script = tmp_path / "start.py"
    script.write_text(f"""import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train_low
train_low.main([*sys.argv[1:], "--out", {str(tmp_path)!r} + "/" + "ab"[int(os.environ["RANK"])]])""")
    done = torchrun([script], *TINY, "--data", phantoms, "--steps", 3)
    assert done.returncode == 1 and "the processes read different checkpoints, of steps 1, 2" in done.stderr


# --- the command line ---

@pytest.mark.parametrize("kind, name", TRAINERS)
def test_every_preset_is_a_configuration(kind, name):
    assert list(kind.Config.presets) == ["paper", "demo"]
    for preset in kind.Config.presets:
        cfg = parse(kind.Config, "", ["--preset", preset, "--device", "cpu"])
        assert cfg.preset == preset and cfg.batch % cfg.micro == 0
        if kind is train_sr:
            D, H, W = map(int, cfg.crop.split(","))
            depth, plane = cfg.multiples()
            assert D % depth == H % plane == W % plane == 0


def test_the_paper_preset_is_the_papers():
    low, sr = (parse(kind.Config, "", ["--preset", "paper", "--device", "cpu"]) for kind, _ in TRAINERS)
    assert (low.steps, low.batch, low.lr, low.dim, low.heads, low.levels) == (40_000, 64, 1e-4, 160, 8, 4)
    assert (sr.steps, sr.batch, sr.lr, sr.dim, sr.heads, sr.levels, sr.augment) == (40_000, 32, 1e-4, 56, 4, 4, 0.4)


@pytest.mark.parametrize("args, words", [
    (["--batch", "3"], "multiple"), (["--lr", "nan"], "--lr nan"), (["--preset", "huge"], "presets are paper, demo"),
    (["--steps", "0"], "--steps 0"), (["--seed", 2**32], "--seed 4294967296"), (["--ema", "1.5"], "at most 1"),
    (["--clip", "0"], "--clip 0"), (["--holdout", "-1"], "--holdout -1"), (["--ema-start", "-1"], "--ema-start -1"),
    (["--checkpointing", "all"], "none, norms or blocks"), (["--device", "tpu"], "cuda or cpu"),
    (["--levels", 5], "multiple of 64, or lower --levels"),              # 8^3, halved four times
    pytest.param(["--device", "cuda"], "no GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU"))])
def test_wrong_options_are_one_line_and_code_2(args, words, phantoms, tmp_path, fails):
    code, err = fails(train_low.main, *TINY, "--data", phantoms, "--out", tmp_path, *args)
    assert code == 2 and words in err and err.startswith("error: ") and err.count("\n") == 1, err


@pytest.mark.parametrize("args, words", [
    (["--crop", "16,15,16"], "--crop 16,15,16"), (["--crop", "16,16"], "--crop 16,16"), (["--crop", "a,b,c"], "--crop"),
    (["--crop", "6,16,16"], "edge of 6 voxels"), (["--augment", "1.5"], "at most 1")])
def test_wrong_options_of_stage_2_are_one_line_and_code_2(args, words, phantoms, tmp_path, fails):
    code, err = fails(train_sr.main, *TINY, *CROP, "--data", phantoms, "--out", tmp_path, *args)
    assert code == 2 and words in err and err.count("\n") == 1, err


def test_wrong_folders_are_one_line_and_code_2(phantoms, tmp_path, fails):
    low(phantoms, tmp_path / "a", "--steps", 1)
    for run, data, more, words in ((train_low.main, tmp_path / "none", [], "phantom.py"),
                                   (train_low.main, phantoms, ["--dim", 16], "dim 8 -> 16"),
                                   (train_sr.main, phantoms, CROP, "kind low")):
        code, err = fails(run, *TINY, "--data", data, "--out", tmp_path / "a", *more)
        assert code == 2 and words in err and err.count("\n") == 1, err


def test_cases_that_do_not_fit_are_told_before_training(phantoms, tmp_path, fails):
    for case in cases(phantoms):
        shutil.copytree(case, tmp_path / case.name)
    last, text = tmp_path / case.name, np.load(case / "text.npy")        # the one that is held out
    for harm, words in ((lambda: np.save(last / "text.npy", text[:24]), "of one size"),
                        (lambda: (last / "text.npy").write_bytes(b""), "text.npy: not readable")):
        harm()
        code, err = fails(train_low.main, *TINY, "--data", tmp_path, "--out", tmp_path / "run", "--holdout", 1)
        assert code == 2 and words in err and err.count("\n") == 1, err


@pytest.mark.parametrize("kind, name", TRAINERS)
@pytest.mark.parametrize("option", TRICKY)
def test_an_option_of_a_trick_names_the_trainer_that_has_it(kind, name, option, tmp_path, fails):
    for spelled in {option, option.replace("-", "_").replace("__", "--", 1)}:
        code, err = fails(kind.main, *TINY, "--out", tmp_path / "out", spelled, *TRICKY[option])
        has = "low" if option.removeprefix("--").removeprefix("no-") in ("pooled", "late", "warm-up") else name
        assert code == 2 and f"python -m beyond.train_{has}" in err and err.count("\n") == 1, err
        assert f"--{option.removeprefix('--').removeprefix('no-')}" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind, name", TRAINERS)
def test_a_preset_of_tricks_names_the_trainer_that_has_it(kind, name, tmp_path, fails):
    for preset in ("demo-256", "light"):
        code, err = fails(kind.main, "--preset", preset, "--device", "cpu", "--out", tmp_path / "out")
        assert code == 2 and f"python -m beyond.train_{name}" in err and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind, name", TRAINERS)
def test_an_unknown_or_abbreviated_option_is_one_line(kind, name, fails):
    for option in ("--lear", "--step"):
        code, err = fails(kind.main, *TINY, option, 1)
        assert code == 2 and option in err and "beyond" not in err and err.count("\n") == 1, err


def test_options_are_written_with_hyphens_or_underscores():
    for spelled in (["--log-every", "7"], ["--log_every", "7"], ["--log_every=7"]):
        assert parse(train_low.Config, "", ["--device", "cpu", *spelled]).log_every == 7


# --- how the weights want to be sampled ---

@pytest.mark.slow
def test_each_stage_writes_pictures_and_how_its_weights_want_to_be_sampled(phantoms, tmp_path):
    for train, kind in ((low, "low"), (sr, "sr")):
        train(phantoms, tmp_path / kind, "--steps", 1, "--holdout", 1)
        files = {f.name for f in (tmp_path / kind).iterdir()}
        assert files == {"last.pt", "lock", "loss.csv", "samples_000001.png", "sampling.json", f"{kind}.safetensors"}
        assert float(rows(tmp_path / kind)[-1]["validation"]) > 0
    said = {kind: json.loads((tmp_path / kind / "sampling.json").read_text()) for kind in ("low", "sr")}
    assert said == dict(low=dict(low_steps=50, guidance=2.0), sr=dict(sr_steps=20))
