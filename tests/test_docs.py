"""What the documentation says is there: links and anchors resolve, commands parse by the programs' own parsers, and
options, files and functions exist. Nothing is run and no file of a command is opened.
Not checked: whether a figure stands in two places, since the same number may be two facts; web addresses; packages."""
import argparse
import contextlib
import importlib
import inspect
import io
import re
import shlex
import sys
import unicodedata
from collections import Counter
from functools import cache
from itertools import dropwhile
from pathlib import Path
from unittest import mock
from urllib.parse import unquote

import pytest
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = "docs support beyond benchmarks examples checkpoints tests".split()
PAGES = [*ROOT.glob("*.md"), *(p for f in FOLDERS if f != "support" for p in (ROOT / f).rglob("*.md"))]
LONG = 90                                               # lines: a page with more says at its head what it holds

LINK = re.compile(r'\]\(([^)\s]+)(?:\s+"[^"]*")?\)|(?:src|href)="([^"]+)"')
SPAN = re.compile(r"`([^`]+)`")
RUNS = ("python", "python3", "torchrun", "sh", "pip", "ruff", "pytest")       # a command begins with one of these
FOREIGN = {"raw_img_path", "output_file_path", "efficientnet_lite_pytorch"}     # names in others' code
DATA = set("json jsonl npy npz csv png jpg pt pth safetensors txt md gz html yml py sh ipynb toml".split())


# --- pages ---

def parts(text):
    """A page's prose and code, fenced or indented, as (line number, line)."""
    prose, code, fenced, after_blank = [], [], False, True
    for n, line in enumerate(text.splitlines(), 1):
        if re.match(r"\s*(```|~~~)", line):
            fenced = not fenced
        elif fenced or after_blank and line.startswith("    "):
            code.append((n, line.strip()))
        else:
            prose.append((n, line))
            after_blank = not line.strip()
    return prose, code


def spans(text):
    """What stands in backticks, as (line number, words)."""
    return [(n, span) for n, line in parts(text)[0] for span in SPAN.findall(line)]


def headings(text, level="#{1,6}"):
    return [(n, m[1]) for n, line in parts(text)[0] if (m := re.match(rf"{level} +(.+)", line))]


def slug(title):
    """GitHub's anchor of a heading: letters, digits, _ and - stay, spaces become -."""
    title = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower()
    kinds = ((c, unicodedata.category(c)) for c in title)
    return "".join(c for c, kind in kinds if c in " -" or kind[0] in "LM" or kind in ("Nd", "Pc")).replace(" ", "-")


def anchors(text):
    """Those of all headings; one that stands again gets -1, -2."""
    seen, found = Counter(), set()
    for _, title in headings(text):
        name = slug(title)
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


# --- links ---

def links(text):
    """Targets of links and images, as (line number, target)."""
    lines = [(n, re.sub(r"`[^`]*`", "``", line)) for n, line in parts(text)[0]]
    return [(n, m[1] or m[2]) for n, line in lines for m in LINK.finditer(line)]


def broken_links(page, text):
    for n, target in links(text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / unquote(file)).resolve() if file else page
        if file and not (path.exists() and path.is_relative_to(ROOT)):
            yield n, f"{target}: no such file here"
        elif anchor and anchor not in anchors(path.read_text() if file else text):
            yield n, f"{target}: no such heading"


# --- commands ---

def commands(text):
    """Commands as (line number, words, whole). In code blocks they are whole; in backticks they may be a mere mention,
    without what is required, and without `python`. What needs a shell (| && > $ for) is left out, `;` parts two."""
    prose, code = parts(text)
    joined = []
    for n, line in code:
        if joined and joined[-1][1].endswith("\\"):
            joined[-1] = joined[-1][0], joined[-1][1][:-1] + line
        else:
            joined.append((n, line))
    for n, line, whole in [*((n, line, True) for n, line in joined), *((n, s, False) for n, s in spans(text))]:
        first = re.sub(r"^(\w+=\S* )*", "", line).split(" ")[0]
        mention = not whole and " " in line and (first.endswith(".py") or first.startswith("beyond."))
        if first not in RUNS and not mention or line in RUNS[:-2] or "$" in line:
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            words = list(dropwhile(re.compile(r"\w+=").match, lexer))    # NAME=value before a command
        except ValueError as e:
            words = ["python", str(e), line]                             # no program has this name
        if {"|", "&", "&&", "||", ">", ">>", "<", "("} & set(words):
            continue
        while words:
            end = words.index(";") if ";" in words else len(words)
            one, words = words[:end], words[end + 1:]
            if mention:
                one = ["python", *(["-m"] if first.startswith("beyond.") else []), *one]
            if one and one[0] in RUNS:
                yield n, one, whole


