"""`retain merge`: words and recipes, exit codes, and that a failed merge leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tiny
from retain import cli
from retain.adapters.bank import Mix
from retain.adapters.peft_format import load_peft, merge_into_base, save_peft
from retain.files import write_atomic
from retain.models.hf import HFModel


def call(*args: object) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in args])


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    """Three adapters of the tiny LLaVA with a projector each, as `retain export` writes them, and the base."""
    model = tiny.model()
    tiny.fill(model.adapters, "a", "b", "c")
    hf, processor = tiny.BUILDERS["llava"](0)
    hf.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    return [save_peft(model.adapters, name, tmp_path / name, "tiny") for name in ("a", "b", "c")]


def test_words_and_recipe_say_the_same(adapters: list[Path], tmp_path: Path) -> None:
    a, b, _ = adapters
    done = call(
        "merge",
        a,
        b,
        "--with",
        "copa",
        "density=0.3",
        "lambda=1.5",
        "--weights",
        "1,0.5",
        "--to",
        tmp_path / "w",
    )
    assert done.exit_code == 0, done.output
    assert "modules merged by copa; rank 8" in done.output and "full copies" in done.output
    (tmp_path / "r.yaml").write_text(
        "models:\n  - a\n  - {model: b, weight: 0.5}\nmethod: copa\nparameters: {density: 0.3, lambda: 1.5}\nto: y\n"
    )
    assert call("merge", tmp_path / "r.yaml").exit_code == 0
    left, right = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("w", "y"))
    assert all(torch.equal(left[k], right[k]) for k in left) and left.keys() == right.keys()
    assert (
        call("merge", tmp_path / "r.yaml", "--to", tmp_path / "z").exit_code == 0
        and (tmp_path / "z").is_dir()
    )


def test_the_result_runs_in_ours_and_as_a_checkpoint(adapters: list[Path], tmp_path: Path) -> None:
    """An average of three: the adapter's logits are those of the mix, and so are the checkpoint's."""
    assert call("merge", *adapters, "--to", tmp_path / "out").exit_code == 0
    done = call("merge", *adapters, "--merged", "--base", tmp_path / "base", "--to", tmp_path / "whole")
    assert done.exit_code == 0, done.output
    model = tiny.model()
    tiny.fill(model.adapters, "a", "b", "c")
    batch = model.collate(tiny.examples(), answers=True)
    with model.adapters.using(Mix(dict.fromkeys(("a", "b", "c"), 1 / 3))):
        want = model(batch).logits_NV
    rank = json.loads((tmp_path / "out/adapter_config.json").read_text())["r"]
    wide = tiny.model(spec=type(tiny.SPEC)(rank=rank, alpha=rank))
    load_peft(wide.adapters, "merged", tmp_path / "out")
    with wide.adapters.using(Mix({"merged": 1.0})):
        torch.testing.assert_close(wide(batch).logits_NV, want, atol=1e-4, rtol=0)
    whole = HFModel.load(tmp_path / "whole", tiny.SPEC)
    torch.testing.assert_close(whole(batch).logits_NV, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--with", "tise"], "no merger 'tise'; did you mean 'ties'"),
        (["--with", "ties", "densty=1"], "no parameter 'densty'; did you mean 'density'"),
        (["--with", "ties", "density=2"], "ties.density: must be at least 0 and at most 1"),
        (["--weights", "1"], "1 numbers for 3 adapters"),
        (["--weights", "a,b,c"], "write numbers"),
        (["--keep", "half"], "keep: 'half' is none of"),
        (["--merged"], "name it with --base"),
        (["nowhere"], "nowhere: no such folder"),
        (["--with", "fisher"], "fisher needs fishers"),
        (["--with", "slerp"], "slerp takes 2 adapters, not 3"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    words: list[str], told: str, adapters: list[Path], tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    done = call("merge", *adapters, *words, "--to", tmp_path / "out")
    assert done.exit_code == 2 and told in done.output.replace("\n", " ")
    assert sorted(tmp_path.iterdir()) == before


def test_a_killed_merge_is_swept_at_the_next_run(adapters: list[Path], tmp_path: Path) -> None:
    """What a process left that no longer lives; what a living one writes is left alone, and so is everything else."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    dead, alive = tmp_path / f".out.part-{gone.pid}", tmp_path / f".out.part-{os.getppid()}"
    others = [
        alive,
        tmp_path / f".other.part-{gone.pid}",
        tmp_path / ".out.part-mine",
        tmp_path / "out.part-1",
    ]
    for folder in (dead, *others):
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"half")
    assert call("merge", *adapters, "--to", tmp_path / "out").exit_code == 0
    assert not dead.exists() and all(len(list(o.iterdir())) == 1 for o in others)
    (tmp_path / f".late.part-{os.getpid()}").mkdir()  # a namesake in an earlier life of this number
    assert call("merge", *adapters, "--to", tmp_path / "late").exit_code == 0
    assert not (tmp_path / f".late.part-{os.getpid()}").exists()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_permissions_that_the_user_asks_for(
    umask: int, adapters: list[Path], tmp_path: Path
) -> None:
    """safetensors makes files that only their owner can read; a shared folder needs others to."""
    before = os.umask(umask)
    try:
        base = tmp_path / "base"
        assert call("merge", *adapters, "--to", tmp_path / "out").exit_code == 0
        assert call("merge", *adapters, "--merged", "--base", base, "--to", tmp_path / "whole").exit_code == 0
        model = tiny.model()
        tiny.fill(model.adapters, "a")
        save_peft(model.adapters, "a", tmp_path / "mine", "tiny")
        merge_into_base(model, Mix({"a": 1.0}), tmp_path / "merged")
        write_atomic(tmp_path / "rows/a.safetensors", lambda p: save_file({"a": torch.ones(2)}, p))
    finally:
        os.umask(before)
    for folder in ("out", "whole", "mine", "merged", "rows"):
        files = [p for p in (tmp_path / folder).rglob("*") if p.is_file()]
        assert files and {oct(p.stat().st_mode & 0o777) for p in files} == {oct(0o666 & ~umask)}, folder


