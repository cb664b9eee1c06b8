"""The one reader of reports: text files, tables (.csv, .jsonl), and their two sections, Findings and Impression.
docs/data.md has a table of what it takes and what it refuses."""
import csv
import json
import re
import sys
import unicodedata
from collections import namedtuple
from pathlib import Path

from support.cli import is_text
from support.files import read_json

Report = namedtuple("Report", "subject findings impression")
MAX_BYTES = 1 << 20               # of one report
TAG = re.compile(r"</?(html|head|body|div|span|p|br|b|i|u|em|strong|font|table|tr|td|li|ul)\b[^<>]*>", re.I)
FOLDER = re.compile(r"[^./\\\0][^/\\\0]*")       # a name that can be a folder's
JSON = re.compile(r'[\[{]\s*(\{\s*)?"')

# A heading ends with a colon, or its line does. "Impression:" is one anywhere, "Findings:" at the start of a line or
# sentence ("no other findings: clear"), "FINDINGS:" anywhere.
ITEM, FIND = r"(?:^[ ]*(?:[-*•]|\d[.)])[ ]*)?", r"findings?"
SUM = r"(?:(?:clinical|overall|final|diagnostic|radiologic(?:al)?)\s+)?(?:impression|conclusion)s?"
HEADING = re.compile(rf"""
    (?P<both>       {ITEM} \b (?: {FIND} \s*(?:and|&|/)\s* {SUM} | {SUM} \s*(?:and|&|/)\s* {FIND} ) [ ]*: )
  | (?P<impression> {ITEM} \b {SUM} [ ]*: | ^[ ]* {SUM} [ ]*$ )
  | (?P<findings>   (?: ^{ITEM} | (?<=\.) ) [ ]* {FIND} [ ]*: | (?-i:\bFINDINGS?) [ ]*: | ^[ ]* {FIND} [ ]*$ )""",
                     re.IGNORECASE | re.MULTILINE | re.VERBOSE)


def read_report(path):
    """A report as text. ValueError unless it is a readable text file with words in it, under 1 MB."""
    path = Path(path)
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: not a file of at most 1 MB; a report is plain text; check the path")
    try:
        text = path.read_text(encoding="utf-8-sig").strip()              # without the mark that some editors put first
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text; a report is plain text; save it as such") from None
    return checked(text, path)


def checked(text, path):
    """A report's text if it is one; ValueError else.   path: where it stands"""
    for name, found in (("RTF", text.startswith("{\\rtf")), ("HTML", TAG.search(text)), ("JSON", JSON.match(text))):
        if found:
            raise ValueError(f"{path}: {name}; a report is plain text; "
                             "save it as such, or for training as .jsonl, a report a line")
    if not any(c.isalpha() for c in HEADING.sub("", plain(text))) or "\0" in text:
        raise ValueError(f"{path}: no words in it; a report is plain text; write one, or leave the option out")
    return text


def text_files(folder):
    """The *.txt of a folder, *.TXT too, by name."""
    return sorted(p for p in folder.glob("[!.]*") if p.suffix.lower() == ".txt")


def texts_asked(prompt, reports, otherwise):
    """What sample.py was asked for.   prompt: --prompt or None   reports: files and folders of them   otherwise: the
    name of a sample without text   -> list of (name, text or, of a report that cannot be read, the error, seed of its
    own or None)"""
    if prompt is not None and reports:
        raise ValueError("--prompt and --report; one text a sample is needed; give one of them")
    if prompt is not None:
        if not any(c.isalpha() for c in prompt):
            raise ValueError(f"--prompt {prompt!r}; no words in it; write some, or leave the option out")
        return [("prompt", prompt, None)]
    if "" in reports:
        raise ValueError("--report '': no name of a file; a report is a text file; "
                         "check the variable that should hold it")
    files, rows = [], []
    for path in map(Path, reports):
        if path.suffix.lower() in (".csv", ".jsonl") and path.is_file():
            rows += table(path)
        else:
            files += text_files(path) if path.is_dir() else [path]
    for f in files:
        if not is_text(f.name):
            raise ValueError(f"--report {str(f)!r}: bytes that are no UTF-8; samples are named so; rename the report")
    if reports and not files + rows:
        raise ValueError(f"--report {' '.join(reports)}: no *.txt in it; a report is a text file; check the folder")
    return [(f.stem, text_or_error(f), None) for f in files] + rows or [(otherwise, None, None)]