def failing_commands(page, text, config):
    for n, words, whole in commands(text):
        if said := wrong(words, whole, config):
            yield n, f"{' '.join(words)}: {said}"


def wrong(words, whole, config):
    """What is wrong with a command by the program's own parser, '' if nothing.   config: pytest's"""
    program, words = words[0], [w for w, before in zip(words[1:], words) if w != "..." or before.startswith("-")]
    if program == "torchrun":
        said, a = parse(relaxed(get_args_parser()), words, whole)
        if said or not a.training_script:
            return said
        words = [*(["-m"] if a.module else []), a.training_script, *a.training_script_args]
    elif program == "pip":
        return no_file(words[-1]) if "-r" in words else ""
    elif program == "sh":
        script = found(words[0], ROOT)
        labels = re.findall(r"^([\w-]+)\)", script.read_text(), re.MULTILINE) if script else []
        return "" if script and set(words[1:]) <= set(labels) else "no such script, or none of its parts"
    elif program == "ruff":
        return "" if words[:1] == ["check"] and not words[1:] else "only `ruff check` is known here"
    if program == "pytest" or words[:2] == ["-m", "pytest"]:
        known, unknown = config._parser.parse_known_and_unknown_args(words[0 if program == "pytest" else 2:])
        return " ".join(unknown) or " ".join(filter(None, map(no_file, known.file_or_dir)))

    name = words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0]
    path = found(name, ROOT)
    if not path:
        return f"{name}: no such program"
    rest = words[2 if words[0] == "-m" else 1:]
    p, code = parser(path, whole), module(path)
    if p is None:
        return f"{name} takes no options" if rest else ""
    said, _ = parse(p, rest, whole)
    if not said and whole and hasattr(code, "parse"):                    # a trainer: its presets and ranges too
        said, _ = spoken(lambda: code.parse(code.Config, "", rest))
    return said


def parse(p, words, whole):
    """What a parser says against these words, and what it reads. Capitals or ... stand for any number; in a mention the
    last option may want its value."""
    said, read = spoken(lambda: p.parse_args(words))
    if hole := re.search(r"invalid \w+ value: '([A-Z]+|\.\.\.)'", said):
        return parse(p, ["1" if w == hole[1] else w for w in words], whole)
    if "expected" in said and not whole and words[-1].startswith("-"):
        return parse(p, words[:-1], whole)
    return said, read


def spoken(run):
    """The error that a call ends with, in one line ('': none), and what it returns."""
    heard = io.StringIO()
    with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(io.StringIO()):
        try:
            return "", run()
        except SystemExit as e:
            return " ".join(heard.getvalue().split()) if e.code else "", None
        except ValueError as e:
            return str(e), None


class Reached(BaseException):
    """A program is about to read its options."""


@cache
def parser(path, whole):
    """The parser that a program's main builds: main is stopped where it would read the options. None: it has none."""
    def stop(self, args=None, namespace=None):
        raise Reached(self)

    if not re.search(r"^def main\(", path.read_text(), re.MULTILINE):
        return None
    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop), pytest.raises(Reached) as e:
        module(path).main([])
    return e.value.args[0] if whole else relaxed(e.value.args[0])


def relaxed(p):
    """The same parser, with nothing required."""
    for action in p._actions:
        action.required = False
        for q in subparsers(action):
            relaxed(q)
    for group in p._mutually_exclusive_groups:
        group.required = False
    return p


def subparsers(action):
    return action.choices.values() if isinstance(action, argparse._SubParsersAction) else ()


def no_file(name):
    return "" if (ROOT / name.split("::")[0]).exists() else f"{name}: no such file"


# --- names ---

@cache
def module(path):
    """A file's module, by the name under which its neighbours import it."""
    if path.parent == ROOT or path.parent.name in ("beyond", "support"):
        return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    return importlib.import_module(path.stem)


