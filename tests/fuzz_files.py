"""Files that a stranger wrote, made worse by chance: rows, pictures, adapter folders, model folders.

Each kind starts from a healthy one, and changes one thing; a fifth of the cases change nothing that matters and must
be fine. The healthy model, adapter and shop are made once for a process and copied. See `fuzz` for cases and verdicts.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import socket
import tempfile
from collections.abc import Callable
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fuzz
import own_data
import zoo

FILES = fuzz.Registry()
Change = Callable[[random.Random, Path], str]
"""Changes a file of a folder; says what it did. What begins with `good` must be fine."""


class Raw(str):
    """JSON text that `json.dumps` would not write."""


def dumps(value: Any) -> str:
    """JSON with `Raw` parts as they are."""
    found: list[str] = []

    def put(v: Any) -> Any:
        if isinstance(v, Raw):
            found.append(str(v))
            return f"\0{len(found) - 1}\0"
        if isinstance(v, dict):
            return {k: put(x) for k, x in v.items()}
        return [put(x) for x in v] if isinstance(v, list) else v

    text = json.dumps(put(value))
    for i, raw in enumerate(found):
        text = text.replace(f'"\\u0000{i}\\u0000"', raw)
    return text


def nested(depth: int) -> Raw:
    return Raw("[" * depth + "]" * depth)


ODD: dict[str, Any] = {
    "nothing": None, "a list": [], "an object": {}, "text": "many", "empty text": "", "true": True, "minus one": -1,
    "zero": 0, "NaN": Raw("NaN"), "infinity": Raw("-Infinity"), "1e999": Raw("1e999"), "a half": 0.5,
    "400 digits": Raw("9" * 400), "5000 digits": Raw("9" * 5000), "10**9": 10**9, "10**18": 10**18,
    "half a surrogate pair": Raw('"a\\ud800b"'), "a NUL": "a\0b", "nested": nested(900), "deeply nested": nested(100_000),
    "a long text": "x" * 200_000, "a list of texts": ["a", "b"], "a list of lists": [[1], [2]], "a path out": "../../x",
    "an escape": "\x1b[2J\n", "a number as text": "3",
}  # fmt: skip
"""Values that stand where another is meant."""


def odd(rng: random.Random) -> tuple[str, Any]:
    name = rng.choice(sorted(ODD))
    return name, ODD[name]


def fields(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything in a JSON value, but not the value itself."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for k, v in items for p in [(*at, k), *fields(v, (*at, k))]]


def set_at(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for step in path[:-1]:
        value = value[step]
    value[path[-1]] = new


def del_at(value: Any, path: tuple[Any, ...]) -> None:
    for step in path[:-1]:
        value = value[step]
    del value[path[-1]]


def flipped(rng: random.Random, raw: bytes) -> bytes:
    """Some bytes changed, cut off, or put in."""
    out = bytearray(raw)
    how = rng.choice(["flip", "flips", "cut", "insert", "head"])
    if how == "cut":
        return bytes(out[: rng.randrange(len(out))])
    if how == "insert":
        at = rng.randrange(len(out))
        return bytes(out[:at] + rng.randbytes(rng.randint(1, 40)) + out[at:])
    for _ in range(1 if how == "flip" else rng.randint(2, 20)):
        at = rng.randrange(min(len(out), 64) if how == "head" else len(out))
        out[at] ^= 1 << rng.randrange(8)
    return bytes(out)


def broken_json(rng: random.Random, file: Path) -> str:
    """The file as no JSON, or as JSON of another shape."""
    text = file.read_text(encoding="utf-8")
    bad: dict[str, bytes] = {
        "empty": b"", "a list": b"[]", "a number": b"3", "null": b"null", "half": text[: len(text) // 2].encode(),
        "not UTF-8": b'{"\xff": 1}', "UTF-16": text.encode("utf-16"), "deep": str(nested(100_000)).encode(),
        "NULs": b"\0" * 100, "NaN": b"NaN", "twice": text.encode() * 2, "a text": b'"x"',
        "bytes changed": flipped(rng, text.encode()),
    }  # fmt: skip
    what = rng.choice(sorted(bad))
    file.write_bytes(bad[what])
    return f"{file.name}: {what}"


def not_a_file(rng: random.Random, file: Path) -> str:
    """A folder, a pipe, a device, a socket, a broken link, or nothing where a file is meant."""
    if file.exists():
        file.unlink()
    how = rng.choice(["folder", "pipe", "zero", "socket", "link", "loop", "nothing"])
    if how == "folder":
        file.mkdir()
    elif how == "pipe":
        os.mkfifo(file)
    elif how == "zero":
        file.symlink_to("/dev/zero")
    elif how == "socket":
        here = Path.cwd()
        with socket.socket(socket.AF_UNIX) as s:
            try:  # the path of a socket may have a hundred letters
                os.chdir(file.parent)
                s.bind(file.name)
            finally:
                os.chdir(here)
    elif how == "link":
        file.symlink_to("gone")
    elif how == "loop":
        file.symlink_to(file.name)
    return f"{file.name}: {how}"


# -- rows ----------------------------------------------------------------------------------------------------


@cache
def _shop() -> Path:
    """A healthy shop on the pocket model, without its recipe's model folder."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-shop-"))
    own_data.shop(folder, Path("pocket"), jsonl=False, n_train=4, n_test=2)
    return folder


