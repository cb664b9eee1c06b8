"""The bar is the same network, and the table says what it must."""
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import bench
import detail
import growth
import obey
import phantom
import steps
import tables
from data import CHANNELS
from reference import Reference
from unet3d import UNet3D

G, H = dict(context_dim=16, tokens=5, heads=2), dict(in_channels=8, rounds=1, context_dim=0, heads=2)


@pytest.mark.parametrize("options, channels", [(G, 4), (H, 8)])
def test_the_reference_is_the_same_network(options, channels):
    torch.manual_seed(0)
    net = UNet3D(8, levels=3, **options)
    x, t, context = torch.randn(2, channels, 4, 16, 16), torch.tensor([0.2, 0.8]), torch.randn(2, 5, 16)
    with torch.no_grad():
        for text in (context, None):
            assert (net(x, t, text) - Reference(net)(x, t, text)).abs().max() < 1e-4


@pytest.mark.slow
def test_every_case_is_a_line_with_its_ratio_to_the_reference(monkeypatch, capsys):
    quick = {name for name, case in bench.CASES.items() if case[3]}
    assert {"G_64_forward", "G_64_step", "H_crop_step", "H_128_forward"} <= quick
    tiny = {"G_8_forward": ("G", (1, 8, 8, 8), "forward", True), "H_8_slab": ("H", (2, 8, 8, 8), "slab", True)}
    monkeypatch.setattr(bench, "CASES", tiny)
    monkeypatch.setattr(bench, "WIDTHS", {"cpu": (8, 8)})
    monkeypatch.setattr(bench, "on_cpu", lambda case, form, width: (
        partial(bench.clock, bench.job(case, form, width, "cpu"), "cpu"), 1.0))
    bench.main(["--quick", "--json", "--repeats", "2", "--device", "cpu"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["case"] for r in rows] == ["G_8_forward", "H_8_slab"]
    for r in rows:
        assert r["ratio"] == pytest.approx(r["reference_seconds"] / r["seconds"])
        assert r["peak_mb"] == r["reference_peak_mb"] == 1 and r["tflop"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("form", ["ours", "ours blocks", "ours light"])
def test_every_form_of_ours_is_trained(monkeypatch, form):
    monkeypatch.setattr(bench, "CASES", {"H_16_step": ("H", (1, 16, 16, 16), "step", True)})
    net, _ = bench.network("H_16_step", form, 8, "cpu")
    before = [p.clone() for p in net.parameters()]
    monkeypatch.setattr(bench, "network", lambda *which: (net, False))
    bench.job("H_16_step", form, 8, "cpu")()
    assert any((p != q).any() for p, q in zip(net.parameters(), before))


def test_sampling_is_timed_with_both_solvers(monkeypatch, capsys):
    monkeypatch.setattr(bench, "WHOLE", {"cpu": (8, 8, 8, 1)})
    stages = {"G": dict(heads=1), "H": dict(in_channels=8, heads=1, rounds=1, context_dim=0)}
    monkeypatch.setattr(bench, "STAGES", stages)
    called = []

    def generate(low, sr, grid, seed, s, *rest):
        called.append((type(low).__name__, s["low_steps"], s["sr_steps"], s["solver"], s["guidance"], s["beyond"]))

    monkeypatch.setattr(bench, "generate", generate)
    bench.main(["--json", "--repeats", "1", "--device", "cpu", "--only", "sampling"])
    assert called == [("UNet3D", 50, 20, "ddim", 2, []), ("UNet3D", 20, 10, "dpm", 2, ["solver"]),
                      ("UNet3D", 4, 2, "ddim", 1, []), ("Reference", 5, 2, "ddim", 2, [])]
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["case"] for r in rows] == ["sampling_50_20", "sampling_dpm_20_10", "sampling_student_4_2"]
    assert all(r["ratio"] == pytest.approx(r["reference_seconds"] / r["seconds"]) for r in rows)


@pytest.mark.slow
def test_recomputation_holds_less():
    """Against float32 norms and nothing recomputed: a third, and a seventh."""
    none, norms, blocks = (growth.held_for_backward((16, 32, 32), how, dim=16, levels=2, **H)
                           for how in ("none", "norms", "blocks"))
    assert norms < none / 3 and blocks < none / 6


@pytest.mark.slow
def test_slabs_hold_less():
    whole, slabs = (growth.peak_of_inference((128, 128, 128), slab, dim=16, levels=2, **H) for slab in (0, 16))
    assert slabs < 0.9 * whole


def test_the_ledger_counts_what_is_alive():
    with growth.Ledger() as ledger:
        a, b = torch.zeros(1000), torch.zeros(500)
        view = a[:10]
        del b, a
        assert ledger.held() == 4000 and len(view) == 10


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own():
    run, peak = bench.on_cpu("G_32_forward", "ours", 8)
    assert 5 < peak < 2000 and 0 < run() < 60
    with pytest.raises(RuntimeError, match="its process ended"):
        bench.on_cpu("no such case", "ours", 8)


def test_a_part_is_measured_once_for_its_weights_and_arguments(model, monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(obey, "detail", lambda m, n: asked.append((m.s["sr_steps"], n)) or {"stage 2": {"dice": 0.5}})
    command = ["--model", str(model), "--parts", "detail", "--device", "cpu", "--out", str(tmp_path)]
    for more in ([], [], ["--n-full", "3"], ["--sr-steps", "3"], ["--sr-steps", "3"], []):
        obey.main([*command, *more])
    assert asked == [(20, 8), (20, 3), (3, 8), (20, 8)] and capsys.readouterr().out.count("already") == 2
    assert json.loads((tmp_path / "obey.json").read_text())["detail"]["table"] == {"stage 2": {"dice": 0.5}}


@pytest.mark.slow
def test_steps_are_measured_for_both_stages_and_not_twice(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(steps, "STEPS", {"stage 1": (2,), "stage 2": (1, 2)})
    monkeypatch.setattr(steps, "LIMIT", 2)
    seen = []
    monkeypatch.setattr(steps, "measure_phantom", lambda ct, lobe: dict.fromkeys(
        ("effusion", "left", "right", "ctr", "laa"), len(seen)) | dict(n=seen.append(len(ct))))
    monkeypatch.setattr(detail, "detail", lambda model, n, ways, part: {
        way: {"dice airway": s["sr_steps"] / 10, "dice vessel": 0.0} for way, s in ways.items()})
    command = ["--n", "3", "--n-full", "3", "--out", str(tmp_path)]
    steps.main(command)
    found = json.loads((tmp_path / "steps.json").read_text())["demo"]
    assert set(found["stage 1"]["table"]) == {"ddim 2", "dpm 2"} and seen == [32] * 6
    assert found["stage 1"]["table"]["ddim 2"]["from the limit"] == 0    # which is DDIM in 2 steps here
    assert found["stage 2"]["table"]["dpm 2"]["dice airway"] == 0.2 and (tmp_path / "steps.png").is_file()
    steps.main(command)
    assert len(seen) == 6                                                # all was there


def test_obedience_is_what_the_paper_compares():
    good = []
    for i, r in enumerate(obey.conditions(8)):
        side, faint = r["effusion"], 0.001 * i
        good.append((r, dict(effusion=1000.0 * (side != "none") + 1, left=900.0 * (side == "left"),
                             right=900.0 * (side == "right"), ctr=0.45 + 0.2 * r["cardiomegaly"] + faint,
                             laa=0.1 + 5 * r["bullae"] + faint, airway=1.0)))
    got = obey.compare(good)
    assert got["side right"] == 1 and got["effusion ratio"] == pytest.approx(1001)
    assert got["effusion lowest large, mL"] > got["effusion highest none, mL"]
    assert got["ctr cardiomegaly"] - got["ctr normal"] == pytest.approx(0.2, abs=2e-3) and got["ctr p"] < 1e-3
    assert got["laa ratio"] > 10

    swapped = [(r, {**m, "left": m["right"], "right": m["left"], "ctr": 0.5 + 1e-3 * (i % 7)})
               for i, (r, m) in enumerate(good)]
    got = obey.compare(swapped)
    assert got["side right"] == 0 and got["ctr p"] > 0.01
    none = [(r, {**m, "effusion": m["effusion"] if r["effusion"] != "none" else 0.0}) for r, m in good]
    assert "effusion ratio" not in obey.compare(none)                    # a ratio to nothing


def test_distances_are_taken_from_the_training_of_that_grid(phantoms):
    assert obey.training_cts(phantoms, 8).shape == (5, 512)
    with pytest.raises(ValueError, match=r"5 chests, \(8, 8, 8\); .* are 64\^3"):
        obey.training_cts(phantoms, 64)


def test_a_copy_has_no_distance():
    training = np.random.default_rng(0).normal(size=(20, 30)).astype(np.float32)
    assert obey.nearest(training[3:5], training) == pytest.approx([0, 0], abs=1e-3)
    assert (obey.nearest(training[:2] + 1, training) > 0.5).all()


def test_the_truth_is_sharp_and_what_is_smoothed_is_not():
    case = phantom.make(3, 64)
    true = {c: case[c] for c in CHANNELS}
    same = detail.compared(true | dict(ct=case["ct"].clip(-1024, 600)), case)
    assert {k: v for k, v in same.items() if "error" in k or "body" in k or "at edges" == k} == {
        "CT error, HU": 0, "in the body": 0, "at edges": 0}
    assert all(same[k] == 1 for k in same if "dice" in k or "sharpness" in k)

    smooth = detail.compared(true | dict(ct=gaussian_filter(case["ct"].clip(-1024, 600).astype(np.float32), 1)), case)
    assert smooth["at edges"] > 1.5 * smooth["in the body"] and smooth["in the body"] > smooth["CT error, HU"] > 0
    assert smooth["sharpness at edges"] < smooth["sharpness of the CT / true"] < 0.9 and smooth["dice bones"] < 0.95


def test_a_stopped_measurement_of_detail_goes_on(monkeypatch, tmp_path):
    class Model:
        s, sha256, seed = {}, {"sr": "x"}, 0

    made = []
    monkeypatch.setattr(detail, "feature_net", lambda weights: (None, None))
    monkeypatch.setattr(detail, "chest", lambda model, i, ways, net: made.append(i) or (
        {way: {"dice airway": float(i)} for way in ways}, {who: [i, 1.0] for who in (*ways, "phantoms", "others")}))
    part = tmp_path / "part"
    assert detail.detail(Model, 2, {"a": {}}, part)["a"]["dice airway"] == 0.5 and made == [0, 1]
    table = detail.detail(Model, 3, {"a": {}}, part)
    assert table["a"] == {"dice airway": 1.0, "FID, random features": pytest.approx(0, abs=1e-6)} and made == [0, 1, 2]
    detail.detail(Model, 2, {"b": {}}, part)                             # another way of sampling is measured anew
    assert made == [0, 1, 2, 0, 1]


def test_tables_in_the_documentation_are_those_of_the_json_files():
    for name in tables.PAGES:
        page = (tables.ROOT / name).read_text(encoding="utf-8")
        assert len(tables.TABLE.findall(page)) > 2
        assert tables.filled(page) == page, f"{name}: run `python benchmarks/tables.py`"
