"""The command line: it parses, calls the library and prints. Nothing is decided here.

An error that a user can mend is one message on stderr and exit code 2; Ctrl-C ends with 130 and SIGTERM with 143, and
they say whether the same command continues or starts again (`retain.signals`); a reader that closes the pipe (`| head`)
ends it quietly.
"""

from __future__ import annotations

from retain import signals

if __name__ == "__main__":
    signals.watch()  # before what takes long to import

import errno
import io
import os
import sys
import webbrowser
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors import SafetensorError
from typer.core import TyperGroup

from retain import __version__

USAGE: type[Exception] = typer.BadParameter.__mro__[1]  # UsageError of the click that typer brings
HELP = "NoArgsIsHelpError"  # of that click: no mistake, the help is shown


def _path(param: typer.CallbackParam, value: Any) -> Any:
    """A path that can be one, `~` replaced: RetainError otherwise. Lists are those of an argument that repeats."""
    from retain.plain import real_path

    if value is None or isinstance(value, list | tuple):
        return value and [_path(param, v) for v in value]
    return real_path(value, f"{'--' if param.param_type_name == 'option' else ''}{param.name}")


def _file(param: typer.CallbackParam, value: Path | None) -> Path | None:
    """A file to write: new, or in the place of a file, never of a folder, a pipe or a device."""
    from retain.types import RetainError

    path: Path | None = _path(param, value)
    if path and path.exists() and not path.is_file():
        raise RetainError(
            f"--{param.name}: {path} is {'a folder' if path.is_dir() else 'a device or a pipe'}; name a file"
        )
    return path


def _folder(param: typer.CallbackParam, value: Path | None) -> Path | None:
    """A folder to write: new, or there, and then the command says what it may hold."""
    from retain.types import RetainError

    path: Path | None = _path(param, value)
    if path and path.exists() and not path.is_dir():
        raise RetainError(f"--{param.name}: {path} is no folder")
    return path


Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value, such as seed=3 or optim.lr=1e-3", show_default=False)
]
RecipeFile = Annotated[
    Path, typer.Argument(help="a recipe (YAML)", metavar="RECIPE", show_default=False, callback=_path)
]
RunFolder = Annotated[
    Path, typer.Argument(help="a run folder", metavar="RUN", show_default=False, callback=_path)
]
RunFolders = Annotated[
    list[Path], typer.Argument(help="run folders", metavar="RUN…", show_default=False, callback=_path)
]


class _Commands(TyperGroup):
    """All commands, with one place where errors become messages."""

    def make_context(self, *args: Any, **more: Any) -> Any:
        try:
            return super().make_context(*args, **more)
        except USAGE as error:
            _misused(error)

    def invoke(self, ctx: Any) -> Any:
        try:
            with signals.watching():
                return self._invoke(ctx)
        except BaseException as error:
            ends = isinstance(error, signals.Told | signals.Stopped | KeyboardInterrupt)
            if not ends and not signals.told():
                raise
            raise typer.Exit(signals.end(error, ctx.invoked_subcommand)) from None

    def _invoke(self, ctx: Any) -> Any:
        from retain.types import RetainError  # here, not above: it imports torch, and --help need not wait

        try:
            return super().invoke(ctx)
        except RetainError as error:
            _fail(str(error))
        except USAGE as error:
            _misused(error)
        except (MemoryError, RuntimeError) as error:
            from retain.run.engine import out_of_memory

            if not out_of_memory(error):
                raise
            _fail(f"out of memory: {error}; what was saved before is kept")
        except (OSError, SafetensorError) as error:
            if isinstance(error, BrokenPipeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at exit
                raise typer.Exit(0) from None
            _fail(_told(error))


def _misused(error: Any) -> None:
    """A word too few, too many or misspelt on the command line; the help where there is no word at all."""
    if type(error).__name__ == HELP:
        raise error
    path = getattr(getattr(error, "ctx", None), "command_path", "retain")
    _fail(f"{error.format_message().rstrip('.')}; `{path} --help` shows how")


LONGEST = 3000
"""Characters of a message."""


def _fail(message: str) -> None:
    if (
        signals.told()
    ):  # compiled code makes another error of a signal (safetensors: a ValueError while it reads)
        raise signals.Told
    world = os.environ.get("WORLD_SIZE", "1")  # a launcher's processes share a screen
    who = f"rank {os.environ.get('RANK', '?')} of {world}: " if world != "1" else ""
    line = " ".join(f"{who}{message}".split())  # a library's own message may have several
    line = "".join(
        c if c.isprintable() else repr(c)[1:-1] for c in line
    )  # and what moves a terminal's cursor
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 :]}"
    print(f"error: {line}", file=sys.stderr)  # noqa: T201
    raise typer.Exit(2)