def test_ctrl_c_inside_compiled_code_is_ctrl_c(
    adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors swallows it while it reads, and fails with a ValueError of its own."""

    def reads(*args: Any, **kwargs: Any) -> None:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'")

    here = signal.signal(
        signal.SIGINT, before := signal.default_int_handler
    )  # a shell's background job ignores it
    try:
        monkeypatch.setattr("retain.merge.folders.save_file", reads)
        done = call("merge", *adapters, "--to", tmp_path / "out")
        assert done.exit_code == 130 and "starts again from the beginning" in done.output
        assert signal.getsignal(signal.SIGINT) is before and not list(tmp_path.glob("*out*"))
    finally:
        signal.signal(signal.SIGINT, here)


@pytest.mark.parametrize("command", ["merge", "export"])
def test_ctrl_c_says_what_is_left(
    command: str, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    if command == "merge":
        monkeypatch.setattr("retain.merge.folders.save_file", interrupt)  # the last thing that a merge does
        done = call("merge", *adapters, "--to", tmp_path / "out")
    else:
        monkeypatch.setattr("retain.commands.export.export", interrupt)
        done = call("export", tmp_path / "run", "--to", tmp_path / "out")
    assert done.exit_code == 130 and "continues" not in done.output
    assert "nothing was written, and the same command starts again from the beginning" in done.output
    assert sorted(tmp_path.iterdir()) == before
    monkeypatch.setattr("retain.commands.run.start", interrupt)
    (tmp_path / "r.yaml").write_text("model: pocket\nstream: pocket\nmethod: lora\n")
    assert "what was saved is kept, and the same command continues" in call("run", tmp_path / "r.yaml").output


def test_more_errors(adapters: list[Path], tmp_path: Path) -> None:
    assert "where to?" in call("merge", *adapters).output
    assert "name at least one adapter" in call("merge", "--to", tmp_path / "x").output
    (tmp_path / "r.yaml").write_text("models: [a]\nmethode: ties\n")
    assert "no key 'methode'; did you mean 'method'" in call("merge", tmp_path / "r.yaml").output
    (tmp_path / "r.yaml").write_text("models: []\nmethod: ties\n")
    assert "the list is empty" in call("merge", tmp_path / "r.yaml", "--to", tmp_path / "x").output
    listed = call("merge", "--list").output
    assert "copa" in listed and "knots_ties" in listed
