"""Fills the generated parts of README.md (the method table, the annotated tree, the results, and --help), the families
of docs/models.md, the row `Ours` of every method's card, and what a pocket recipe says to expect.

    python scripts/docs.py            # rewrite
    python scripts/docs.py --check    # exit 1 where a part is out of date (make check)

A part stands between `<!-- begin:NAME -->` and `<!-- end:NAME -->`. The numbers of cards and
recipes are those of docs/results.md.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from retain.method import Method, available

ROOT = Path(__file__).resolve().parent.parent
HOOKS = [
    "stages",
    "adapt",
    "begin_task",
    "data",
    "batch_mix",
    "loss",
    "grads",
    "after_step",
    "end_task",
    "route",
]


def methods() -> str:
    """One row per registered method: what it does, where it acts, its card."""
    lines = ["| method | what it does | acts at | source |", "|---|---|---|---|"]
    for name, cls in available().items():
        hooks = ", ".join(f"`{h}`" for h in HOOKS if getattr(cls, h) is not getattr(Method, h))
        card = f"docs/methods/{name}.md"
        shown = f"[`{name}`]({card})" if (ROOT / card).is_file() else f"`{name}`"
        lines.append(f"| {shown} | {cls.about} | {hooks} | {cls.source} |")
    return "\n".join(lines)


def servers() -> str:
    """One row per federated server: what it does, its card."""
    from retain.federated.server import known

    cards = {"fedavgm": "fedopt", "fedadam": "fedopt", "fedyogi": "fedopt", "fedadagrad": "fedopt", "median": "robust",
             "trimmed_mean": "robust", "krum": "robust", "clipped": "robust", "fedprox": "fedavg"}  # fmt: skip
    lines = ["| server | what it does | source |", "|---|---|---|"]
    for name, cls in known().items():
        lines.append(f"| [`{name}`](methods/{cards.get(name, name)}.md) | {cls.about} | {cls.source} |")
    return "\n".join(lines)


def tree() -> str:
    """The package's files with the first sentence of each."""
    base, lines = ROOT / "src" / "retain", ["```", "src/retain/"]
    for path in sorted(base.rglob("*.py"), key=lambda p: (p.parent.relative_to(base).parts, p.name)):
        name = path.relative_to(base).as_posix()
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf8"))) or ""
        first = re.split(r"(?<=[.:])\s", doc.replace("\n", " "), maxsplit=1)[0].rstrip(":.")
        if path.name == "__init__.py" and path.parent == base:
            continue
        lines.append(f"  {name:32s} {first[:110]}")
    return "\n".join([*lines, "```"])


def results() -> str:
    """The table of docs/results.md, as it stands there."""
    path = ROOT / "docs" / "results.md"
    text = path.read_text(encoding="utf8") if path.is_file() else ""
    found = re.search(r"<!-- table -->\n(.*?)\n<!-- /table -->", text, re.DOTALL)
    return found[1] if found else "Not measured yet: `make pocket-table`."


def usage() -> str:
    """`retain --help`, in plain text."""
    env = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1", "PATH": "/usr/bin:/bin"}
    out = subprocess.run(
        [sys.executable, "-m", "retain.cli", "--help"], capture_output=True, text=True, env=env, check=True
    )
    return "```\n" + "\n".join(line.rstrip() for line in out.stdout.strip().splitlines()) + "\n```"


CASES = {
    "text": "words alone", "one": "a picture", "two": "two pictures", "sizes": "of unlike size", "between": "between words",
    "system": "system turn", "turns": "several turns", "lengths": "batch = alone",
}  # fmt: skip


def families() -> str:
    """One row per family of tests/zoo.py: which conversations tests/test_zoo.py holds against Hugging Face's own call."""
    sys.path.insert(0, str(ROOT / "tests"))
    import test_zoo
    import zoo

    tested = {p.values for p in test_zoo.pairs()}
    runs = {"LoRA run, PEFT and merged export": test_zoo.WORKING, "routed run": test_zoo.WORKING}
    lines = [
        f"| family | class | {' | '.join([*CASES.values(), *runs])} |",
        "|---" * (2 + len(CASES) + len(runs)) + "|",
    ]
    for name, make in (zoo.FAMILIES | zoo.TEXT_ONLY).items():
        about = (make.__doc__ or "").split(":")[0].split(" (")
        cells = []
        for case in CASES:
            pictures = case in ("one", "two", "sizes", "between")
            told = "refused" if (name, case) in test_zoo.NOT_TAKEN else "–"
            cells.append("yes" if (name, case) in tested else "–" if pictures else told)
        done = ["yes" if name in names else "–" for names in runs.values()]
        lines.append(f"| {about[0]} | `{make().architecture}` | {' | '.join([*cells, *done])} |")
    return "\n".join(lines)