def _told(error: OSError | SafetensorError) -> str:
    """A system error in one sentence, with the file where there is one."""
    if isinstance(error, SafetensorError):
        return f"a safetensors file could not be read or written: {error}; what was saved before is kept"
    about = f"{error.filename}: " if error.filename else ""
    saved = (
        "; what was saved before is kept" if error.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT) else ""
    )
    return f"{about}{error.strerror or error}{saved}"


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tune a multimodal language model on one task after another and keep what it already knew.",
)


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="print the version and end")] = False,
) -> None:
    if version:
        typer.echo(f"retain {__version__}")
        raise typer.Exit


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="print the result only")] = False,
) -> None:
    """Learn a stream with a method. After a crash the same command continues."""
    from retain import config
    from retain.commands.run import start, tables
    from retain.metrics import render

    r = config.load(recipe, overrides or [])
    matrix, main_process = start(r, quiet=quiet, stop=signals.patience)
    if main_process:
        for rows, title in tables(r, matrix):
            render.show(rows, title)
        typer.echo(f"next: retain report {r.out} --open")


@app.command()
def methods() -> None:
    """Which methods there are, where they come from, which hooks they use."""
    from retain.commands.explain import method_rows
    from retain.metrics import render

    render.show(method_rows())


@app.command()
def explain(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Which part of a recipe's method acts at which hook of the loop."""
    from retain import config
    from retain.assemble import build_method
    from retain.commands.explain import hook_rows
    from retain.metrics import render

    method = build_method(config.load(recipe, overrides or []))
    render.show(hook_rows(method), f"{recipe}: the loop, and who acts where")


@app.command()
def doctor(
    recipe: Annotated[
        Path | None,
        typer.Argument(help="a recipe (YAML)", metavar="RECIPE", show_default=False, callback=_path),
    ] = None,
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option(help="a model's folder or Hub id: compare it with Hugging Face's own call")
    ] = None,
) -> None:
    """Check a stream's data: images, ids, duplicates, leakage, what the references themselves score, lengths."""
    from retain import config
    from retain.commands import doctor as of_data
    from retain.metrics import render
    from retain.types import RetainError

    if model is not None and recipe is None:
        findings, passed = of_data.compared(model)
        render.show(findings, f"{model}: retain beside Hugging Face's own call")
        raise typer.Exit(0 if passed else 1)
    if recipe is None or model is not None:
        raise RetainError(
            "doctor: name a recipe, whose data are looked at, or --model with a model to compare"
        )
    made = of_data.report(
        config.load(recipe, [*(overrides or []), "eval.split=test"])
    )  # every split as it is
    for rows, title in of_data.tables(made):
        render.show(rows, title)
    typer.echo(made.summary)
    raise typer.Exit(1 if made.errors else 0)