def shop(home: Path) -> Path:
    """A copy of it; returns the recipe."""
    shutil.copytree(_shop(), home, dirs_exist_ok=True)
    recipe = home / "mine.yaml"
    recipe.write_text(recipe.read_text().replace(str(_shop()), str(home)))
    return recipe


ROW: dict[str, Any] = {
    "id": "r1", "image": "colour_train_0.png", "system": "Be brief.",
    "conversations": [{"from": "human", "value": "<image>\nWhat colour is it?"}, {"from": "gpt", "value": "red"}],
    "options": ["red", "green", "blue"], "answer_bbox": [0, 0, 10, 10], "size": [24, 24], "tolerance": 0.5,
    "source": "shop", "meta": {"note": {"by": ["a", "b"]}, "n": 3}, "references": ["red", "crimson"],
}  # fmt: skip
MESSAGES: dict[str, Any] = {
    "id": 7, "images": ["colour_train_0.png"],
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour?"}]},
        {"role": "assistant", "content": "red"},
    ],
}  # fmt: skip
ITEM: dict[str, Any] = {
    "question_id": 3,
    "image": "colour_train_0.png",
    "text": "What?",
    "answer": ["red", 3, 4.5],
}


@FILES.kind
def rows(rng: random.Random, home: Path) -> fuzz.Case:
    """One field of one row holds something else, is lost, or is called otherwise."""
    recipe = shop(home)
    row = json.loads(json.dumps(rng.choice([ROW, MESSAGES, ITEM])))
    path = rng.choice(fields(row))
    how = rng.choice(["value", "value", "value", "lost", "key", "good"])
    expect: fuzz.Expected = "any"
    if how == "value":
        name, new = odd(rng)
        set_at(row, path, new)
        what = f"{path}: {name}"
        if name in (
            "NaN",
            "infinity",
            "1e999",
            "400 digits",
            "5000 digits",
            "half a surrogate pair",
            "a NUL",
            "nested",
        ):
            expect = "bad"
    elif how == "lost":
        del_at(row, path)
        what = f"{path} is lost"
    elif how == "key":
        new_key = rng.choice(["\0", "x" * 100_000, "<image>", "\x1b[2J"])
        row[new_key] = rng.choice([1, "a", {}])
        what = f"a key {new_key[:8]!r}"
    else:
        row["extra"], expect, what = {"any": ["thing", 1, None, 2.5]}, "good", "good: a field more"
    kept = json.loads((home / "colour_train.json").read_text())
    for i, other in enumerate(kept):
        other["id"] = f"other-{i}"
    text = f"{dumps(kept)[:-1]}, {dumps(row)}]"
    if rng.random() < 0.5:  # as lines
        text = "".join(f"{dumps(r)}\n" for r in [*kept, row])
    (home / "colour_train.json").write_text(text, encoding="utf-8")
    words = ("colour_train.json", f"row {len(kept) + 1}") if expect == "bad" else ()
    return fuzz.Case(what, ("plan", str(recipe)), expect, words)