PARTS: dict[str, Callable[[], str]] = {
    "methods": methods, "tree": tree, "results": results, "usage": usage, "families": families,
    "servers": servers,
}  # fmt: skip


def measured(page: str = "results.md") -> dict[str, dict[str, str]]:
    """Recipe to its row in a page of results, the tasks in their default order; only those that have an end."""
    path = ROOT / "docs" / page
    out: dict[str, dict[str, str]] = {}
    section, columns = "", list[str]()
    for line in path.read_text(encoding="utf8").splitlines() if path.is_file() else ():
        if line.startswith("## "):
            section = line
        elif line in ("<!-- table -->", "<!-- /table -->"):
            columns = []
        elif line.startswith("|") and "Order" not in section:
            cells = [c.strip() for c in line.strip("|").split("|")]
            if cells[0] == "Method" and "Last" in cells:
                columns = cells
            elif columns and len(cells) == len(columns) and "---" not in cells[1]:
                row = dict(zip(columns, cells, strict=True))
                if row["Last"] != "–":
                    out.setdefault(row["Method"], row)
    return out


def ended(row: dict[str, str]) -> str:
    """A row's end and its forgetting, in words."""
    forgetting = "" if row["Forgetting"] == "–" else f", forgetting {row['Forgetting']}"
    return f"Last {row['Last']}{forgetting} ({row['Seeds']} seed{'s' * (row['Seeds'] != '1')})"


def card(text: str, rows: dict[str, dict[str, str]]) -> str:
    """A card with its row `Ours` made anew."""
    recipe = re.search(r"^\| Recipe \|.*$", text, re.MULTILINE)
    names = re.findall(r"(\w+)\.yaml", recipe[0]) if recipe else []
    told = "; ".join(f"`{n}` {ended(rows[n])}" for n in names if n in rows)
    row = f"| Ours | {told + ': ' if told else 'see '}[results](../results.md) |"
    return re.sub(r"^\| Ours \|.*$", lambda _: row, text, count=1, flags=re.MULTILINE)


def expectation(text: str, row: dict[str, str] | None, page: str = "results.md") -> str:
    """A recipe whose comment says what to expect, as measured."""
    if row is None:
        return text
    trained = row["Trainable"] != "0"
    lines = {
        "time:    ": f"{row['Train time']} of training on one core"
        if trained
        else "seconds, nothing is trained",
        "expected:": f"{ended(row)}; docs/{page}",
    }
    for key, told in lines.items():
        text = re.sub(rf"^# {key} .*$", f"# {key} {told}", text, count=1, flags=re.MULTILINE)
    return text


RESULTS = {"pocket": "results.md", "pocket_long": "results_long.md"}
"""Folders of recipes and the page that has their results."""


def filled(text: str) -> str:
    """The same text with every generated part made anew."""
    for name, make in PARTS.items():
        pattern = re.compile(rf"(<!-- begin:{name} -->\n).*?(<!-- end:{name} -->)", re.DOTALL)
        if pattern.search(text):
            body = make()
            text = pattern.sub(lambda m, body=body: f"{m[1]}{body}\n{m[2]}", text)
    return text


def made(path: Path, text: str, rows: dict[str, dict[str, str]]) -> str:
    """The text that a file should have."""
    if path.suffix == ".yaml":
        return expectation(text, rows.get(path.stem), RESULTS[path.parent.name])
    return card(text, rows) if path.parent.name == "methods" else filled(text)


def main() -> int:
    stale, rows = [], {folder: measured(page) for folder, page in RESULTS.items()}
    cards = (ROOT / "docs" / "methods").glob("*.md")
    recipes = [path for folder in RESULTS for path in (ROOT / "recipes" / folder).glob("*.yaml")]
    for path in [
        ROOT / "README.md",
        ROOT / "docs" / "models.md",
        ROOT / "docs" / "federated.md",
        *sorted(cards),
        *sorted(recipes),
    ]:
        old = path.read_text(encoding="utf8")
        new = made(path, old, rows.get(path.parent.name, rows["pocket"]))
        if new != old:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf8")
    print(f"{'out of date' if '--check' in sys.argv else 'rewritten'}: {stale or 'nothing'}")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    raise SystemExit(main())
