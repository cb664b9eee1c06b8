"""Phantoms: the same by seed, true to their conditions and reports, and the same chest on every grid."""
import itertools
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

import data
import evaluate
import phantom
from phantom import make
from support.checks import faults

GRID = 48
QUIET = dict(effusion="none", consolidation=None, nodules=0)


# --- chests ---

def test_a_seed_is_a_chest():
    a, b, c = make(3, GRID), make(3, GRID), make(4, GRID)
    assert all(np.array_equal(a[n], b[n]) for n in data.CHANNELS)
    assert a["report"] == b["report"] and a["truth"] == b["truth"]
    assert not np.array_equal(a["ct"], c["ct"])


def test_a_seed_is_the_same_chest_on_every_grid():
    coarse, fine = (make(5, grid, effusion="none")["truth"] for grid in (48, 96))
    assert np.allclose(coarse["lobe_ml"], fine["lobe_ml"], rtol=0.06)
    assert coarse["airway_mm3"] == pytest.approx(fine["airway_mm3"], rel=0.2)


def test_an_effusion_is_on_its_side_and_as_large_as_asked():
    for side, other in (("left", "right"), ("right", "left")):
        small, moderate, large = (make(7, GRID, effusion=side, effusion_size=size, nodules=0)["truth"]
                                  for size in ("small", "moderate", "large"))
        assert all(t[f"effusion_{other}_ml"] == 0 for t in (small, moderate, large))
        assert small["effusion_ml"] < 200 < moderate["effusion_ml"] < 700 < large["effusion_ml"]
    made = make(7, GRID, effusion="left", effusion_size="large")
    assert np.argwhere(made["masks"]["effusion"])[:, 2].min() > GRID * 0.5   # W grows towards the patient's left


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_truth_follows_the_conditions(seed):
    normal = make(seed, 64, cardiomegaly=False, bullae=False, **QUIET)["truth"]
    sick = make(seed, 64, cardiomegaly=True, bullae=True, **QUIET)["truth"]
    assert 0.36 < normal["ctr"] < 0.52 < sick["ctr"] < 0.75
    assert normal["laa950_percent"] < 0.3 and 1 < sick["laa950_percent"] < 20
    assert 2.5e4 < normal["airway_mm3"] < 7e4


def test_lobes_lie_where_they_should():
    case = make(9, 64, effusion="none")
    place = {i: np.argwhere(case["lobe"] == i).mean(0) for i in range(1, 6)}     # (D,H,W)
    assert min(place[1][2], place[2][2]) > 32 > max(place[i][2] for i in (3, 4, 5))
    assert place[1][0] > place[2][0] and place[3][0] > place[4][0] and place[3][0] > place[5][0]
    assert place[4][1] > place[5][1] and place[1][1] > place[2][1]               # middle lobe in front of the lower one


def test_conditions_that_do_not_exist_are_named(fails):
    with pytest.raises(ValueError, match="effusion is one of"):
        make(0, 16, effusion="middle")
    with pytest.raises(ValueError, match="unknown condition"):
        make(0, 16, tumour=True)
    code, said = fails(phantom.main, "--n", "0")
    assert code == 2 and "at least 1" in said


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3, 4])
def test_coarse_voxels_are_measured_nearly_as_well(seed):
    case = make(seed, 128, effusion="left", effusion_size="large")
    ct, lobe = case["ct"], case["lobe"]
    fine, coarse = (evaluate.measure_phantom(ct[::k, ::k, ::k], lobe[::k, ::k, ::k]) for k in (1, 4))
    assert coarse["effusion"] == pytest.approx(fine["effusion"], rel=0.15)
    assert coarse["ctr"] == pytest.approx(fine["ctr"], abs=0.05)
    assert coarse["left"] > 0.95 * coarse["effusion"]
    assert abs(coarse["laa"] - fine["laa"]) < 1


# --- reports ---

@pytest.mark.slow
def test_reports_say_what_is_there_in_words_of_their_set():
    for wording in phantom.SENTENCES:
        for seed in range(4):
            text = make(seed, 16, wording, effusion="left", effusion_size="large", cardiomegaly=False, bullae=False,
                        consolidation=None, nodules=0)["report"]
            assert text.startswith("Findings: ") and "\nImpression: " in text
            assert "left" in text and len(text.split()) < 150


