"""Cases that lack masks or a report: how they are written, checked and trained on."""
import json
import shutil

import nibabel
import numpy as np
import pytest
import torch

import beyond.train_low
import data
import sample
import text_encoder
import train_low
import train_sr
from data import CHANNELS, Cases, cases
from diffusion import loss
from test_train import CROP, TINY


@pytest.fixture(scope="module")
def partial(phantoms, tmp_path_factory):
    """Five phantoms: one without airway, one without vessels and report, three whole."""
    folder = tmp_path_factory.mktemp("partial")
    lacks = [("airway",), ("vessel", "report"), (), (), ()]
    for case, lacking in zip(cases(phantoms), lacks):
        arrays = {c: np.load(case / f"{c}.npy") for c in CHANNELS if c not in lacking}
        report = None if "report" in lacking else (case / "report.txt").read_text()
        data.write_case(folder / case.name, **arrays, report=report, meta=dict(source="phantom"))
        if report:
            np.save(folder / case.name / "text.npy", np.load(case / "text.npy"))
    return folder


def test_a_case_says_what_it_has_and_what_is_missing_is_zero(partial, capsys):
    first, second = cases(partial)[:2]
    assert json.loads((first / "case.json").read_text())["has"] == ["ct", "lobe", "vessel"]
    assert not (first / "airway.npy").exists() and not (second / "report.txt").exists()
    low = np.load(first / "low.npy")
    assert (low[2] == 0).all() and all((low[c] != 0).any() for c in (0, 1, 3))
    data.main(["check", str(partial)])
    said = capsys.readouterr().out
    assert f"{first.name}: sound, no airway" in said and f"{second.name}: sound, no vessel, no report" in said
    assert "1 without airway" in said and "1 without vessel" in said and "1 without report" in said


def test_what_a_case_should_have_is_still_missed(partial, tmp_path, fails):
    shutil.copytree(partial, tmp_path / "d")
    third = cases(tmp_path / "d")[2]
    (third / "airway.npy").unlink()
    code, err = fails(data.main, "check", tmp_path / "d")
    assert code == 2 and "1 of 5 cases are not sound" in err
    code, err = fails(train_sr.main, *TINY, *CROP, "--data", tmp_path / "d", "--out", tmp_path / "o")
    assert code == 2 and "no airway.npy" in err


def test_items_say_what_their_case_has(partial, phantoms):
    folders = cases(partial)
    for crop in (None, (16, 16, 16)):
        dataset = Cases(folders[:2], 0, crop)
        for k in range(2):
            _, x0, other, has = dataset[k]
            first = has.tolist() == [True, True, False, True, True]
            assert first or has.tolist() == [True, True, True, False, False]
            assert (x0[2 if first else 3] == 0).all() and (x0[0] != 0).any()
            assert crop or (other == 0).all() != first
        assert len(Cases(folders[2:], 0, crop)[0]) == 3                 # whole cases: as ever
    same = Cases(cases(phantoms)[2:], 0)[0], Cases(folders[2:], 0)[0]
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*same))


def test_the_loss_is_the_mean_over_what_is_there():
    rng = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(2, 4, 4, 4, 4, generator=rng) for _ in range(2))
    t, present = torch.tensor([0.3, 0.7]), torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0]]).bool()
    x0 = x0.requires_grad_()
    error = (torch.zeros_like(x0) - x0).square()
    expected = torch.stack([error[0, 0], error[0, 1], error[0, 3], error[1, 0]]).mean()
    found = loss(lambda xt, t: torch.zeros_like(xt), x0, t, eps, present)
    assert torch.allclose(found, expected)
    found.backward()
    assert (x0.grad[0, 2] == 0).all() and (x0.grad[1, 1:] == 0).all() and (x0.grad[0, 0] != 0).any()
    whole = loss(lambda xt, t: torch.zeros_like(xt), x0, t, eps, torch.ones(2, 4).bool())
    assert torch.allclose(whole, loss(lambda xt, t: torch.zeros_like(xt), x0, t, eps))


