"""Builds the pocket's picture sources in `pocket/assets/` from packages of free data; run once, by hand.

    python -m retain.pocket.build_assets --emoji DIR --fashion DIR

Needs the dev extras (matplotlib for its fonts, scikit-image and scikit-learn for photographs and digits), the
unpacked npm package `emoji-datasource-google` and the Debian package `dataset-fashion-mnist`. What the
package ships is what this wrote: PNG sheets of equal cells, row by row, and JSON labels in the same order. At
run time only numpy and Pillow are needed, so that drawing gives the same bytes everywhere.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ASSETS = Path(__file__).parent / "assets"
GARMENTS = ["tee", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
CHARS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
FONTS = {  # the first twelve belong to the base lessons, the others to the stream
    "base": [
        "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold",
        "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "cmr10",
        "cmss10",
    ],
    "stream": [
        "DejaVuSans-BoldOblique", "DejaVuSansMono-BoldOblique", "DejaVuSerif-BoldItalic",
        "STIXGeneralBolIta", "cmb10", "cmtt10",
    ],
}  # fmt: skip
PHOTOS = {  # file of scikit-image or scikit-learn: (part, shorter side in pixels before cropping)
    "astronaut.png": ("base", 240), "coffee.png": ("base", 240), "rocket.jpg": ("base", 240),
    "grass.png": ("base", 160), "coins.png": ("base", 200), "china.jpg": ("base", 280),
    "camera.png": ("base", 240), "hubble_deep_field.jpg": ("base", 240),
    "chelsea.png": ("stream", 240), "brick.png": ("stream", 200), "gravel.png": ("stream", 200),
    "flower.jpg": ("stream", 280), "clock_motion.png": ("stream", 240), "retina.jpg": ("stream", 240),
}  # fmt: skip
_ICONS = """
animal: cow2 tiger2 rabbit2 cat2 racehorse sheep elephant koala frog penguin owl snail bee ladybug spider
  butterfly octopus fish dolphin crab turtle snake pig dog mouse panda_face lion_face fox_face bear duck
fruit: tomato grapes watermelon tangerine lemon banana pineapple apple pear peach cherries strawberry
  kiwifruit coconut mango avocado
food: hamburger pizza bread fries popcorn croissant egg pancakes pretzel sandwich cheese_wedge waffle
  doughnut cookie candy lollipop cake cupcake sushi carrot corn mushroom
drink: tea wine_glass cocktail beer baby_bottle glass_of_milk coffee teapot
clothes: tophat crown eyeglasses necktie shirt jeans dress handbag mans_shoe high_heel sandal boot socks
  scarf gloves coat kimono bikini
vehicle: bus ambulance fire_engine police_car taxi car truck tractor bike motor_scooter airplane rocket
  helicopter boat ship train2 racing_car
tool: wrench hammer scissors key magnet axe screwdriver ladder gear pushpin paperclip broom
plant: tulip rose sunflower cactus evergreen_tree palm_tree maple_leaf four_leaf_clover herb seedling
  blossom
weather: sunny cloud umbrella snowflake rainbow droplet fire zap crescent_moon star snowman
sport: basketball football volleyball tennis soccer baseball bowling 8ball boxing_glove trophy medal dart
music: guitar trumpet violin drum_with_drumsticks saxophone bell headphones microphone musical_note
  accordion
home: house door bed chair toilet bathtub tv telephone_receiver bulb candle camera clock3 book gift balloon
  envelope_with_arrow
"""
ICONS = dict(re.findall(r"^(\w+): ((?:.+)(?:\n  .+)*)", _ICONS, re.MULTILINE))
SHORT = {
    "cow2": "cow", "tiger2": "tiger", "rabbit2": "rabbit", "cat2": "cat", "racehorse": "horse",
    "panda_face": "panda", "lion_face": "lion", "fox_face": "fox", "tangerine": "orange", "kiwifruit":
    "kiwi", "cheese_wedge": "cheese", "wine_glass": "wine", "baby_bottle": "bottle", "glass_of_milk":
    "milk", "tophat": "hat", "eyeglasses": "glasses", "necktie": "tie", "handbag": "purse", "mans_shoe":
    "shoe", "high_heel": "heel", "fire_engine": "engine", "police_car": "police", "motor_scooter":
    "scooter", "train2": "train", "racing_car": "racer", "evergreen_tree": "tree", "palm_tree": "palm",
    "maple_leaf": "leaf", "four_leaf_clover": "clover", "sunny": "sun", "zap": "flash", "crescent_moon":
    "moon", "8ball": "ball", "boxing_glove": "glove", "drum_with_drumsticks": "drum", "musical_note":
    "note", "telephone_receiver": "phone", "clock3": "clock", "envelope_with_arrow": "letter", "pushpin":
    "pin", "paperclip": "clip", "bulb": "lamp",
}  # fmt: skip


def sheet(cells: np.ndarray, columns: int) -> Image.Image:
    """Cells (N, H, W[, C]) laid out row by row."""
    n, h, w = cells.shape[:3]
    rows = -(-n // columns)
    out = np.zeros((rows * columns, h, w, *cells.shape[3:]), np.uint8)
    out[:n] = cells
    out = out.reshape(rows, columns, h, w, *cells.shape[3:]).swapaxes(1, 2)
    return Image.fromarray(out.reshape(rows * h, columns * w, *cells.shape[3:]))


def save(name: str, cells: np.ndarray, columns: int, labels: dict[str, object]) -> None:
    """Write NAME.png and NAME.json."""
    sheet(cells, columns).save(ASSETS / f"{name}.png", optimize=True)
    size = {"count": len(cells), "height": cells.shape[1], "width": cells.shape[2], "columns": columns}
    (ASSETS / f"{name}.json").write_text(json.dumps({**size, **labels}, separators=(",", ":")) + "\n")


def idx(path: Path) -> np.ndarray:
    """Read one gzipped IDX file of bytes."""
    raw = gzip.decompress(path.read_bytes())
    dims = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(dims)).reshape(dims)


def build_garments(folder: Path, per_class: int = 600) -> None:
    """The first images of each class of Fashion-MNIST's training set, interleaved by class."""
    images, labels = idx(folder / "train-images-idx3-ubyte.gz"), idx(folder / "train-labels-idx1-ubyte.gz")
    rows = np.stack([np.flatnonzero(labels == c)[:per_class] for c in range(10)], 1).reshape(-1)
    save("garments", images[rows], 100, {"names": GARMENTS, "labels": labels[rows].tolist()})


