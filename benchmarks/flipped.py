"""A Food-101 folder with each training picture also mirrored: do a second view's tokens name new pictures better?

    python benchmarks/flipped.py FOLDER TO

Writes TO, links to the pictures of FOLDER and the mirrored ones beside them as <id>_flipped.jpg; run a profile on it
like on FOLDER (both views in one group, by `data.<data>.groups`) and compare what stage `name` says.
"""

import argparse
from pathlib import Path

from PIL import Image, ImageOps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("to", type=Path)
    options = parser.parse_args()
    train = (options.folder / "meta/train.txt").read_text(encoding="utf-8").split("\n")
    for name in sorted(p.name for p in (options.folder / "meta").iterdir()):
        text = (options.folder / "meta" / name).read_bytes()
        if name == "train.txt":
            text = "\n".join(line for row in train if row for line in (row, f"{row}_flipped")).encode() + b"\n"
        (options.to / "meta").mkdir(parents=True, exist_ok=True)
        (options.to / "meta" / name).write_bytes(text)
    for row in [*filter(None, train), *(options.folder / "meta/test.txt").read_text(encoding="utf-8").split()]:
        file = options.folder / "images" / f"{row}.jpg"
        there = options.to / "images" / f"{row}.jpg"
        there.parent.mkdir(parents=True, exist_ok=True)
        there.symlink_to(file.resolve())
        if row in train:
            with Image.open(file) as picture:
                mirrored = ImageOps.mirror(ImageOps.exif_transpose(picture).convert("RGB"))
            mirrored.save(there.with_stem(f"{there.stem}_flipped"), quality=95)


if __name__ == "__main__":
    main()
