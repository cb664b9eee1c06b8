"""The lecture: its cells run, its words fit its figures, and what it counts is right."""
import ast
import inspect
import re
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn

import lesson
from support.lecture import Attentive, by_level, code, count, usual
from unet3d import UNet3D

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "lesson.py").read_text()
NAMES = [f"{n:02}_{draw.__name__}.png" for n, (_, draw, _) in lesson.FIGURES.items()]


def small(form=lambda net: net):
    return form(UNet3D(8, heads=1, rounds=1, levels=2, context_dim=0))


# --- counting ---

def test_a_convolution_counts_as_by_hand():
    found = count(lambda: nn.Sequential(nn.Conv3d(2, 3, 3, padding=1)), (1, 2, 4, 5, 6))
    assert found["parameters"] == {"0": 3 * 2 * 27 + 3}
    assert found["flops"] == {"0": 2 * (4 * 5 * 6) * 3 * 2 * 27}
    assert found["kept"] == {"0": 2 * 4 * 5 * 6}         # the input; weights are not counted


def test_attention_counts_as_by_hand():
    class First(nn.Module):
        def forward(self, x, temb):
            return x

    L, C, inner = 3 * 4 * 5, 16, 2 * 32
    found = count(lambda: Attentive(First(), C, heads=2), (1, C, 3, 4, 5), (1,))["flops"]
    assert found["qkv"] == 2 * L * C * 3 * inner and found["out"] == 2 * L * inner * C
    assert found[""] == 2 * (2 * L * L * inner)          # q k^T, and its product with v


def test_the_paper_network_is_counted():
    found = count(lambda: UNet3D(160), (1, 4, 64, 64, 64), (1,), (1, 192, 768))
    assert sum(found["parameters"].values()) == 716_215_684
    assert sum(found["flops"].values()) == pytest.approx(9.892e12, rel=1e-3)
    parts = by_level(found["parameters"])
    assert set(parts) == {"ends", "level 1", "level 2", "level 3", "level 4", "bottom"}
    assert sum(parts.values()) == 716_215_684


def test_kept_is_what_autograd_keeps():
    net, kept = small(), {}
    weights = {p.data_ptr() for p in net.parameters()}

    def keep(x):
        if x.data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x     # held, so that an address means one tensor
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        net(torch.randn(1, 4, 8, 8, 8), torch.rand(1))
    real = sum(x.untyped_storage().nbytes() // x.element_size() for x in kept.values())
    assert sum(count(small, (1, 4, 8, 8, 8), (1,))["kept"].values()) == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("how", [{}, dict(halve=True), dict(halve=True, attend=True)])
def test_the_usual_network_runs(how):
    x = torch.randn(1, 4, 8, 8, 8)
    assert small(lambda net: usual(net, **how))(x, torch.rand(1)).shape == x.shape


def test_kernels_of_the_usual_network_hold_three_times_the_weights():
    slices = sum(p.numel() for p in small().parameters() if p.dim() == 4 and p.shape[-1] == 3)
    ours, theirs = (sum(p.numel() for p in net.parameters()) for net in (small(), small(usual)))
    assert slices and theirs == ours + 2 * slices


# --- cells and words ---

def test_every_cell_parses_and_the_file_is_short():
    cells = re.split(r"^# %%(.*)\n", TEXT, flags=re.M)[1:]
    assert len(cells) >= 2 * 11 and len(TEXT.splitlines()) <= 350
    for kind, cell in zip(cells[::2], cells[1::2]):
        ast.parse(cell)
        assert kind.strip() in ("", "[markdown]")
        assert not kind.strip() or all(line.startswith("#") for line in cell.strip().split("\n"))


def test_functions_shown_are_of_this_house_and_shown_without_docstrings():
    shown = [f for _, _, functions in lesson.FIGURES.values() for f in functions]
    assert len(shown) >= 9
    for f in shown:
        assert Path(inspect.getsourcefile(inspect.unwrap(f))).is_relative_to(ROOT)
        lines = code(f)
        assert any(line.startswith(f"def {f.__name__}(") for line in lines[:2])
        assert len(lines) > 1 and '"""' not in "\n".join(lines)


def test_the_words_name_every_figure_and_every_figure_is_there():
    words = (ROOT / "docs/lesson.md").read_text()
    assert re.findall(r"\(lesson/(.*?\.png)\)", words) == NAMES
    assert sorted(p.name for p in (ROOT / "docs/lesson").iterdir()) == NAMES
    assert all((ROOT / "docs/lesson" / name).stat().st_size < 150_000 for name in NAMES)
    headings = re.findall(r"^## (\d)\. (.*) \((\d+) minutes\)$", words, re.M)
    assert [f"{n}. {title}" for n, title, _ in headings] == [title for title, _, _ in lesson.FIGURES.values()]
    assert sum(int(minutes) for *_, minutes in headings) == 60
    assert len(re.findall(r"^\*\*Ask:\*\*", words, re.M)) == 9


@pytest.mark.parametrize("args", [("--check", 0), ("--check", 13), ("--check", "x"), ("--only", 10)])
def test_a_wrong_number_is_one_line(fails, args):
    status, said = fails(lesson.main, *args)
    assert status == 2 and said.count("\n") == 1 and said.startswith("error: ")


def test_check_says_what_differs(monkeypatch, capsys):
    answers = Namespace(EXERCISES={3: ("A", "the clamp"), 7: ("B", "v")}, check={3: [], 7: ["no v", "at all"]}.get)
    monkeypatch.setitem(sys.modules, "test_exercises", answers)
    expected = {3: (0, "exercise 3 (A): as the paper\n"), 7: (1, "exercise 7 (B): v\nno v\nat all\n")}
    for n, (status, said) in expected.items():
        with pytest.raises(SystemExit) as e:
            lesson.main(["--check", str(n)])
        assert e.value.code == status and capsys.readouterr().out == said


@pytest.mark.slow
def test_all_cells_run_at_tiny_size(model, tmp_path, monkeypatch):
    monkeypatch.setattr(lesson, "ASKED", Namespace(**vars(lesson.ASKED)))
    for cached in (lesson.model, lesson.chest):
        cached.cache_clear()
    lesson.main(["--quick", "--model", str(model), "--out", str(tmp_path / "out")])
    for cached in (lesson.model, lesson.chest):
        cached.cache_clear()
    made = sorted((tmp_path / "out").iterdir())
    assert [p.name for p in made] == NAMES
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in made)