def build_digits() -> None:
    """All of scikit-learn's handwritten digits (UCI), 0..16 stretched to 0..240."""
    from sklearn.datasets import load_digits

    data = load_digits()
    save("digits", (data.images * 15).astype(np.uint8), 60, {"labels": data.target.tolist()})


def build_icons(folder: Path, size: int = 20) -> None:
    """Chosen Noto icons, shrunk, with their alpha channel."""
    table = {e["short_name"]: e["image"] for e in json.loads((folder / "emoji.json").read_text())}
    cells, names, kinds = [], [], []
    for kind, members in ICONS.items():
        for name in members.split():
            image = Image.open(folder / "img/google/64" / table[name]).convert("RGBA")
            cells.append(np.asarray(image.resize((size, size), Image.Resampling.BOX)))
            names.append(SHORT.get(name, name))
            kinds.append(kind)
    save("icons", np.stack(cells), 20, {"names": names, "kinds": kinds})


def build_photos(size: int = 40, most: int = 48) -> None:
    """Crops that do not overlap, at most 48 a photograph, evenly spread."""
    import skimage.data
    import sklearn.datasets

    homes = [Path(skimage.data.__file__).parent, Path(sklearn.datasets.__file__).parent / "images"]
    cells, source = [], []
    for index, (name, (_, short)) in enumerate(PHOTOS.items()):
        path = next(h / name for h in homes if (h / name).is_file())
        image = Image.open(path).convert("RGB")
        scale = short / min(image.size)
        image = image.resize(
            (round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS
        )
        pixels = np.asarray(image)
        crops = [pixels[y : y + size, x : x + size] for y in range(0, image.height - size + 1, size)
                 for x in range(0, image.width - size + 1, size)]  # fmt: skip
        crops = [c for c in crops if c.std() > 12]  # flat sky or black corners show no distortion
        keep = np.unique(np.linspace(0, len(crops) - 1, min(most, len(crops))).round().astype(int))
        cells += [crops[k] for k in keep]
        source += [index] * len(keep)
    names = [Path(n).stem for n in PHOTOS]
    save(
        "photos",
        np.stack(cells),
        24,
        {"names": names, "parts": [p for p, _ in PHOTOS.values()], "source": source},
    )


def render(font: ImageFont.FreeTypeFont, char: str, height: int, width: int) -> tuple[np.ndarray, int]:
    """One glyph on a common baseline, and its advance in pixels."""
    image = Image.new("L", (width, height))
    ImageDraw.Draw(image).text((1, round(height * 0.75)), char, fill=255, font=font, anchor="ls")
    cell = np.asarray(image)
    used = np.flatnonzero(cell.max(0))
    return cell, int(used[-1]) + 2


def build_glyphs(height: int = 16, width: int = 18) -> None:
    """Letters and digits of 18 fonts, each with capitals about 8 and 10 pixels high."""
    import matplotlib

    home = Path(matplotlib.get_data_path()) / "fonts/ttf"
    cells, advance, fonts = [], [], [f for part in FONTS.values() for f in part]
    for name in fonts:
        for capital in (8, 10):
            size = next(
                s
                for s in range(6, 30)
                if ImageFont.truetype(home / f"{name}.ttf", s).getbbox("H", anchor="ls")[1] <= -capital
            )
            font = ImageFont.truetype(home / f"{name}.ttf", size)
            for char in CHARS:
                cell, step = render(font, char, height, width)
                cells.append(cell)
                advance.append(step)
    parts = [part for part, members in FONTS.items() for _ in members]
    save(
        "glyphs",
        np.stack(cells),
        62,
        {"chars": CHARS, "fonts": fonts, "parts": parts, "sizes": [8, 10], "advance": advance},
    )


def main() -> None:
    """Build every sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--emoji", type=Path, required=True, help="unpacked emoji-datasource-google")
    parser.add_argument(
        "--fashion", type=Path, required=True, help="folder with the four idx files of Fashion-MNIST"
    )
    args = parser.parse_args()
    ASSETS.mkdir(exist_ok=True)
    build_garments(args.fashion)
    build_digits()
    build_icons(args.emoji)
    build_photos()
    build_glyphs()


if __name__ == "__main__":
    main()
