"""The page: what its form makes, and a browser from text to picture."""
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import page
import sample
from browser import opened

ROOT = Path(__file__).parent.parent
TEXT = "Findings: There is 3 and nothing else.\nImpression: Number 3."


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(sample, "picture", lambda path, *_: path.touch())


@pytest.mark.usefixtures("no_pictures")
def test_the_form_makes_what_sample_makes(model, airway, tmp_path):
    (tmp_path / "r.txt").write_text(TEXT)
    sample.main(["--model", str(model), "--device", "cpu", "--low-steps", "2", "--sr-steps", "1", "--seed", "5",
                 "--report", str(tmp_path / "r.txt"), "--airway", str(airway), "--out", str(tmp_path / "out")])
    made = page.make(tmp_path, str(model), "cpu", TEXT, dict(lobe=None, airway=str(airway), vessel=None), 5, 2, 1)
    assert (made / "view.html").is_file()
    for name in ("ct", "lobe", "airway", "vessel"):
        assert (made / f"{name}.nii.gz").read_bytes() == (tmp_path / f"out/r/{name}.nii.gz").read_bytes()

    again = page.make(tmp_path, str(model), "cpu", " ", {}, None, 1, 1)  # no text, the seed of sample.py
    assert again.name == "sample" and (again / "view.html").is_file()


def test_what_sample_refuses_is_refused_with_its_line(model, airway, tmp_path, fails):
    broken = tmp_path / "lobe.nii.gz"
    broken.write_bytes(b"none")
    masks = dict(lobe=None, airway=None, vessel=None)
    for text, more, seed, steps in ((" ", dict(lobe=str(broken)), 0, 1), (" ", dict(lobe=str(airway)), -1, 1),
                                    ("Number 3.", {}, 0, 0), ("", {}, 2**40, 1)):
        options = [f"--{name}={value}" for name, value in more.items()]
        code, line = fails(sample.main, *options, *(["--prompt", text] if text.strip() else []), f"--seed={seed}",
                           f"--low-steps={steps}", "--model", model, "--device", "cpu", "--out", tmp_path / "out")
        with pytest.raises(ValueError) as e:
            page.make(tmp_path, str(model), "cpu", text, masks | more, seed, steps, 1)
        assert code == 2 and f"error: {e.value}\n" == line
    with pytest.raises(ValueError, match="no words"):
        page.make(tmp_path, str(model), "cpu", "...", {}, 0, 1, 1)
    assert not [*tmp_path.glob("*/*/ct.nii.gz")]


def test_without_gradio_or_with_a_port_that_is_taken_it_is_one_line(fails, monkeypatch):
    with page.socket.create_server((page.HOST, 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(page.importlib.util, "find_spec", lambda name: None)
        assert fails(page.main, "--port", port) == (
            2, "error: gradio: not installed; it draws the page; pip install gradio\n")
        monkeypatch.setattr(page.importlib.util, "find_spec", lambda name: True)
        monkeypatch.setitem(sys.modules, "uvicorn", page)
        code, err = fails(page.main, "--port", port)
        assert code == 2 and err.count("\n") == 1 and f"--port {port}" in err


@pytest.mark.slow
def test_a_browser_goes_from_text_to_picture_and_asks_nobody_else(model, airway, tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed")
    httpx = pytest.importorskip("httpx")
    args = [sys.executable, "page.py", "--model", str(model), "--device", "cpu", "--port", "0"]
    server = subprocess.Popen(args, cwd=ROOT, stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "TMPDIR": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    try:
        url = server.stdout.readline().split()[0]
        assert url.startswith("http://127.0.0.1:")
        with opened(url, 1100, 1000) as (tab, asked, _):
            tab.fill("textarea", "...")                                  # refused, and then not
            tab.click("text=Make a sample")
            tab.wait_for_selector("text=no words in it")
            tab.fill("textarea", TEXT)
            for stage, steps in (1, "40"), (2, "3"):
                tab.get_by_label(f"Steps of stage {stage}").fill(steps)
            tab.locator("input[type=file]").nth(1).set_input_files(airway)
            tab.wait_for_selector("text=airway.nii")
            tab.click("text=Make a sample")
            tab.wait_for_function("/\\d+\\/40 step/.test(document.body.innerText)")
            frame = tab.frame_locator("iframe")
            frame.locator("body[data-state=ready]").wait_for()
            assert frame.locator("output").inner_text().startswith("voxel 16, 16, 16")
            with tab.expect_download() as download:
                tab.click("text=Download")
            names = zipfile.ZipFile(download.value.path()).namelist()
            assert {*names} >= {"report/ct.nii.gz", "report/sample.json", "report/view.html"}
            assert all(re.match(re.escape(url), a) for a in asked)
        for size, code in ((1 << 10, 200), (65 << 20, 413)):             # MOST
            sent = httpx.post(f"{url}/gradio_api/upload", files=dict(files=("a.nii", bytes(size))), timeout=100)
            assert sent.status_code == code
        assert httpx.get(f"{url}/view/none").status_code == 404
    finally:
        server.terminate()
        server.wait()
