"""The one reader of reports: text files and .jsonl, and their two sections, Findings and Impression."""
import json
import re
import sys
from collections import namedtuple
from pathlib import Path

Report = namedtuple("Report", "subject findings impression")
MAX_BYTES = 1 << 20               # of one report


def read_report(path):
    """A report as text. ValueError unless it is a readable text file with words in it, under 1 MB."""
    path = Path(path)
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: not a file of at most 1 MB; a report is plain text; check the path")
    try:
        text = path.read_text(encoding="utf-8-sig").strip()              # without the mark that some editors put first
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text; a report is plain text; save it as such") from None
    words = re.sub(r"\b(finding|impression|conclusion)s?\s*:", "", text, flags=re.I)
    if not any(c.isalpha() for c in words) or "\0" in text:
        raise ValueError(f"{path}: no words in it; a report is plain text; write one, or leave the option out")
    return text


def texts_asked(prompt, reports, otherwise):
    """What sample.py was asked for.   prompt: --prompt or None   reports: files and folders of them   otherwise: the
    name of a sample without text   -> list of (name, text or None)"""
    if prompt is not None and reports:
        raise ValueError("--prompt and --report; one text a sample is needed; give one of them")
    if prompt is not None:
        if not any(c.isalpha() for c in prompt) or any("\ud800" <= c <= "\udfff" for c in prompt):
            raise ValueError(f"--prompt {prompt!r}; no words in it, or bytes that are no UTF-8; "
                             "write some, or leave the option out")
        return [("prompt", prompt)]
    if "" in reports:
        raise ValueError("--report '': no name of a file; a report is a text file; "
                         "check the variable that should hold it")
    files = []
    for path in map(Path, reports):
        files += sorted(path.glob("[!.]*.txt")) if path.is_dir() else [path]
    if reports and not files:
        raise ValueError(f"--report {' '.join(reports)}: no *.txt in it; a report is a text file; check the folder")
    return [(f.stem, read_report(f)) for f in files] or [(otherwise, None)]


def split_sections(text):
    """'Findings: ... Impression: ...' -> (findings, impression) without the headings and what stands before them
    (history, technique); a plain prompt -> (prompt, '')."""
    findings, *impression = re.split(r"\b(?:impression|conclusion)s?\s*:", text, maxsplit=1, flags=re.I)
    findings = re.split(r"(?:^|[.\n])\s*findings?\s*:", findings, maxsplit=1, flags=re.I)[-1]
    return " ".join(findings.split()), " ".join(" ".join(impression).split())


def split_run_together(text):
    """CT-RATE's texts have no headings. Our rule: the Impression starts at the first `"` or bullet after the end of a
    sentence (43 and 7 of the 60 reports looked at), else it is the last two sentences. The marks go, so that they
    cannot tell which Impression is whose."""
    parts = re.split(r'(?<=[.?!:])\s*["•]', text, maxsplit=1)
    if len(parts) == 1:
        sentences = re.split(r"(?<=[.?!])\s+", text.strip())
        parts = [" ".join(sentences[:-2]), " ".join(sentences[-2:])]
    return tuple(" ".join(re.sub('["•]', " ", part).split()) for part in parts)


def patient(folder):
    """Whose case a folder is: its name before `_text`, as phantom.py --texts makes several cases of one chest."""
    return folder.name.split("_text")[0]


def load_reports(paths):
    """Folders of cases (*/report.txt), folders of .txt, .txt files, .jsonl -> list of Report; those with one section
    are left out."""
    texts = []                                            # (subject, text)
    for path in map(Path, paths):
        texts += read_lines(path) if path.suffix == ".jsonl" and path.is_file() else read_files(path)
    pairs = [(subject, split_sections(text), text) for subject, text in texts]
    reports = [Report(subject, *(pair if pair[1] else split_run_together(text))) for subject, pair, text in pairs]
    whole = [r for r in reports if r.findings and r.impression]
    if len(whole) < len(reports):
        print(f"warning: {len(reports) - len(whole)} of {len(reports)} reports have one section only and are left out",
              file=sys.stderr)
    return whole


def read_lines(path):
    """A .jsonl of {"findings", "impression"} or {"text"}, with "subject" or "id".   -> list of (subject, text)"""
    texts = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            subject = row.get("subject", row.get("id", f"{path}:{number}"))
            if "impression" in row:
                text = "Findings: " + row["findings"] + "\nImpression: " + row["impression"]
            else:
                text = "" + row["text"]
            text.encode()                                 # JSON can hold halves of characters
            texts.append((str(subject), text))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path}: line {number} is no report; "
                             "a line has 'text', or 'findings' and 'impression'; mend it") from None
    return texts


def read_files(path):
    """A .txt, a folder of them, or a folder of cases.   -> list of (subject, text)"""
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*/report.txt")) or sorted(path.glob("[!.]*.txt"))
    if not files:
        raise ValueError(f"{path}: no */report.txt, no *.txt; training needs reports; "
                         "try python phantom.py --out data/train --n 512")
    return [(patient(f.parent) if f.name == "report.txt" else f.stem, read_report(f)) for f in files]