@FILES.kind
def data_files(rng: random.Random, home: Path) -> fuzz.Case:
    """The file of rows as a whole."""
    recipe, name = shop(home), rng.choice(["colour_train.json", "paint_test.json"])
    file = home / name
    how = rng.choice(["json", "file", "good", "line"])
    if how == "json":
        return fuzz.Case(broken_json(rng, file), ("plan", str(recipe)))
    if how == "file":
        return fuzz.Case(not_a_file(rng, file), ("plan", str(recipe)), "bad", (name,))
    data = json.loads(file.read_text())
    if how == "line":
        long = {**data[0], "id": "long", "notes": "x" * (33 * 2**20)}
        file.write_text("".join(json.dumps(r) + "\n" for r in [*data, long]))
        return fuzz.Case("a line of 33 MB", ("plan", str(recipe)), "bad", (name, f"row {len(data) + 1}"))
    lines = [json.dumps(r, ensure_ascii=rng.random() < 0.5) for r in data]
    end = rng.choice(["\n", "\r\n", "\n\n"])
    file.write_bytes((b"\xef\xbb\xbf" if rng.random() < 0.5 else b"") + (end.join(lines) + end).encode())
    return fuzz.Case(f"good: lines that end with {end!r}", ("plan", str(recipe)), "good")


LONG = ("a", "(", "1", " ", "'", "\n", "a, ", "a or ", ": a, ", "not ", "1.", "\U000f0000", "A. ", "from ")