@cache
def sources():
    """All Python files of the house but this one."""
    files = [*ROOT.glob("*.py"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.py"))]
    return [p for p in files if p != Path(__file__).resolve()]


@cache
def words_of_sources():
    return {w for p in sources() for w in re.findall(r"\w+", p.read_text())}


@cache
def classes():
    """Every class of the method, support/ and beyond/, by name."""
    ours = [module(p) for p in sources() if p.parent == ROOT or p.parent.name in ("beyond", "support")]
    return {name: c for m in ours for name, c in inspect.getmembers(m, inspect.isclass) if c.__module__ == m.__name__}


@cache
def options():
    """Every option of every program, with hyphens."""
    found, ps = set(), [p for path in sources() if (p := parser_of_program(path))] + [get_args_parser()]
    while ps:
        p = ps.pop()
        found |= {o.replace("_", "-") for o in p._option_string_actions}
        ps += [q for action in p._actions for q in subparsers(action)]
    return found


def parser_of_program(path):
    named = re.search(r"^if __name__ == .__main__.", path.read_text(), re.MULTILINE)
    return parser(path, True) if named else None


def found(name, *folders):
    """The file of this name in one of the folders, or anywhere by the end of its path.   -> path or None"""
    near = [*(f / name for f in folders), *(p for p in sources() if p.as_posix().endswith("/" + name))]
    return next((p for p in near if p.exists()), None)


def has(owner, name):
    """Whether a module or a class has this name; a class also by assigning it to self."""
    return hasattr(owner, name) or inspect.isclass(owner) and re.search(rf"self\.{name}\b", inspect.getsource(owner))


def unknown_names(page, text):
    """Files, options, `module.function`, `Class.attribute`; words with _ that no source holds, nor the page's own code;
    and in a table's column *where* all names, which are of the file or module named last."""
    words = words_of_sources() | FOREIGN | set(re.findall(r"\w+", " ".join(line for _, line in parts(text)[1])))
    for n, span in spans(text):
        file = re.fullmatch(rf"[\w./-]+\.(py|sh|md|toml)|({'|'.join(FOLDERS)})/[\w./-]*", span)
        if file and not found(span, page.parent, ROOT):
            yield n, f"{span}: no such file"
        for option in re.findall(r"(?:^|\s)(--[\w-]+)", span):
            if option.replace("_", "-") not in options() and not re.match(r"pip|pytest|jupy", span):
                yield n, f"{option}: no program has this option"
        name = re.match(r"[A-Za-z_][\w.]*(?=$|\()", span)
        if name and "." in name[0]:
            if name[0].split(".")[-1] not in DATA and not resolved(name[0]):
                yield n, f"{name[0]}: no such name"
        elif name and "_" in name[0] and name[0] not in words:
            yield n, f"{name[0]}: no source has this word"
    for n, cell in cells(text, "where"):
        owner = None
        for span in SPAN.findall(cell):
            if path := found(span, page.parent, ROOT) if span.endswith(".py") else None:
                owner = module(path)
            elif "." in span:
                owner = owner_of(span.split(".")[0]) or owner
            elif re.fullmatch(r"\w+", span) and not (owner and has(owner, span)):
                yield n, f"{span}: not in {getattr(owner, '__name__', 'a file named before it')}"


def owner_of(first):
    """The module or class that a dotted name begins with, or None if it is none of ours."""
    path = next((p for p in (ROOT / f"{first}.py", ROOT / first / "__init__.py") if p.exists()), None)
    return importlib.import_module(first) if path else classes().get(first)


def resolved(name):
    """Whether a dotted name leads somewhere; names that begin with none of ours are not asked."""
    first, *rest = name.split(".")
    owner = owner_of(first)
    for part in rest if owner else ():
        with contextlib.suppress(ImportError, AttributeError, TypeError):
            importlib.import_module(f"{owner.__name__}.{part}")
        if not has(owner, part):
            return False
        owner = getattr(owner, part, object)
    return True


def cells(text, title):
    """The cells of a table's column, as (line number, cell)."""
    column = None
    for n, line in parts(text)[0]:
        row = [c.strip() for c in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if not row:
            column = None
        elif column is None:
            column = row.index(title) if title in row else -1
        elif 0 <= column < len(row):
            yield n, row[column]


def contents(text):
    """A page's `##` headings, and those that its head links to: what stands before the first that is not Contents."""
    below = [(n, slug(title)) for n, title in headings(text, "##") if title != "Contents"]
    return {name for _, name in below}, {t[1:] for n, t in links(text) if below and n < below[0][0] and t[0] == "#"}


# --- the claims ---

def nothing_found_by(check, *args):
    """Asserts that a check finds nothing on any page, or says all that it finds, with page and line."""
    lines = [f"{p.relative_to(ROOT)}:{n}: {what}" for p in PAGES for n, what in check(p, p.read_text(), *args)]
    assert not lines, "\n" + "\n".join(lines)


def test_links_and_anchors_resolve():
    assert sum(len(links(p.read_text())) for p in PAGES) > 100
    nothing_found_by(broken_links)


def test_commands_parse_by_their_programs_own_parsers(pytestconfig):
    assert sum(whole for p in PAGES for _, _, whole in commands(p.read_text())) > 80
    nothing_found_by(failing_commands, pytestconfig)


def test_files_options_and_functions_exist():
    assert len(list(cells((ROOT / "README.md").read_text(), "where"))) >= 12
    nothing_found_by(unknown_names)


def test_readme_has_two_pages():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 2000


def test_a_long_page_says_at_its_head_what_it_holds():
    long = [p for p in PAGES if p != ROOT / "README.md" and len(p.read_text().splitlines()) > LONG]
    assert len(long) >= 4
    for page in long:
        below, linked = contents(page.read_text())
        assert below <= linked, f"{page}: its head does not link to {sorted(below - linked)}"


# --- these checks find what is wrong ---

WRONG = """# Made up

[here](#made-up), [twice](#twice-1), [size](#64--256-a_b), [gone](gone.md), [no heading](data.md#gone), [none](#gone)
`[no link](gone.md)` ![a picture](gone.jpg) [web](https://example.org/gone)

    python sample.py --report r.txt --low-step 3
    python phantom.py --n many --out x
    OMP_NUM_THREADS=1 python phantom.py --n N --out FOLDER; ls            # fine
    python data.py prepare --ct ct.nii.gz
    python train_low.py --device cpu --preset huge
    torchrun --nproc_per_node=4 train_sr.py --patch 2
    torchrun --nprocs=4 train_sr.py
    python -m beyond.gone; python data.py check DIR
    sh benchmarks/gpu.sh everything
    for part in a b; do python gone.py $part; done
    ls | python gone.py
    pytest --gone tests/test_gone.py
    python sample.py --report \\
        r.txt --gone
    python sample.py --prompt "no end

Fine: `python data.py prepare`, `data.py prepare --grid`, `torchrun ... -m beyond.train_low`; `data.py check --gone` no.

## Twice
## Twice
## `64³ → 256³`: a_b

```
python gone.py
```

Fine: `diffusion.q_sample`, `UNet3D.text`, `support.weights.beyond`, `phantom.make(77)`, `sample.json`, `fast.py`.
Not: `diffusion.gone`
`UNet3D.gone`
`support/gone.py`
`--gone`
`word_that_is_gone`

| what | where |
|---|---|
| fine | `diffusion.q_sample`, `loss`; `support/fast.py`, `VolumeConv`; `UNet3D.body` |
| not | `unet3d.Down`, `q_sample` |
"""


def test_what_is_wrong_is_found(pytestconfig):
    page = ROOT / "docs" / "made-up.md"
    assert [(n, t.split(":")[0]) for n, t in broken_links(page, WRONG)] == [
        (3, "gone.md"), (3, "data.md#gone"), (3, "#gone"), (4, "gone.jpg")]
    failing = list(failing_commands(page, WRONG, pytestconfig))
    assert [n for n, _ in failing] == [6, 7, 9, 10, 11, 12, 13, 14, 17, 18, 20, 29, 22]
    assert "--low-step" in failing[0][1] and "beyond.train_sr" in failing[4][1]
    assert [(n, t.split(":")[0]) for n, t in unknown_names(page, WRONG)] == [
        (22, "--gone"), (33, "diffusion.gone"), (34, "UNet3D.gone"), (35, "support/gone.py"), (36, "--gone"),
        (37, "word_that_is_gone"), (42, "q_sample")]
    assert contents("[a](#a)\n## A\n[b](#b)\n## B c\n") == ({"a", "b-c"}, {"a"})
