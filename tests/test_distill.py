"""A student's one step goes where its teacher's many go; its weights are sampled as they say and no other way."""
import json
import shutil

import numpy as np
import pytest
import torch

import beyond.distill
import sample
from beyond.distill import Config, Teacher, distill_loss, one_for_many
from data import cases
from diffusion import alpha_bar, ddim_sample, ddim_step, times
from support.sampling import how_to_sample
from support.weights import load_stages
from unet3d import UNet3D

MEAN, SPREAD = 0.3, 0.5
TINY = ["--preset", "demo", "--device", "cpu", "--steps", "2", "--batch", "2", "--micro", "2", "--workers", "0",
        "--holdout", "0", "--no-amp"]


@pytest.fixture
def chests(phantoms, tmp_path):
    """The phantoms with text as the `model` reads it, (32,16)."""
    folder = tmp_path / "chests"
    for i, case in enumerate(cases(phantoms)):
        shutil.copytree(case, folder / case.name)
        np.save(folder / case.name / "text.npy", np.random.default_rng(i).normal(size=(32, 16)).astype(np.float16))
    return folder


def exact(xt, t):
    """E[x_0 | x_t] of data N(MEAN, SPREAD^2): what a perfect network says."""
    abar = alpha_bar(t).to(xt.dtype)
    gain = abar.sqrt() * SPREAD**2 / (abar * SPREAD**2 + 1 - abar)
    return MEAN + gain * (xt - abar.sqrt() * MEAN)


def arrives(xt, t, s):
    """Where the probability flow of N(MEAN, SPREAD^2) leads from t to s."""
    (a, b), (c, d) = ((abar.sqrt(), (abar * SPREAD**2 + 1 - abar).sqrt()) for abar in map(alpha_bar, (t, s)))
    return c * MEAN + (xt - a * MEAN) * d / b


@pytest.mark.parametrize("each", [1, 2, 3, 64])
def test_one_step_of_the_student_ends_where_the_teachers_end(each):
    xt = torch.randn(3, 4, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, s = torch.tensor([1.0, 0.75, 0.25]).double(), torch.tensor([0.75, 0.5, 0.0]).double()
    target, x = one_for_many(exact, xt, t, s, each), xt
    for i in range(each):
        before, after = (t + (s - t) * (i + k) / each for k in (0, 1))
        x = ddim_step(x, exact(x, before), before, after)
    assert (ddim_step(xt, target, t, s) - x)[:2].abs().max() < 1e-12
    if each == 1:
        assert (target - exact(xt, t)).abs().max() < 1e-12               # nothing to learn
    away = (ddim_step(xt, target, t, s) - arrives(xt, t, s))[:2].abs().max()
    assert away < 0.15 / each


def test_a_students_sample_is_its_teachers():
    """With a student that says just what it is taught, 4 steps are the teacher's 12."""
    noise = torch.randn(2, 4, 4, 4, 4, generator=torch.Generator().manual_seed(1)) / 2       # no estimate is clamped

    def student(xt, t):
        return one_for_many(exact, xt, t, (t - 0.25).clamp(min=0), 3)

    assert (ddim_sample(student, noise, times(4)) - ddim_sample(exact, noise, times(12))).abs().max() < 1e-5


def test_channels_that_are_held_are_taught_and_seen_as_held():
    """They cost nothing, and steps of teacher and student see them."""
    x0, eps = torch.rand(2, 4, 4, 4, 4), torch.randn(2, 4, 4, 4, 4)
    given, cfg, seen = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0]]).bool(), Config(calls=4, each=3), []

    def denoise(xt, t):
        seen.append((xt, t))
        return torch.zeros_like(xt)

    value = distill_loss(cfg, denoise, denoise, x0, torch.tensor([0.9, 0.1]), eps, given, True)
    assert value < 1e-12                                 # both say nothing, and what is held is not asked
    assert [t.tolist() for _, t in seen] == [pytest.approx(t, abs=1e-6) for t in
                                             ([0.25, 1], [0.5 / 3, 2.75 / 3], [0.25 / 3, 2.5 / 3], [0.25, 1])]
    assert all(torch.equal(xt[0, 2], x0[0, 2]) and not torch.equal(xt[1, 2], x0[1, 2]) for xt, _ in seen)
    learned = distill_loss(Config(calls=4, each=0), denoise, None, x0, torch.tensor([0.9, 0.1]), eps, given, False)
    free = ~given[..., None, None, None].expand_as(x0)
    assert learned == pytest.approx((x0[free]**2).sum().item() / x0.numel())