@FILES.kind
def long_texts(rng: random.Random, home: Path) -> fuzz.Case:
    """Texts of hundreds of kilobytes for every pattern of doctor, scorers and chat template."""
    recipe, unit = shop(home), rng.choice(LONG)
    n = rng.choice([2_000, 40_000, 400_000])
    score = rng.choice(
        ["exact", "vqa", "contains", "choice", "number", "iou", "anls", "caption", "rouge_l", "bleu4"]
    )
    text = (unit * (n // len(unit) + 1))[:n] + rng.choice(["", "!", " red", "\n"])
    file = home / "colour_test.json"
    data = json.loads(file.read_text())
    turns = data[1]["conversations"]
    which = rng.choice(["question", "question", "answer"])
    turns[0 if which == "question" else 1]["value"] = text + ("\n<image>" if which == "question" else "z")
    file.write_text(json.dumps(data))
    args = ("doctor", str(recipe), f"stream.tasks.colour.score={score}")
    return fuzz.Case(f"{which}: {n:,} characters of {unit!r}, score {score}", args, "any", finds=True)


# -- pictures ------------------------------------------------------------------------------------------------


@cache
def files_of_pictures() -> dict[str, bytes]:
    photo = Image.linear_gradient("L").resize((24, 24)).convert("RGB")
    out = {}
    for name in (
        "PNG",
        "JPEG",
        "WEBP",
        "GIF",
        "BMP",
        "TIFF",
        "PPM",
        "AVIF",
        "JPEG2000",
        "TGA",
        "PCX",
        "ICO",
        "SGI",
        "QOI",
    ):
        try:
            buffer = BytesIO()
            photo.save(buffer, name)
            out[name] = buffer.getvalue()
        except (KeyError, OSError):  # a Pillow without it
            continue
    return out


FOREIGN = {
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n",
    "PDF": b"%PDF-1.4\n1 0 obj<<>>endobj\n",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a zip": b"PK\3\4" + b"\0" * 60,
    "WMF": b"\xd7\xcd\xc6\x9a\0\0" + b"\0" * 80,
    "GRIB": b"GRIB\0\0\0\1" + b"\0" * 60, "HDF5": b"\x89HDF\r\n\x1a\n" + b"\0" * 60,
    "a pickle": b"\x80\x04\x95\x10", "nothing": b"", "MPEG": b"\0\0\1\xb3\x01\0\x10" + b"\0" * 60, "FLI": b"\0" * 128,
}  # fmt: skip


@FILES.kind
def pictures(rng: random.Random, home: Path) -> fuzz.Case:
    """A picture with bytes changed, of a foreign format, or no file at all."""
    recipe = shop(home)
    file = home / "images" / "colour_train_1.png"
    args = (rng.choice(["plan", "doctor"]), str(recipe))
    how = rng.choice(["flip", "flip", "flip", "foreign", "file", "good"])
    if how == "file":
        return fuzz.Case(not_a_file(rng, file), args, "bad", ("colour_train.json", "row 2"))
    if how == "foreign":
        what = rng.choice(sorted(FOREIGN))
        file.write_bytes(FOREIGN[what])
        return fuzz.Case(what, args, "bad", ("colour_train.json", "row 2", "colour_train_1.png"))
    name = rng.choice(sorted(files_of_pictures()))
    raw = files_of_pictures()[name]
    file.write_bytes(raw if how == "good" else flipped(rng, raw))
    if how == "good":
        return fuzz.Case(f"good: {name} called .png", args, "good", finds=True)
    return fuzz.Case(f"{name} with bytes changed", args, "any", finds=True)


# -- adapters ------------------------------------------------------------------------------------------------


@cache
def _adapter() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-adapter-"))
    tensors = {}
    for layer in (0, 1):
        for name in ("q_proj", "v_proj"):
            path = f"base_model.model.model.language_model.layers.{layer}.self_attn.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.ones(2, 8) * 0.1
            tensors[f"{path}.lora_B.weight"] = torch.ones(8, 2) * 0.1
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "base_model_name_or_path": "x", "r": 2, "lora_alpha": 4, "use_rslora": False,
        "use_dora": False, "bias": "none", "fan_in_fan_out": False, "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {}, "alpha_pattern": {"layers.1.self_attn.q_proj": 8}, "modules_to_save": None,
        "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None, "init_lora_weights": True,
        "lora_bias": False, "lora_dropout": 0.0, "task_type": None, "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


PATTERNS = (
    "(a+)+$",
    "(.*.*)*",
    "(a|a)*",
    "(",
    "[",
    "a" * 200_000,
    "(a{1,999}){1,999}",
    "(?=(x+))+",
    r"(\w+\.)*\1",
    "a?" * 50,
)


def _tensors(rng: random.Random, folder: Path) -> str:
    """Tensors that fit no adapter."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = rng.choice(sorted(tensors))
    t = tensors.pop(key)
    bad: dict[str, dict[str, torch.Tensor]] = {
        "lost": {}, "of integers": {key: t.int()}, "of bytes": {key: t.to(torch.uint8)}, "empty": {key: torch.zeros(0, 8)},
        "NaN": {key: t * math.nan}, "infinite": {key: t / 0}, "flat": {key: t.flatten()},
        "turned": {key: t.T.contiguous()}, "a name with ..": {key.replace(".self_attn", "..self_attn"): t},
        "a name of 2000 letters": {key.replace("layers", "l" * 2000): t}, "no name": {"": t},
        "a path": {"../../" + key: t}, "of float8": {key: t.to(torch.float8_e4m3fn)}, "a scalar": {key: torch.tensor(1.0)},
    }  # fmt: skip
    what = rng.choice(sorted(bad))
    save_file(tensors | bad[what], file, {"format": "pt"})
    return f"a tensor {what}"


@FILES.kind
def adapters(rng: random.Random, home: Path) -> fuzz.Case:
    """Two adapter folders that are merged, one of them changed."""
    for name in ("a", "b"):
        shutil.copytree(_adapter(), home / name)
    folder, config = home / "b", home / "b" / "adapter_config.json"
    weights = folder / "adapter_model.safetensors"
    said = json.loads(config.read_text())
    how = rng.choice(["value", "value", "json", "file", "bytes", "pattern", "tensor", "pickle", "good"])
    expect: fuzz.Expected = "any"
    if how == "value":
        key, (name, new) = rng.choice(sorted(said)), odd(rng)
        config.write_text(dumps({**said, key: new}))
        what = f"{key}: {name}"
        if (
            key in ("lora_alpha", "peft_type")
            and name != "10**9"
            and name != "10**18"
            and (key, name) not in (("lora_alpha", "a half"), ("lora_alpha", "minus one"))
        ):
            expect = "bad"
    elif how == "json":
        what = broken_json(rng, config)
    elif how == "file":
        what, expect = not_a_file(rng, rng.choice([config, weights])), "bad"
    elif how == "bytes":
        weights.write_bytes(flipped(rng, weights.read_bytes()))
        what = "bytes of the tensors changed"
    elif how == "pattern":
        text = rng.choice(PATTERNS)
        key = rng.choice(["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"])
        config.write_text(json.dumps({**said, key: {text: 2} if key.endswith("pattern") else text}))
        what = f"{key}: {text[:20]}"
    elif how == "tensor":
        what, expect = _tensors(rng, folder), "bad"
    elif how == "pickle":
        weights.unlink()
        torch.save({"x": torch.ones(1)}, folder / "adapter_model.bin")
        what, expect = "a pickle", "bad"
    else:
        key = rng.choice(["lora_alpha", "more", "type"])
        if key == "type":
            save_file({k: v.half() for k, v in load_file(weights).items()}, weights, {"format": "pt"})
        more = {"lora_alpha": rng.randint(1, 64)} if key == "lora_alpha" else {"new_in_peft_99": None}
        config.write_text(json.dumps({**said, **more}))
        what, expect = f"good: {key}", "good"
    words = (str(folder),) if expect == "bad" else ()
    return fuzz.Case(
        what, ("merge", str(home / "a"), str(folder), "--with", "average", "--to", "merged"), expect, words
    )


# -- models --------------------------------------------------------------------------------------------------


@cache
def _model(name: str) -> Path:
    return zoo.build(name, Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-")))


TEMPLATES = {
    "half": "{% for m in messages %}{{ m['content']", "no such filter": "{{ messages | nofilter }}",
    "endless": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x",
    "large range": "{% for i in range(10**9) %}{% endfor %}",
    "a power": "{{ 9**9**9 }}", "a product": "{{ 'x' * 10000000000 }}",
    "calls itself": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "doubles": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "empty": "", "one word": "x", "attribute": "{{ messages.__class__.__mro__ }}", "raises": "{{ raise_exception('no') }}",
    "deep": "(" * 5000, "open": "{{" * 1000, "deep brackets": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
}  # fmt: skip


def _weights(rng: random.Random, folder: Path) -> tuple[str, fuzz.Expected]:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    key = rng.choice(sorted(k for k in tensors if "layers.0" in k or "embed_tokens" in k or "lm_head" in k))
    t = tensors.pop(key)
    index: dict[str, Any] = {"metadata": {}, "weight_map": {key: "a.safetensors"}}
    how = rng.choice(
        [
            "lost",
            "shape",
            "nan",
            "type",
            "more",
            "half",
            "other",
            "index",
            "pickle",
            "index out",
            "double",
            "gone",
        ]
    )
    if how == "lost":
        save_file(tensors, file, {"format": "pt"})
    elif how == "shape":
        save_file(tensors | {key: torch.ones(*t.shape[:-1], t.shape[-1] + 1)}, file, {"format": "pt"})
    elif how == "nan":
        t.view(-1)[rng.randrange(t.numel())] = rng.choice([math.nan, math.inf])
        save_file(tensors | {key: t}, file, {"format": "pt"})
    elif how == "type":
        save_file(tensors | {key: t.to(torch.int8)}, file, {"format": "pt"})
    elif how in ("more", "half", "double"):
        if how == "more":
            tensors["unknown.weight"] = torch.ones(3)
        kind = torch.bfloat16 if how == "half" else torch.float64 if how == "double" else torch.float32
        save_file({k: v.to(kind) for k, v in (tensors | {key: t}).items()}, file, {"format": "pt"})
        return f"good: weights {how}", "good"
    elif how == "other":
        save_file({f"x.{k}": v for k, v in tensors.items()}, file, {"format": "pt"})
    elif how in ("index", "index out"):
        if how == "index out":
            index["weight_map"] = {
                key: rng.choice(["../a.safetensors", "/etc/passwd", "", ".", "a.bin", "model"])
            }
        if rng.random() < 0.3:
            index["weight_map"] = rng.choice([[], {}, "x", None, {key: 3}, {key: None}])
        file.unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "pickle":
        file.unlink()
        torch.save({**tensors, key: t}, folder / "pytorch_model.bin")
    else:
        file.unlink()
    return f"weights: {how} {key}", "bad"


@FILES.kind
def models(rng: random.Random, home: Path) -> fuzz.Case:
    """A model folder with one file changed."""
    name = rng.choice(["llava", "qwen2_vl", "llama"])
    folder = home / "model"
    shutil.copytree(_model(name), folder)
    recipe = shop(home)
    words: tuple[str, ...] = ("model",)
    expect: fuzz.Expected = "any"
    files = sorted(p for p in folder.iterdir() if p.suffix == ".json")
    how = rng.choice(
        [
            "config",
            "config",
            "config",
            "value",
            "json",
            "file",
            "template",
            "weights",
            "weights",
            "bytes",
            "good",
        ]
    )
    if how in ("config", "value"):
        file = (
            folder / "config.json"
            if how == "config"
            else rng.choice([f for f in files if f.stat().st_size < 50_000])
        )
        data = json.loads(file.read_text())
        path = rng.choice(fields(data) or [("x",)])
        kind, new = odd(rng)
        if rng.random() < 0.2 and len(path) == 1:
            data.pop(path[0], None)
            kind = "lost"
        else:
            set_at(data, path, new)
        file.write_text(dumps(data))
        what = f"{file.name}: {path}: {kind}"
    elif how == "json":
        what = broken_json(rng, rng.choice(files))
    elif how == "file":
        what = not_a_file(rng, rng.choice(files))
    elif how == "template":
        what = rng.choice(sorted(TEMPLATES))
        for old in folder.glob("chat_template*"):
            old.unlink()
        (folder / "chat_template.jinja").write_text(TEMPLATES[what])
        what, words = f"{name}: template: {what}", ("template",)
        expect = "any" if any(w in what for w in ("empty", "one word", "raises", "attribute")) else "bad"
    elif how == "weights":
        what, expect = _weights(rng, folder)
    elif how == "bytes":
        file = rng.choice([folder / "model.safetensors", folder / "tokenizer.json"])
        file.write_bytes(flipped(rng, file.read_bytes()))
        what = f"{file.name}: bytes changed"
    else:
        (folder / rng.choice(["README.md", "pytorch_model.bin", "notes.json"])).write_bytes(
            b"\x80\x04 anything"
        )
        what, expect = "good: a file more", "good"
    args = ("run", str(recipe), "-q", f"model={folder}", "optim.steps=1", "optim.batch_size=1")
    if name == "llama":  # text alone: the rows' pictures go
        for file in home.glob("*_*.json"):
            data = json.loads(file.read_text())
            for row in data:
                row.pop("image", None)
                row["conversations"][0]["value"] = row["conversations"][0]["value"].replace("<image>\n", "")
            file.write_text(json.dumps(data))
    return fuzz.Case(f"{name}: {what}", args, expect, words if expect == "bad" else (), keep=("run*",))