def table(path):
    """A table of what to sample, .csv with a head or .jsonl: `text`, or `findings` and `impression`; if wanted `name`
    (else the file's and the row) and `seed` (else counted up).   -> list of (name, text, seed or None)"""
    lines = path.read_bytes().decode("utf-8-sig", "replace").splitlines(keepends=True)
    rows = csv.DictReader(lines) if path.suffix.lower() == ".csv" else (json.loads(s) for s in lines if s.strip())
    found = []
    try:
        for row in rows:
            n = len(found) + 1
            if None in row:
                raise ValueError("more cells than the head; a text with commas stands in double quotes")
            row = {k.strip().lower(): str(v) for k, v in row.items() if v not in (None, "")}
            if not row.keys() & {"text", "impression"}:
                raise ValueError(f"no text in {', '.join(row)}")
            sections = "impression" in row
            text = f"Findings: {row['findings']}\nImpression: {row['impression']}" if sections else row["text"]
            name = row.get("name", f"{path.stem}_{n:04d}")
            if "\ufffd" in "".join(row.values()) or not is_text("".join(row.values())) or not FOLDER.fullmatch(name):
                raise ValueError("text that is no UTF-8, or a name that no folder can have")
            found.append((name, checked(text, "text"), int(row["seed"]) if "seed" in row else None))
    except (AttributeError, KeyError, TypeError, ValueError, csv.Error) as e:
        raise ValueError(f"{path}: row {len(found) + 1} cannot be sampled ({e}); a row has "
                         "`text`, or `findings` and `impression`, and if wanted `name` and `seed`, a whole number; "
                         "mend it") from None
    if not found:
        raise ValueError(f"{path}: no rows; a head `name,seed,text` and a row a sample are needed; write them")
    return found


def text_or_error(path):
    try:
        return read_report(path)
    except ValueError as e:
        return e


def plain(text):
    """A text without marks of Markdown and signs of no width, ligatures and full-width letters made plain (NFKC)."""
    text = unicodedata.normalize("NFKC", text)
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    return "\n".join(re.sub(r"^\s*[#>]+\s|\*\*|__", "", line) for line in text.splitlines())


def split_sections(text):
    """'Findings: ... Impression: ...' in any order -> (findings, impression) without the headings and what stands
    before the first (history, technique); "Findings and impression: ...", or a plain prompt -> (text, '')."""
    text = plain(text)
    marks = list(HEADING.finditer(text))
    ends = [m.start() for m in marks[1:]] + [len(text)]
    found = [(m.lastgroup, text[m.end():end]) for m, end in zip(marks, ends)]
    kinds = [kind for kind, _ in found]
    first = next((k for k, kind in enumerate(kinds) if kind != "impression"), None)
    if first is None:                                     # what stands before the Impression, or all
        found.insert(0, ("findings", text[:marks[0].start()] if marks else text))
    elif "impression" in kinds[first:]:
        found = found[first:]                             # an impression before was one of the history
    findings = " ".join(body for kind, body in found if kind != "impression")
    impression = " ".join(body for kind, body in found if kind == "impression")
    return " ".join(findings.split()), " ".join(impression.split())


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
    """Whose case a folder is: as case.json says, else its name before `_text`, as phantom.py --texts makes several
    cases of one chest."""
    return read_json(folder / "case.json").get("patient") or folder.name.split("_text")[0]


def load_reports(paths):
    """Folders of cases (*/report.txt), folders of .txt, .txt files, .jsonl -> list of Report; those with one section
    are left out."""
    texts = []                                            # (subject, text)
    for path in map(Path, paths):
        texts += read_lines(path) if path.suffix.lower() == ".jsonl" and path.is_file() else read_files(path)
    texts = [(subject, plain(text)) for subject, text in texts]
    reports = [Report(subject, *(split_sections if HEADING.search(text) else split_run_together)(text))
               for subject, text in texts]
    whole = [r for r in reports if r.findings and r.impression]
    if len(whole) < len(reports):
        print(f"warning: {len(reports) - len(whole)} of {len(reports)} reports have one section only and are left out",
              file=sys.stderr)
    return whole


def read_lines(path):
    """A .jsonl of {"findings", "impression"} or {"text"}, with "subject" or "id".   -> list of (subject, text)"""
    texts = []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not line.strip():
            continue
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
        files = sorted(path.glob("[!.]*/report.txt")) or text_files(path)
    if not files:
        raise ValueError(f"{path}: no */report.txt, no *.txt; training needs reports; "
                         "try python phantom.py --out data/train --n 512")
    return [(patient(f.parent) if f.name == "report.txt" else f.stem, read_report(f)) for f in files]
