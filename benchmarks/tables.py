"""The tables of docs/ that hang on the shipped weights, cell by cell from obey.json and steps.json: what stands there
between `<!-- table: MODEL PART -->` and `<!-- end -->`.

    sh benchmarks/tables.sh                  # measures all of them, hours; it ends with the next
    python benchmarks/tables.py              # writes them into docs/measuring.md and docs/speed.md
"""
import json
import re
import sys
from math import inf
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.cli import Parser, exits
from support.files import write_atomic

ROOT = Path(__file__).parent.parent
PAGES = "docs/measuring.md", "docs/speed.md"
OBEYED = {"demo": "benchmarks/obey.json", "demo-256": "benchmarks/obey-256/obey.json"}
TABLE = re.compile(r"(<!-- table: (\S+) ([\w ]+) -->\n).*?(?=<!-- end -->)", re.DOTALL)


def rows(head, lines):
    """A table in markdown, after a blank line and before one.   head: its first row   lines: of cells"""
    return "\n".join(["", f"| {' | '.join(head)} |", "|---" * len(head) + "|",
                      *(f"| {' | '.join(cells)} |" for cells in lines), "", ""])


def wanted(what, value, reached):
    return f"{what}: **{'reached' if reached else 'not reached'}** ({value})"


# --- tables 2 to 4: a row's name, what it says of measures r, what is wanted of them ---

def p_value(r, name, who):
    return "" if who == "phantoms" else f", p = {r[f'{name} p']:.0e}"


def ratio(r, name):
    return r.get(f"{name} ratio", inf)                                   # there was none where none was asked for


TEXT = (
    ("effusion, mL: none → large (table 2)",
     lambda r, who: "{effusion none, mL:.0f} ± {effusion none, sd:.0f} → {effusion large, mL:.0f} ± "
                    "{effusion large, sd:.0f}",
     lambda r: wanted("ratio 20", f"{ratio(r, 'effusion'):.0f}".replace("inf", "∞"), ratio(r, "effusion") >= 20)),
    ("highest where none was asked for, lowest where a large one was",
     lambda r, who: "{effusion highest none, mL:.0f}, {effusion lowest large, mL:.0f}",
     lambda r: wanted("no overlap", f"{r['effusion lowest large, mL'] - r['effusion highest none, mL']:.0f} mL apart",
                      r["effusion lowest large, mL"] > r["effusion highest none, mL"])),
    ("effusion on the side that was asked for", lambda r, who: "{side right:.0%}",
     lambda r: wanted("90 %", f"{r['side right']:.0%}", r["side right"] >= 0.9)),
    ("%LAA-950: none → bullae (table 3)",
     lambda r, who: "{laa none, %:.2f} → {laa bullae, %:.1f}" + p_value(r, "laa", who),
     lambda r: wanted("ratio 10", f"{ratio(r, 'laa'):.0f}", ratio(r, "laa") >= 10)),
    ("cardiothoracic ratio: normal → cardiomegaly (table 4)",
     lambda r, who: "{ctr normal:.3f} → {ctr cardiomegaly:.3f}" + p_value(r, "ctr", who),
     lambda r: wanted("apart by 0.12, p < 0.001", f"{r['ctr cardiomegaly'] - r['ctr normal']:.2f}",
                      r["ctr cardiomegaly"] - r["ctr normal"] >= 0.12 and r["ctr p"] < 0.001)),
)


def text(found):
    """Of `text` or `full`."""
    columns = found["table"]
    lines = [[name, *(fill(say(r, who), r) for who, r in columns.items()), want(columns["held-out sentences"])]
             for name, say, want in TEXT]
    n = found["arguments"]["n_full" if len(columns) == 2 else "n"]
    titles = {"phantoms": "phantoms, measured alike", "training sentences": "sentences of training",
              "held-out sentences": "sentences never seen"}
    return rows([f"{n} reports each", *(titles[who] for who in columns), "wanted"], lines)


def fill(form, r):
    """A form with numbers by name in it, whose names hold commas and percent signs.   -> text"""
    return re.sub(r"\{([^:}]+):([^}]+)\}", lambda m: format(r[m[1]], m[2]), form).replace("%,", " %,")


# --- table 5, sec. 4.4, stage 2 alone, nothing memorised ---

def segmentation(found):
    names = {"airway": "airway", "lobe": "lobes, mean of five", "vessel": "vessels", "lung": "lungs"}
    least, lines = {"airway": 0.75, "lobe": 0.85}, []
    for c, name in names.items():
        without, given = (found["table"][f"{who} report"][f"dice {c}"] for who in ("without", "with"))
        lines.append([name, f"{without:.3f}", f"{given:.3f}",
                      wanted(str(least[c]), f"{given - without:+.3f} with the report", max(without, given) >= least[c])
                      if c in least else "-"])
    return rows([f"a CT's masks (table 5), Dice, {found['arguments']['n_full']} phantoms", "without its report",
                 "with it", "wanted"], lines)