def test_guidance_is_taught_within_its_interval_to_samples_with_text(model, tmp_path):
    (model / "low/sampling.json").write_text(json.dumps(dict(guidance=3.0, interval=[0.5, 1.0])))
    try:
        teacher = Teacher(Config(teacher=str(model), calls=4, each=2))
    finally:
        (model / "low/sampling.json").write_text(json.dumps(dict(low_steps=50, guidance=2.0)))
    x, text, t = torch.randn(3, 4, 8, 8, 8), torch.randn(3, 32, 16), torch.tensor([0.9, 0.9, 0.2])
    null = torch.tensor([False, True, False])
    got = teacher.guided(text, null)(x, t)
    with torch.no_grad():
        told, untold = teacher.net(x, t, text), teacher.net(x, t, None)
    wanted = torch.stack([untold[0] + 3 * (told[0] - untold[0]), untold[1], told[2]]).clamp(-1, 1)
    assert (got - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("kind, more", [
    ("low", []), pytest.param("sr", ["--crop", "16,16,16"], marks=pytest.mark.slow)])
def test_a_student_is_trained_goes_on_and_is_sampled_as_it_says(chests, model, tmp_path, fails, kind, more):
    command = [*TINY, "--kind", kind, "--teacher", model, "--data", chests, "--calls", 4, *more]
    for steps in (1, 2):
        beyond.distill.main([*map(str, command), "--out", str(tmp_path / "student" / kind), "--steps", str(steps)])
    stages = load_stages(model, UNet3D) if kind == "sr" else {}
    student = load_stages(tmp_path / "student", UNet3D)[kind] if kind == "low" else None
    if kind == "sr":
        (tmp_path / "student/low").symlink_to(model / "low")
        student = load_stages(tmp_path / "student", UNet3D)[kind]
    net, about = student
    assert about["distilled"] == dict(times=[1.0, 0.75, 0.5, 0.25], teacher=str(model)) and about["step"] == 2
    assert how_to_sample({kind: student})[f"{kind}_steps"] == 4
    before = (stages or load_stages(model, UNet3D))[kind][0].state_dict()
    assert any(not torch.equal(v, before[k]) for k, v in net.state_dict().items())

    asks = ["--model", tmp_path / "student", "--out", tmp_path / "out", "--device", "cpu", "--prompt", "Nothing.",
            "--text", model / "text"]
    if kind == "low":
        sample.main([*map(str, asks), "--stop-at-low"])
        assert json.loads((tmp_path / "out/prompt/sample.json").read_text())["sampling"]["guidance"] == 1
        for wrong in (["--plain"], ["--low-steps", 5], ["--guidance", 2], ["--solver", "dpm"]):
            code, err = fails(sample.main, *asks, "--stop-at-low", "--overwrite", *wrong)
            assert code == 2 and f"its teacher, {model}" in err and wrong[0] in err and err.count("\n") == 1
    else:
        sample.main([*map(str, asks), "--low-steps", "2"])
        code, err = fails(sample.main, *asks, "--low-steps", 2, "--sr-steps", 5, "--overwrite")
        assert code == 2 and f"its teacher, {model}" in err and "--sr-steps 5" in err


def test_what_cannot_be_taught_is_refused(chests, phantoms, model, tmp_path, fails):
    command = [*TINY, "--data", chests, "--out", tmp_path / "no"]
    for wrong, words in ((["--teacher", tmp_path], "no such|neither"),
                         (["--teacher", model, "--kind", "hr"], "low and sr"),
                         (["--teacher", model, "--calls", 0], "--calls 0"),
                         (["--teacher", model, "--data", phantoms], "(192, 16)")):
        code, err = fails(beyond.distill.main, *command, *wrong)
        assert code == 2 and err.count("\n") == 1 and any(w in err for w in words.split("|")), err
    beyond.distill.main([*map(str, TINY), "--data", str(chests), "--teacher", str(model), "--out",
                         str(tmp_path / "student/low"), "--steps", "1"])
    code, err = fails(beyond.distill.main, *command, "--teacher", tmp_path / "student", "--calls", 4)
    assert code == 2 and "8 steps of a teacher that is itself a student, of 4" in err