@app.command()
def plan(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Dry run: stages, samples, steps, parameters, estimated memory and time, before anything is loaded."""
    from retain import config
    from retain.commands.plan import bare_rows, make_plan, stage_rows, total_rows
    from retain.metrics import render

    made = make_plan(config.load(recipe, overrides or []))
    render.show(stage_rows(made), f"{recipe}: stages")
    render.show(total_rows(made))
    render.show(bare_rows(made))


@app.command()
def compare(
    runs: RunFolders,
    against: Annotated[str | None, typer.Option(help="the method or run to test the others against")] = None,
) -> None:
    """One table over runs: metrics with intervals, budgets, paired tests; seeds of a recipe are averaged."""
    from retain.report.tables import compare as print_tables

    print_tables(runs, against=against)


@app.command()
def report(
    runs: RunFolders,
    out: Annotated[
        Path | None,
        typer.Option(help="default: report.html in the run, or beside several", callback=_file),
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="show it in a browser")] = False,
) -> None:
    """One HTML page: matrix, curves, forgetting, what was forgotten, budget, config."""
    from retain.report.html import write_report

    target = out or (runs[0] if len(runs) == 1 else runs[0].parent) / "report.html"
    write_report(runs, target)
    typer.echo(f"{target}")
    if open_it:
        webbrowser.open(target.resolve().as_uri())


@app.command()
def evaluate(
    run_folder: RunFolder,
    task: Annotated[list[str] | None, typer.Option(help="only these tasks")] = None,
    after: Annotated[
        int | None, typer.Option(help="only the row after this many tasks (0: zero-shot)")
    ] = None,
    score: Annotated[str | None, typer.Option(help="another scorer than the recipe's")] = None,
) -> None:
    """Score the saved answers again, without training or generating; nothing is written."""
    from retain.commands.evaluate import cell_rows, rescore
    from retain.metrics import render

    render.show(cell_rows(rescore(run_folder, tasks=task or (), after=after, scorer=score)))


@app.command()
def export(
    run_folder: RunFolder,
    to: Annotated[Path, typer.Option(help="folder to write", callback=_folder)],
    after: Annotated[
        int | None, typer.Option(help="the model after this many tasks; default: the last")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="which adapter, where the run has several")] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="a plain HF checkpoint with the adapter inside")
    ] = False,
) -> None:
    """A stock PEFT adapter, or with --merged a plain HF checkpoint; logits are checked before and after."""
    from retain.commands.export import export as export_run

    typer.echo(export_run(run_folder, to, after=after, adapter=adapter, merged=merged))


@app.command()
def merge(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            help="PEFT folders and key=value parameters, or one recipe.yaml",
            metavar="ADAPTER…",
            show_default=False,
        ),
    ] = None,
    method: Annotated[str, typer.Option("--with", help="the merger; see --list")] = "average",
    to: Annotated[Path | None, typer.Option(help="folder to write", callback=_folder)] = None,
    weights: Annotated[str | None, typer.Option(help="one number per adapter, such as 1,0.5")] = None,
    keep: Annotated[
        str | None, typer.Option(help="auto, cat (exact), svd (truncated to --rank)", show_default=False)
    ] = None,
    rank: Annotated[int, typer.Option(help="rank to truncate to; 0: as the inputs have it")] = 0,
    merged: Annotated[bool, typer.Option("--merged", help="a plain HF checkpoint; needs --base")] = False,
    base: Annotated[str | None, typer.Option(help="the base model's folder (for --merged, DoRA)")] = None,
    any_base: Annotated[bool, typer.Option("--any-base", help="also if base names differ")] = False,
    list_them: Annotated[bool, typer.Option("--list", help="print the mergers and end")] = False,
) -> None:
    """Several PEFT adapters in, one out, without training."""
    from retain.commands import merge as merging
    from retain.metrics import render

    words = adapters or []
    if list_them:
        render.show(merging.merger_rows())
        return
    if len(words) == 1 and words[0].endswith((".yaml", ".yml")):
        spec = merging.from_file(Path(words[0]), to, merged)
    else:
        more = {"keep": keep, "rank": rank, "merged": merged, "base": base, "any_base": any_base}
        spec = merging.from_words(words, method, weights, to, **more)
    typer.echo(merging.merge(spec).text())


analyse = typer.Typer(no_args_is_help=True, help="Measurements on finished runs.")
app.add_typer(analyse, name="analyse")


@analyse.command()
def cka(
    runs: RunFolders,
    samples: Annotated[
        int, typer.Option(help="test samples that every model reads", min=1, max=1_000_000)
    ] = 50,
    out: Annotated[
        Path | None,
        typer.Option(help="default: cka.html (and .json) in the run, or beside several", callback=_file),
    ] = None,
) -> None:
    """How alike the models of the tasks are in each layer: which layers to route, which to sum."""
    from retain.commands.analyse import cka as of_layers
    from retain.metrics import render

    found = of_layers.study(runs, samples)
    render.show(of_layers.rows(found), "CKA between the models of different tasks, mean over pairs")
    target = out or (runs[0] if len(runs) == 1 else runs[0].parent) / "cka.html"
    data, picture = of_layers.write(found, target)
    typer.echo(f"{data}\n{picture}")


@analyse.command("merge")
def analyse_merge(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="a merge_tasks run, or a merged PEFT folder and those it was made from",
            metavar="RUN…",
            show_default=False,
            callback=_path,
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="default: merge.html (and .json) in the run", callback=_file)
    ] = None,
) -> None:
    """What merging did to the adapters' directions: cosines, singular values, what is left, by layer."""
    from retain.commands.analyse import merge as of_directions
    from retain.metrics import render

    found = of_directions.study(runs)
    render.show(of_directions.rows(found), "directions of the single tasks after merging, mean over modules")
    folder = runs[0] if len(runs) == 1 else runs[0].parent
    data, picture = of_directions.write(found, out or folder / "merge.html")
    typer.echo(f"{data}\n{picture}")


federate = typer.Typer(no_args_is_help=True, help="A federated recipe on Flower (the extra `federated`).")
app.add_typer(federate, name="federate")
SuperLink = Annotated[str, typer.Option(help="host:port of the SuperLink", metavar="HOST:PORT")]
Roots = Annotated[
    Path | None, typer.Option(help="the certificate of the CA that signed the SuperLink's", callback=_path)
]
Insecure = Annotated[bool, typer.Option("--insecure", help="without TLS: for trials on one machine")]


@federate.command("server")
def federate_server(
    recipe: RecipeFile,
    superlink: SuperLink,
    overrides: Overrides = None,
    root_certificates: Roots = None,
    insecure: Insecure = False,
    wait: Annotated[
        float, typer.Option(help="seconds in which the clients must come", min=0, max=1e9)
    ] = 600.0,
) -> None:
    """Submit a recipe to a SuperLink and show its rounds. After a crash the same command continues."""
    from retain import config
    from retain.commands import federate as of_flower
    from retain.commands.superlink import Link

    link = Link.parse(superlink, root_certificates, insecure)
    of_flower.serve(config.load(recipe, overrides or []), link, wait)


@federate.command("client")
def federate_client(
    recipe: RecipeFile,
    superlink: SuperLink,
    data: Annotated[Path, typer.Option(help="this site's rows (YAML)", callback=_path)],
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="this site's name; default: that in --data")] = None,
    root_certificates: Roots = None,
    insecure: Insecure = False,
    key: Annotated[
        Path | None, typer.Option(help="this node's private key (ecdsa, OpenSSH)", callback=_path)
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(help="what stays here; default: kept-NAME beside --data", callback=_folder)
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(help="of the SuperNode on this machine; default: a free one", min=1, max=65535),
    ] = None,
) -> None:
    """Take part with this site's own rows; only adapters, tokens and counts leave it."""
    from retain.commands import federate as of_flower
    from retain.commands.superlink import Link

    link = Link.parse(superlink, root_certificates, insecure)
    of_flower.join(of_flower.Joining(recipe, overrides or [], data, link, name, key, keep, port))


@federate.command("split")
def federate_split(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Option(help="folder to write", callback=_folder)],
    overrides: Overrides = None,
) -> None:
    """Write each client's rows and its YAML from the recipe's split, for trials with sites of one's own."""
    from retain import config
    from retain.commands import federate as of_flower

    for line in of_flower.split(config.load(recipe, overrides or []), out):
        typer.echo(line)


def call() -> None:
    """Run the command line that is in `sys.argv`; it ends with SystemExit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that a terminal cannot show ends nothing
    odd = next((a for a in sys.argv[1:] if any("\ud800" <= c <= "\udfff" for c in a)), None)
    if odd is not None:
        print(f"error: the argument {odd!r:.100} is no UTF-8 text", file=sys.stderr)  # noqa: T201
        raise SystemExit(2)
    app()


def main() -> None:
    """Run the command line as a process of its own, and end it."""
    signals.watch()
    status: object = 0
    try:
        call()
    except SystemExit as end:
        status = end.code
    except BaseException as error:
        sys.last_value = error  # as Python does it: the group of processes asks at its end
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    signals.leave(status if isinstance(status, int) else int(status is not None))


if __name__ == "__main__":
    main()
