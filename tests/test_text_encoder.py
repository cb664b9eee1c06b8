"""Claims about the text encoder, on CPU and offline, with a BERT of 32 numbers and 2 layers."""
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import text_encoder as te
import train_low
from support.files import read_safetensors
from support.reports import Report, split_run_together

FACTS = {"effusion": ("fluid lies behind the {} lung", "{} effusion"),
         "nodule": ("a small round lesion in the {} lung", "{} nodule"),
         "pneumonia": ("patchy opacity of the {} lung", "{} pneumonia"),
         "clear": ("the {} lung is clear", "normal {} lung")}
REPORTS = [Report(f"{fact}{side}{n}", f"{opening} {seen.format(side)}.", f"{called.format(side)}.")
           for fact, (seen, called) in FACTS.items()
           for side in ("left", "right")
           for n, opening in enumerate(("today", "on this scan", "compared with before"))]
assert len(REPORTS) == 24 and len({r.impression for r in REPORTS}) == 8
TEXTS = [f"Findings: {r.findings}\nImpression: {r.impression}" for r in REPORTS]
TINY = "--width 32 --layers 2 --heads 2 --vocab 200 --dropout 0 --tokens 32 --device cpu".split()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """The reports as a .jsonl."""
    path = tmp_path_factory.mktemp("reports") / "reports.jsonl"
    path.write_text("\n".join(json.dumps(r._asdict()) for r in REPORTS))
    return path


@pytest.fixture(scope="module")
def folder(reports, tmp_path_factory):
    """A model after two steps from scratch by the command line on 18 of the 24 reports."""
    out = tmp_path_factory.mktemp("text") / "model"
    te.main(["train", "--reports", str(reports), "--out", str(out), "--scratch", "--steps", "2", "--batch", "4",
             "--held-out", "0.25", *TINY])
    return out


@pytest.fixture(scope="module")
def encoder(folder):
    return te.load(folder, tokens=32)