@pytest.mark.slow
def test_both_stages_train_on_them_and_resume_to_the_bit(partial, tmp_path, fails):
    for program, more in ((train_low, []), (train_sr, CROP)):
        states = []
        for out, steps in (("whole", (2,)), ("parts", (1, 2)))[:1 if program is train_sr else 2]:
            out = tmp_path / program.__name__ / out
            for n in steps:
                program.main([*map(str, [*TINY, *more, "--holdout", 1, "--data", partial, "--out", out, "--steps", n])])
            states.append(torch.load(out / "last.pt", weights_only=True)["net"])
        assert all(torch.equal(states[0][k], states[-1][k]) for k in states[0])
    code, err = fails(beyond.train_low.main, *TINY, "--data", partial, "--out", tmp_path / "b")
    assert code == 2 and "lack a mask or a report" in err


@pytest.mark.slow
def test_the_ct_alone_is_trained_and_sampled(partial, tmp_path, fails, airway, phantoms):
    for program, more in ((train_low, []), (train_sr, CROP)):
        program.main([*map(str, [*TINY, *more, "--channels", "ct", "--steps", 1, "--show-every", 1, "--holdout", 1,
                                 "--data", partial, "--out", tmp_path / "m" / program.Config.kind])])
    code, err = fails(train_low.main, *TINY, "--data", partial, "--holdout", 1, "--out", tmp_path / "m/low")
    assert code == 2 and "channels 'ct' -> 'ct,lobe,airway,vessel'" in err
    how = ["--model", tmp_path / "m", "--low-steps", 1, "--sr-steps", 1, "--out", tmp_path / "o"]
    sample.main([*map(str, how)])
    (made,) = (tmp_path / "o").iterdir()
    assert sorted(p.name for p in made.iterdir()) == ["ct.nii.gz", "preview.png", "sample.json"]
    assert nibabel.load(made / "ct.nii.gz").shape == (32, 32, 32)
    for option in (["--airway", airway], ["--agree"], ["--tidy"]):
        code, err = fails(sample.main, *how, "--overwrite", *option)
        assert code == 2 and f"makes ct alone; {option[0]}" in err
    code, err = fails(sample.main, *how, "--overwrite", "--ct", made / "ct.nii.gz")
    assert code == 2 and "something must be left to make" in err
    code, err = fails(train_low.main, *TINY, "--channels", "vessel", "--data", phantoms, "--out", tmp_path / "i",
                      "--init", tmp_path / "m/low/low.safetensors")
    assert code == 2 and "{'channels': 'ct'}" in err
    for channels in ("heart", "airway"):                  # no such one; a case has none
        code, err = fails(train_low.main, *TINY, "--channels", channels, "--data", partial, "--out", tmp_path / "n")
        assert code == 2 and f"--channels {channels}" in err and not (tmp_path / "n").exists()
    code, err = fails(beyond.train_low.main, *TINY, "--channels", "ct", "--data", phantoms, "--out", tmp_path / "n")
    assert code == 2 and "the losses here need all four" in err


def test_a_missing_report_is_the_null_text(partial):
    seen = []

    def net(xt, t, text, null):
        seen.append(null.tolist())
        return torch.zeros_like(xt)

    x0, text = torch.zeros(2, 4, 8, 8, 8), torch.zeros(2, 3, 5)
    has = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
    train_low.low_loss(train_low.Config(drop=0.0), net, [torch.arange(2), x0, text, has])
    assert seen == [[False, True]]


def test_only_reports_that_are_there_are_embedded(partial, tmp_path, monkeypatch):
    shutil.copytree(partial, tmp_path / "d")
    seen = []

    class Encoder:
        width, tokens = 8, 4

        def tokenise(self, texts):
            seen.extend(texts)
            return [torch.zeros(len(texts), 4) for _ in range(3)]

        def hidden(self, *parts):
            return torch.zeros(len(parts[0]), 4, 8)

    monkeypatch.setattr(text_encoder, "load", lambda *a: Encoder())
    monkeypatch.setattr(text_encoder, "identity", lambda e: "x")
    text_encoder.main(["embed", str(tmp_path / "d"), "--model", "x"])
    assert len(seen) == 4 and not (cases(tmp_path / "d")[1] / "text.npy").exists()