def sentences(wording):
    """Every sentence that a wording's templates stand for, blanks unfilled."""
    def spread(template, pattern, options):
        parts = re.split(pattern, template)
        choices = (options(part).split("|") if i % 2 else [part] for i, part in enumerate(parts))
        yield from map("".join, itertools.product(*choices))

    for template in itertools.chain(*phantom.SENTENCES[wording].values()):
        for chosen in spread(template, r"\[(.*?)\]", str):
            for sentence in spread(chosen, r"@(\w+)", phantom.TERMS.get):
                yield " ".join(sentence.lower().split())


def test_the_wordings_share_no_sentence():
    train, held_out = set(sentences("train")), set(sentences("held-out"))
    assert not train & held_out and len(train) > 5000


def test_reports_without_chests_are_as_with_them_and_all_of_their_own(tmp_path, capsys):
    phantom.main(["--reports", str(tmp_path / "r.jsonl"), "--n", "30", "--seed", "5"])
    rows = [json.loads(line) for line in open(tmp_path / "r.jsonl")]
    texts = [row["text"] for row in rows]
    assert len(set(texts)) > 25 and len({row["subject"] for row in rows}) == 30
    assert texts[0] == phantom.report_alone(5)
    assert all(t.startswith("Findings: ") and "\nImpression: " in t for t in texts)
    assert not any("{" in t or "[" in t for t in texts)
    assert "wrote 30 reports" in capsys.readouterr().out


# --- the command ---

def test_a_killed_worker_ends_the_command(tmp_path, monkeypatch, fails):
    monkeypatch.setattr(phantom, "make", lambda *a: os._exit(9))
    code, said = fails(phantom.main, "--out", tmp_path / "data", "--n", 3, "--grid", 32, "--workers", 2)
    assert code == 1 and "BrokenProcessPool" in said
    assert not list((tmp_path / "data").iterdir())


def test_reports_of_others_are_not_replaced(tmp_path, fails):
    (tmp_path / "own.jsonl").write_text('{"text": "mine"}\n')
    code, said = fails(phantom.main, "--reports", tmp_path / "own.jsonl", "--n", 3)
    assert code == 2 and "not written by this command" in said
    assert (tmp_path / "own.jsonl").read_text() == '{"text": "mine"}\n'


def test_one_chest_has_several_reports_beside_links_to_its_arrays(tmp_path):
    command = ["--out", str(tmp_path), "--n", "1", "--grid", "16", "--seed", "2", "--workers", "1", "--texts"]
    phantom.main([*command, "3"])
    first, *others = sorted(tmp_path.iterdir())
    assert [p.name for p in others] == ["phantom_000000_text1", "phantom_000000_text2"]
    arrays = [f"{c}.npy" for c in (*data.CHANNELS, "low")]
    assert all((p / name).samefile(first / name) for p in others for name in arrays)
    reports = [(p / "report.txt").read_text() for p in (first, *others)]
    assert len(set(reports)) == 3
    assert ["Impression: " in r for r in reports] == [True, True, False]         # every second further one is a prompt
    assert not faults(others[0], data.downsample)[1:]                            # but for text.npy

    phantom.main([*command, "4"])
    assert len(list(tmp_path.iterdir())) == 4              # further ones beside those that are there


def test_cases_of_another_size_or_source_are_not_mixed_in(tmp_path, fails):
    command = ["--out", str(tmp_path), "--n", "1", "--workers", "1", "--grid"]
    phantom.main([*command, "16"])
    case = tmp_path / "phantom_000000"
    (case / "case.json").write_text("{}")
    code, said = fails(phantom.main, *command, 32)
    assert code == 2 and "of 16^3 voxels, not 32^3" in said
    code, said = fails(phantom.main, *command, 16, "--texts", 2)
    assert code == 2 and "is no phantom's" in said

    (case / "ct.npy").write_bytes(b"")
    code, said = fails(phantom.main, *command, 16)
    assert code == 2 and "not readable" in said
    assert list(tmp_path.iterdir()) == [Path(case)]