@pytest.mark.slow
def test_training_beats_chance_on_reports_it_never_saw(reports, tmp_path):
    command = [sys.executable, te.__file__, "train", "--reports", str(reports), "--out", str(tmp_path / "model"),
               "--scratch", *"--steps 160 --batch 16 --lr 5e-3 --held-out 0.25".split(), *TINY]
    # One thread, or so small a net only waits for the others; a process of its own, because torch.set_num_threads would
    # change the bits of later tests.
    subprocess.run(command, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    record = json.loads((tmp_path / "model" / "text_training.json").read_text())
    words, pairs = record["held_out"]["words"], record["held_out"]["pairs"]
    assert record["held_out_reports"] == 6 and not list(tmp_path.glob("*.part"))
    assert pairs["accuracy"] > 0.7 and pairs["loss"] < 0.6931                     # log 2 is a coin
    assert words["accuracy"] > 2 * words["chance"] and words["loss"] < 2          # log 200 = 5.3 is a blind guess


def test_training_writes_a_whole_folder_with_its_record(folder):
    record = json.loads((folder / "text_training.json").read_text())
    assert record["steps"] == 2 and record["training_reports"] == 18 and record["held_out_reports"] == 6
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_encode_gives_fixed_shape_and_marks_real_tokens(encoder):
    context, mask = encoder.encode([TEXTS[0], "a nodule"])
    assert context.shape == (2, 32, 32) and context.dtype == torch.float32
    assert mask.shape == (2, 32) and mask.dtype == torch.bool
    assert mask[1].sum() == 4 and mask[1, :4].all()                               # [CLS] a nodule [SEP]
    assert (context[1, 4:].abs().sum(1) > 0).all()                                # padding's states are kept
    assert not context.requires_grad and not encoder.bert.training


def test_padding_changes_no_real_token(encoder, folder):
    short, mask = encoder.encode(TEXTS[:3])
    long, long_mask = te.load(folder, tokens=64).encode(TEXTS[:3])
    assert torch.equal(mask.sum(1), long_mask.sum(1))
    torch.testing.assert_close(short[mask], long[long_mask], atol=1e-5, rtol=1e-5)


def test_report_is_encoded_as_the_pair_it_was_trained_as(encoder):
    tokenizer = encoder.tokenizer
    ids, kinds, mask = encoder.tokenise([TEXTS[0]])
    theirs = tokenizer(REPORTS[0].findings, REPORTS[0].impression, padding="max_length", max_length=32)
    assert ids[0].tolist() == theirs["input_ids"] and kinds[0].tolist() == theirs["token_type_ids"]
    assert mask[0].int().tolist() == theirs["attention_mask"]


def test_too_long_report_is_cut_with_a_warning_but_keeps_its_impression(encoder, capsys):
    ids, kinds, mask = encoder.tokenise(["Findings: " + "the lung is clear " * 50 + "\nImpression: left nodule."])
    assert "longer than 32 tokens" in capsys.readouterr().err and mask.all()
    assert encoder.tokenizer.decode(ids[0][kinds[0] == 1]) == "left nodule. [SEP]"
    ids, kinds, mask = encoder.tokenise(["Findings: " + "clear " * 50 + "\nImpression: " + "nodule " * 50])
    assert mask.all() and kinds.sum() == 15                                       # half of the room, and [SEP]


def test_fifteen_percent_of_the_words_are_masked_and_no_special_token(encoder):
    tokenizer = encoder.tokenizer
    ids, _, mask, _ = te.pack(tokenizer, [r[1:] for r in REPORTS] * 20, 32)
    holes, chosen = te.mask_words(ids, tokenizer, te.seeded(0, 0))
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    assert not (chosen & special).any() and not (chosen & ~mask).any()
    assert abs(chosen.sum() / (~special).sum() - 0.15) < 0.02
    assert (holes[chosen] == tokenizer.mask_token_id).all() and torch.equal(holes[~chosen], ids[~chosen])


def test_kept_words_are_asked_for_as_well(encoder):
    ids, *_ = te.pack(encoder.tokenizer, [r[1:] for r in REPORTS] * 20, 32)
    all_masked, chosen = te.mask_words(ids, encoder.tokenizer, te.seeded(0, 0))
    holes, the_same = te.mask_words(ids, encoder.tokenizer, te.seeded(0, 0), kept=0.3)
    seen = chosen & (holes == ids)
    assert torch.equal(chosen, the_same) and torch.equal(holes[~seen], all_masked[~seen])
    assert abs(seen.sum() / chosen.sum() - 0.3) < 0.08


def test_half_of_the_impressions_are_another_subjects_and_labelled_so():
    pairs, paired = te.swap_sections(REPORTS * 20, REPORTS, te.seeded(0, 0))
    assert abs(paired.mean() - 0.5) < 0.1
    for report, (findings, impression), own in zip(REPORTS * 20, pairs, paired):
        assert findings == report.findings and (impression == report.impression) == bool(own)
        assert impression in {r.impression for r in REPORTS}
    with pytest.raises(ValueError, match="no other subject"):
        te.another_impression(REPORTS[0], REPORTS[:3], te.seeded(0, 0))            # three subjects with the same words


def test_losses_are_the_formulas_of_their_docstrings():
    logits, words = torch.randn(5, 7), torch.tensor([0, 6, 3, 3, 1])
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    torch.testing.assert_close(te.masked_word_loss(logits, words), -p[range(5), words].log().mean())
    logits, paired = torch.randn(4), torch.tensor([1.0, 0, 0, 1])
    p = 1 / (1 + (-logits).exp())
    torch.testing.assert_close(te.paired_section_loss(logits, paired), -torch.where(paired == 1, p, 1 - p).log().mean())


@pytest.mark.parametrize("text, sections", [
    ("Findings: Clear  lungs.\nImpression: Normal.", ("Clear lungs.", "Normal.")),
    ("FINDINGS: Clear. IMPRESSION:\n1. Normal.", ("Clear.", "1. Normal.")),
    ("History: Cough.\nTechnique: CT.\n Findings: Clear.\nConclusion: Normal.", ("Clear.", "Normal.")),
    ("No other findings: clear.", ("No other findings: clear.", "")),
    ("INDICATION: Large effusion FINDINGS: Clear. IMPRESSION: Normal.", ("Clear.", "Normal.")),
    ("**History:** Effusion.\n\n**Findings:** Clear.\n\n**Impression:** Normal.", ("Clear.", "Normal.")),
    ("# CT chest\n## Findings\nClear.\n\n## Impression\nNormal.", ("Clear.", "Normal.")),
    ("- Findings: Clear.\n- Impression: Normal.", ("Clear.", "Normal.")),
    ("FINDINGS\r\nClear.\r\nCONCLUSION\r\nNormal.", ("Clear.", "Normal.")),
    ("Findings: Clear.\nClinical impression: Normal.", ("Clear.", "Normal.")),
    ("IMPRESSION: Normal. FINDINGS: Clear.", ("Clear.", "Normal.")),
    ("HISTORY: impression: pneumonia. FINDINGS: Clear. IMPRESSION: Normal.", ("Clear.", "Normal.")),
    ("TECHNIQUE: CT. FINDINGS AND IMPRESSION: Clear.", ("Clear.", "")),
    ("Findings: Clear.\nImpression:\n", ("Clear.", "")),
    ("Clear. Conclusion: Normal.", ("Clear.", "Normal.")),
    ("\uff26indings: \ufb01brosis.\u200b\nImpression:\u00a0Old.", ("fibrosis.", "Old.")),
    ("Large effusion on the left.", ("Large effusion on the left.", ""))])
def test_sections_are_found_by_their_headings(text, sections):
    assert te.split_sections(text) == sections


def test_a_report_with_one_section_is_left_out_and_blank_lines_are_passed_over(tmp_path, capsys):
    rows = [json.dumps(dict(id=i, findings=f"Clear {i}. No effusion. Heart normal.", impression=x))
            for i, x in enumerate(("Normal.", "", "Fine."))]
    (tmp_path / "a.JSONL").write_bytes(("\ufeff" + "\r\n\r\n".join(rows) + "\n\n").encode())
    (tmp_path / "B.TXT").write_text("Findings: Clear. No effusion. Heart normal.\nImpression:\n")
    assert [r.subject for r in te.load_reports([tmp_path / "a.JSONL", tmp_path])] == ["0", "2"]
    assert "2 of 4 reports have one section only" in capsys.readouterr().err


@pytest.mark.parametrize("text, words", [
    ("{\\rtf1\\ansi Clear.}", "RTF"), ("<p>Clear.</p>", "HTML"), ("Clear.<br/>Normal.", "HTML"),
    ('[{"findings": "Clear."}]', "JSON"), ('{"text": "Clear."}\n{"text": "Normal."}', "JSON"),
    ("Findings:\nImpression:", "no words")])
def test_what_is_no_plain_text_is_refused_by_name(text, words, tmp_path):
    (tmp_path / "r.txt").write_text(text)
    with pytest.raises(ValueError, match=f"r.txt: {words}"):
        te.read_report(tmp_path / "r.txt")


def test_less_than_is_no_tag(tmp_path):
    (tmp_path / "r.txt").write_text("A nodule < 5 mm, HU <-950 & > 30.")
    assert te.split_sections(te.read_report(tmp_path / "r.txt"))[0] == "A nodule < 5 mm, HU <-950 & > 30."


def test_reports_without_headings_are_split_at_the_first_mark_else_before_the_last_two_sentences():
    assert split_run_together('Clear. Bones normal. " Nodules " Cyst.') == ("Clear. Bones normal.", "Nodules Cyst.")
    assert split_run_together("Clear. • Nodules. • Cyst.") == ("Clear.", "Nodules. Cyst.")
    text = "Clear. Bones normal. No infection. Repeat it."
    assert split_run_together(text) == ("Clear. Bones normal.", "No infection. Repeat it.")


def test_embed_writes_what_encode_gives(folder, encoder, tmp_path):
    for n in range(3):
        (tmp_path / f"case{n}").mkdir()
        (tmp_path / f"case{n}" / "ct.npy").touch()
        (tmp_path / f"case{n}" / "report.txt").write_text(TEXTS[n])
    command = ["embed", str(tmp_path), "--model", str(folder), "--tokens", "32", "--batch", "2", "--device", "cpu"]
    te.main(command)
    for n in range(3):
        saved = np.load(tmp_path / f"case{n}" / "text.npy")
        assert saved.shape == (32, 32) and saved.dtype == np.float16
        np.testing.assert_allclose(saved, encoder.encode([TEXTS[n]])[0][0].numpy(), atol=2e-3)
        (tmp_path / f"case{n}" / "text.npy").unlink()
    (tmp_path / "case2" / "report.txt").write_text("")
    with pytest.raises(SystemExit) as stop:
        te.main(command)
    assert stop.value.code == 2 and not list(tmp_path.glob("*/text.npy*"))         # nothing, not even the sound cases


def test_saved_model_encodes_as_it_did_and_trains_on(folder, encoder, tmp_path):
    bert, tokenizer = te.read_model(folder, 32, masked_words=True)
    te.save(tmp_path / "again", bert, tokenizer, {})
    assert torch.equal(te.load(tmp_path / "again", tokens=32).encode(TEXTS)[0], encoder.encode(TEXTS)[0])


def test_the_layout_of_cxr_bert_loads_and_its_code_does_not_run(folder, encoder, tmp_path):
    """As on the hub: a type of its own, a pickle of weights with heads that are not needed, vocab.txt, and Python files
    that ask to be run."""
    bert, tokenizer = te.read_model(folder, 32, masked_words=True)
    bert.config.save_pretrained(tmp_path)
    weights = {**bert.state_dict(), "cls_projection_head.dense.weight": torch.zeros(3, 3)}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= dict(model_type="cxr-bert", architectures=["CXRBertModel"], projection_size=128,
                   auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(
        do_lower_case=True, tokenizer_class="CXRBertTokenizer", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert torch.equal(te.load(tmp_path, tokens=32).encode(TEXTS)[0], encoder.encode(TEXTS)[0])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["nowhere/at/all", "/nowhere", te.CXR_BERT])
def test_missing_model_is_refused_and_never_a_tokenizer_of_five(name):
    with pytest.raises(ValueError, match="pass a local folder"):
        te.load(name)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_broken_models_are_refused(folder, encoder, tmp_path):
    te.save(tmp_path / "m", *te.read_model(folder, 32, masked_words=True), {})
    (tmp_path / "m" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="not readable"):
        te.load(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save({"bert.pooler": Evil(str(tmp_path / "ran"))}, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not readable"):
        te.load(tmp_path / "m")
    assert not (tmp_path / "ran").exists()
    for file in ("tokenizer.json", "tokenizer_config.json", "pytorch_model.bin"):
        (tmp_path / "m" / file).unlink()
    (tmp_path / "m" / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="5 tokens in the tokenizer"):
        te.load(tmp_path / "m")
    with pytest.raises(ValueError, match="takes 8 to 512"):
        te.load(folder, tokens=600)


def test_a_changed_report_and_another_encoder_are_seen(phantoms, folder, tmp_path, fails, capsys):
    cases = tmp_path / "cases"
    shutil.copytree(phantoms, cases)
    te.main(["embed", str(cases), "--model", str(folder), "--tokens", "32"])
    data.main(["check", str(cases)])
    one = data.cases(cases)[1]
    (one / "report.txt").write_text("Findings: Other.\nImpression: Other.")
    assert fails(data.main, "check", cases)[0] == 2
    te.main(["embed", str(cases), "--model", str(folder), "--tokens", "32"])
    data.main(["check", str(cases)])

    name = json.loads((one / "text.json").read_text())["encoder"]
    assert name == te.identity(te.load(folder, 32)) != te.identity(te.load(folder, 24))
    capsys.readouterr()
    te.load(folder, 32, known=name)
    assert capsys.readouterr().err == ""
    te.load(folder, 24, known=name)
    assert "is not the one that these weights were trained with" in capsys.readouterr().err

    run = ["--preset", "demo", "--device", "cpu", "--dim", "8", "--levels", "2", "--heads", "1", "--batch", "2",
           "--micro", "2", "--workers", "0", "--holdout", "0", "--data", str(cases), "--out", str(tmp_path / "low")]
    train_low.main([*run, "--steps", "1"])
    assert read_safetensors(tmp_path / "low/low.safetensors")[1]["encoder"] == name
    assert torch.load(tmp_path / "low/last.pt", weights_only=True)["encoder"] == name
    about = json.loads((one / "text.json").read_text())
    (one / "text.json").write_text(json.dumps(about | dict(encoder="other")))
    code, said = fails(train_low.main, *run, "--steps", 2)
    assert code == 2 and "text embedded by different encoders" in said
    for case in data.cases(cases):
        (case / "text.json").write_text(json.dumps(about | dict(encoder="other", sha256={})))
    code, said = fails(train_low.main, *run, "--steps", 2)
    assert code == 2 and "which differ in encoder" in said


SCRATCH = ["train", "--scratch", "--width", "16", "--layers", "1", "--heads", "2", "--steps", "7", "--batch", "4",
           "--tokens", "32", "--held-out", "0.3", "--device", "cpu"]


def test_a_training_that_was_stopped_goes_on_to_the_same_bits(tmp_path, monkeypatch, fails):
    reports = tmp_path / "reports"
    reports.mkdir()
    for i in range(20):
        (reports / f"{i}.txt").write_text(f"Findings: There is {i} and nothing else.\nImpression: Number {i}.")
    asked = [*SCRATCH, "--reports", str(reports), "--out"]
    te.main([*asked, str(tmp_path / "whole")])

    keep = te.keep

    def stop(*args):
        keep(*args)
        if args[-1] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(te, "keep", stop)
    code, _ = fails(te.main, *asked, tmp_path / "parts", "--save-every", 2)
    assert code == 130 and [p.name for p in (tmp_path / "parts").iterdir()] == ["last.pt"]
    code, said = fails(te.main, *asked, tmp_path / "parts", "--seed", 1)
    assert code == 2 and "with other options or reports" in said
    monkeypatch.undo()
    te.main([*asked, str(tmp_path / "parts"), "--save-every", "3"])
    assert not (tmp_path / "parts/last.pt").exists()
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_the_text_encoder_holds_out_whom_the_split_holds_out(phantoms, tmp_path):
    cases = tmp_path / "cases"
    for i, case in enumerate(data.cases(phantoms) * 3):
        shutil.copytree(case, cases / f"p{i:02d}")
        (cases / f"p{i:02d}/report.txt").write_text(f"Findings: There is {i}.\nImpression: Number {i}.")
    te.main([*SCRATCH, "--reports", str(cases), "--out", str(tmp_path / "first")])
    drawn = json.loads((cases / "split.json").read_text())["held_out"]   # it was the first to read the folder
    assert len(drawn) == 4
    training, held_out = data.split_cases(cases, 99)
    assert sorted(f.name for f in held_out) == drawn and len(training) == 11
    (tmp_path / "s.json").write_text(json.dumps(dict(held_out=["p00", "p01", "p02"])))
    te.main([*SCRATCH, "--reports", str(cases), "--split", str(tmp_path / "s.json"), "--out", str(tmp_path / "second")])
    assert json.loads((tmp_path / "second/text_training.json").read_text())["held_out_reports"] == 3


def test_a_hub_that_does_not_answer_is_said_within_seconds(monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")      # nobody listens
    began = time.time()
    with pytest.raises(ValueError, match="runs/txt: not found .* and the hub does not answer; a text model has"):
        te.load("runs/txt")
    assert time.time() - began < 30                       # its client asked for minutes


def test_empty_reports_are_refused_and_unknown_words_are_said(encoder, capsys):
    for text in ("", "  \n", "Findings: \nImpression: ", None):
        with pytest.raises(ValueError, match="empty"):
            encoder.encode([text])
    encoder.encode(["Ωμέγα ж ж ж lung"])
    assert "unknown words" in capsys.readouterr().err


@pytest.mark.parametrize("flags, said", [
    ("--steps -1", "--steps -1; it is at least 0"),
    ("--held-out nan", "--held-out nan; it is at least 0"),
    ("--held_out 1", "--held-out 1.0; it is at least 0 and below 1"),
    ("--seed -1", "--seed -1; it is at least 0"),
    ("--scra", "unrecognized arguments: --scra"),
    ("--batch 25", "--batch 25, 1 processes; a batch is"),
    ("--width 30", "heads divide the width"),
    ("--tokens 7", "--tokens 7; it is at least 8"),
    ("--base here", "not allowed with")])
def test_wrong_flags_exit_2_with_one_line_and_write_nothing(flags, said, reports, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        te.main(["train", "--reports", str(reports), "--out", str(tmp_path / "m"), "--scratch", "--batch", "4",
                 *flags.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and not list(tmp_path.iterdir())
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error


def test_existing_out_is_refused_before_training(reports, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        te.main(["train", "--reports", str(reports), "--out", str(tmp_path), "--scratch", "--batch", "4", *TINY])
    assert stop.value.code == 2 and not list(tmp_path.iterdir())
    assert "exists already" in capsys.readouterr().err


def test_help_gives_every_option_a_default_and_the_papers_section(capsys):
    with pytest.raises(SystemExit):
        te.main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for title in ("what goes in and out:", "tasks and optimisation:", "the BERT from scratch:", "machine:"):
        assert title in shown
    assert "(sec. 4.6) (default 5)" in shown and "(sec. 4.1) (default microsoft/" in shown


@pytest.mark.slow
def test_importing_is_cheap():
    command = "import sys, text_encoder; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", command], check=True, cwd=Path(te.__file__).parent)
