"""Damaged files are refused, killed runs go on: a small part of benchmarks/soak.py."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import damage
import soak


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("intact")
    damage.make(folder)
    return folder


@pytest.mark.parametrize("kind", damage.KINDS)
def test_a_damaged_file_is_refused_or_read_as_it_was(intact, kind):
    found = list(damage.damaged(kind, range(40), 0, intact))
    assert not [x for x in found if x["outcome"] == "wrong"]
    assert sum(x["outcome"] == "refused" for x in found) > (20 if kind in damage.HEADER else 4)
    assert {x["how"] for x in found} == set(damage.MUTATIONS)


def test_a_mutation_follows_from_its_number(intact):
    few, many = (list(damage.damaged("jsonl", range(first, 12), 5, intact)) for first in (9, 0))
    assert few == many[9:] and len({x["why"] for x in many}) > 3


def test_what_no_check_sum_tells_is_counted_apart(intact):
    for kind, name, old, new in (("jsonl", "reports.jsonl", b"lung", b"lunk"),
                                 ("case.json", "case.json", b'"seed": 0', b'"seed": 1'),
                                 ("nii", "ct.nii", b"\0\0", b"\0\0")):
        path = intact / "0" / name
        raw, before = path.read_bytes(), damage.read(kind, path)
        path.write_bytes(raw.replace(old, new))
        assert damage.outcome(kind, path, before)[0] == ("unchanged" if old == new else "unseen")
        path.write_bytes(raw)


def test_a_child_that_dies_is_counted_and_the_rest_is_read():
    code = ("import json, os, sys; first = int(sys.argv[1])\n"
            "for k in range(first, 5):\n"
            "    if k == 2: os.kill(os.getpid(), 11)\n"
            "    print(json.dumps(dict(k=k, outcome='refused')), flush=True)")
    found = damage.in_children(lambda first: [sys.executable, "-c", code, str(first)], 0, 5)
    assert [x["k"] for x in found] == [0, 1, 2, 3, 4]
    assert [x["outcome"] for x in found] == ["refused"] * 2 + ["wrong"] + ["refused"] * 2
    with pytest.raises(RuntimeError, match="defect"):
        damage.in_children(lambda first: [sys.executable, "-c", "raise SystemExit('defect')"], 0, 5)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(phantoms, tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "STEPS", 3)
    whole, run = (soak.Training(phantoms, tmp_path / name, 1) for name in ("whole", "killed"))
    job, killed = whole.start(), run.start()
    run.begun(killed)
    run.kill()
    assert killed.wait() == -9 and whole.wait(job) == 0
    soak.goes_on(run, whole.state())


@pytest.mark.slow
def test_a_file_that_takes_much_memory_is_wrong(intact, tmp_path):
    code = ("import sys; sys.path.insert(0, 'benchmarks'); import damage; damage.MEMORY = -1; "
            "damage.main([*sys.argv[1:]])")
    command = [sys.executable, "-c", code, "jsonl"]
    found = damage.in_children(lambda first: [*command, str(first), "2", "0", str(intact)], 0, 2)
    assert [x["outcome"] for x in found] == ["wrong"] * 2 and "more than the intact" in found[1]["why"]