def anatomy(found):
    table, lines = found["table"], []
    for c, name in {"airway": "airway", "vessel": "vessels", "lobe": "lungs, by the lobe mask"}.items():
        alone = table[f"fixed: {c}"][f"dice {c}"]
        numbers = table["phantoms"][f"dice {c}"], alone, table["fixed: lobe, airway, vessel"][f"dice {c}"]
        lines.append([name, *(f"{v:.2f}" for v in numbers),
                      wanted("0.8", f"{alone:.2f}", alone >= 0.8) if c == "airway" else "-"])
    within, elsewhere = table["sd over seeds, HU"].values()
    lines.append(["the CT's standard deviation over 4 seeds with one airway, HU", "-",
                  f"{within:.0f} in it, {elsewhere:.0f} elsewhere", "-",
                  wanted("less in it", f"{within / elsewhere:.1f} times", within < elsewhere)])
    return rows([f"seen in the CT where a mask was fixed (sec. 4.4), Dice, {found['arguments']['n_full']} phantoms",
                 "phantoms themselves", "that mask alone", "all three", "wanted"], lines)


DETAIL = {"Dice of airways": ("dice airway", ".3f"), "vessels": ("dice vessel", ".3f"), "bones": ("dice bones", ".3f"),
          "CT error, HU: all": ("CT error, HU", ".1f"), "body": ("in the body", ".1f"), "edges": ("at edges", ".0f"),
          "gradient / true: all": ("sharpness of the CT / true", ".2f"), "at edges": ("sharpness at edges", ".2f"),
          "FID, random features": ("FID, random features", ".5f")}
SAID = {"up-sampled": "trilinear up-sampling", "phantoms": "phantoms themselves"}


def detail(found):
    """Of `detail`, or of stage 2 in steps.json: {"dpm 3": measures}."""
    n, lines = found["arguments"].get("n_full", found["arguments"]["n"]), []
    for who, r in found["table"].items():
        numbers = (format(r[k], form) if k in r else "-" for k, form in DETAIL.values())
        lines.append([SAID.get(who, who.replace("dpm", "steps:")), *numbers])
    return rows([f"{n} phantoms, stage 2 from true low volumes", *DETAIL], lines)


def memory(found):
    table = found["table"]
    p, who = table["same distribution"]["Kolmogorov-Smirnov p"], ("held-out phantoms", "samples")
    return rows([f"nearest training phantom, {found['arguments']['n']} each", "mean", "lowest", "wanted"], [
        [name, f"{table[name]['nearest, mean']:.3f}", f"{table[name]['lowest']:.3f}",
         "-" if name == who[0] else wanted("the same distribution", f"p = {p:.2g}", p > 0.05)] for name in who])


# --- fewer steps ---

def stage_1(found):
    """Of stage 1 in steps.json: {"ddim 4": measures}."""
    says = [fill(say(r, "phantoms"), r) for r in found["table"].values() for _, say, _ in TEXT]
    n = len(TEXT)
    lines = [[{"ddim": "DDIM", "dpm": "DPM-Solver++"}[solver], steps, *says[i * n:(i + 1) * n],
              f"{r['effusion ratio']:.0f}", f"{r['from the limit']:.3f}"]
             for i, ((solver, steps), r) in enumerate((k.split(), r) for k, r in found["table"].items())]
    return rows(["solver", "steps", *(re.sub(r" \(table \d\)", "", name) for name, *_ in TEXT), "effusion, ratio",
                 "from the limit"], lines)


KINDS = dict(text=text, full=text, segmentation=segmentation, anatomy=anatomy, detail=detail, memory=memory)


def table(model, part):
    """The table of a model's `part`, a part of obey.py or "stage 1", "stage 2" of steps.py.   -> markdown"""
    if part.startswith("stage"):
        found = json.loads((ROOT / "benchmarks/steps.json").read_text())[model][part]
        n = f"--n {found['arguments']['n']}" if part == "stage 1" else f"--n-full {found['arguments']['n']}"
        how = f"`python benchmarks/steps.py --model checkpoints/{model} --stages \"{part}\" {n}`"
        return {"stage 1": stage_1, "stage 2": detail}[part](found) + f"{how}, {found['date']}.\n"
    found = json.loads((ROOT / OBEYED[model]).read_text())[part]
    a, s = found["arguments"], found["sampling"]
    how = (f"`python benchmarks/obey.py --model checkpoints/{model} --seed {a['seed']} --n {a['n']} "
           f"--n-full {a['n_full']} --low-steps {s['low_steps']} --sr-steps {s['sr_steps']} --parts {part}`, "
           f"{found['date']}.\n")
    return KINDS[part](found) + how


def filled(page):
    """A page with its tables as the JSON files have them."""
    return TABLE.sub(lambda m: m[1] + table(m[2], m[3]), page)


def main(argv=None):
    Parser(description=__doc__).parse_args(argv)
    with exits():
        for name in PAGES:
            page = (ROOT / name).read_text(encoding="utf-8")
            write_atomic(ROOT / name, filled(page).encode())
            print(f"wrote {len(TABLE.findall(page))} tables into {name}")


if __name__ == "__main__":
    main()
