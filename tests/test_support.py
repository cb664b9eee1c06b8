"""The plumbing: how programs end, options as they may be typed, files that appear whole or not at all."""
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from support import cli, weights
from support.cli import Parser, exits, hyphens
from support.files import whole_folder, write_atomic
from support.weights import build, tricks, without_idle
from unet3d import UNet3D


@pytest.mark.parametrize("error, code, words", [
    (ValueError("a\nb"), 2, "error: a b"), (FileNotFoundError("x"), 2, "error: x"),
    (PermissionError("x"), 2, "error: x"), (RuntimeError("x"), 1, "error: RuntimeError: x"),
    (OSError("x"), 1, "error: OSError: x"), (MemoryError("x"), 1, "error: MemoryError: x"),
    (KeyboardInterrupt(), 130, "stopped; what was finished is kept")])
def test_wrong_input_ends_with_2_a_failure_with_1_and_an_interrupt_with_130(error, code, words, capsys):
    with pytest.raises(SystemExit) as e, exits():
        raise error
    assert e.value.code == code and capsys.readouterr().err == words + "\n"


def test_an_error_of_our_own_is_not_hidden(capsys):
    with pytest.raises(SystemExit) as e, exits():
        raise AssertionError("it should not")
    line = capsys.readouterr().err
    assert e.value.code == 1 and line.startswith("error: AssertionError: it should not; this is a defect")
    report = Path(line.split()[-1])
    assert 'raise AssertionError("it should not")' in report.read_text()
    report.unlink()


def parser():
    p = Parser(prog="program")
    p.add_argument("--low-steps", type=int, default=1)
    p.add_argument("--name")
    return p


@pytest.mark.parametrize("typed, steps", [(["--low-steps", "2"], 2), (["--low_steps", "2"], 2), (["--low_steps=2"], 2),
                                          ([], 1)])
def test_hyphens_and_underscores_are_one(typed, steps, monkeypatch):
    assert parser().parse_args(typed).low_steps == steps
    monkeypatch.setattr(sys, "argv", ["program", *typed])
    assert parser().parse_args().low_steps == steps


def test_values_keep_their_underscores():
    assert parser().parse_args(["--name", "a_b"]).name == parser().parse_args(["--name=a_b"]).name == "a_b"
    assert [hyphens(a) for a in ("a_b", "-a_b", "--a_b=--c_d")] == ["a_b", "-a_b", "--a-b=--c_d"]


@pytest.mark.parametrize("typed", [["--low", "2"], ["--low-step", "2"], ["--low-steps"], ["--low-steps", "two"], ["x"]])
def test_what_is_abbreviated_or_wrong_is_one_line(typed, capsys):
    with pytest.raises(SystemExit) as e:
        parser().parse_args(typed)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: ") and err.endswith("see program --help\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize("free, kept", [(7e9, 0), (9e9, 2)])
def test_freed_memory_is_kept_only_where_there_is_room_for_it(free, kept, monkeypatch):
    told = []
    monkeypatch.setattr(cli, "free_memory", lambda: free)
    monkeypatch.setattr(cli.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *option: told.append(option)))
    cli.keep_memory(room=8e9)
    assert len(told) == kept


@pytest.mark.skipif(sys.platform != "linux", reason="told by Linux alone")
def test_free_memory_is_what_the_system_says():
    assert 0 < cli.free_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_file_is_whole_or_the_old_one(tmp_path):
    def fails(f):
        f.write(b"half")
        raise OSError("no space left")

    write_atomic(tmp_path / "a", b"old")
    with pytest.raises(OSError):
        write_atomic(tmp_path / "a", fails)
    assert (tmp_path / "a").read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a"]
    write_atomic(tmp_path / "a", lambda f: f.write(b"new"))
    assert (tmp_path / "a").read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_is_whole_or_the_old_one(overwrite, tmp_path):
    (tmp_path / ".a.part").mkdir()                                       # left by a killed run
    (tmp_path / ".a.part/rest").touch()
    with whole_folder(tmp_path / "a") as part:
        (part / "x").write_text("old")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x"]

    with pytest.raises(RuntimeError), whole_folder(tmp_path / "a", overwrite) as part:
        (part / "x").write_text("half")
        raise RuntimeError
    assert (tmp_path / "a/x").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]
    if overwrite:
        with whole_folder(tmp_path / "a", overwrite=True) as part:
            (part / "x").write_text("new")
        assert (tmp_path / "a/x").read_text() == "new"
    else:
        with pytest.raises(OSError), whole_folder(tmp_path / "a") as part:
            (part / "x").write_text("new")
        assert (tmp_path / "a/x").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_only_tricks_that_do_something_are_tricks():
    idle = dict(pooled=False, patch=1, late=0.0, cool=0.0, windows=0.0, bullae=0.0, given=0.0, warm_up=1200)
    assert tricks(idle) == {} and without_idle({**idle, "dim": 8}) == dict(dim=8)
    busy = dict(pooled=True, patch=2, late=0.5, cool=1.0, windows=0.4, bullae=3.0, given=0.5)
    assert tricks({**busy, "warm_up": 1200, "dim": 8}) == busy


def test_weights_that_need_no_more_are_the_papers_network():
    args = dict(dim=8, in_channels=8, heads=1, rounds=1, context_dim=0, levels=1)
    with torch.device("meta"):
        assert type(build({**args, "pooled": False, "patch": 1}, UNet3D)) is UNet3D
        more = build({**args, "patch": 2}, UNet3D)
    assert type(more) is not UNet3D and isinstance(more, UNet3D)


def test_where_beyond_is_deleted_weights_that_need_it_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(weights, "beyond", lambda name: None)
    with pytest.raises(ValueError, match="a network with patch, which the paper does not have; beyond/nets.py builds"):
        build(dict(dim=8, patch=2), UNet3D)
    assert type(build(dict(dim=8, levels=1, patch=1), UNet3D)) is UNet3D
