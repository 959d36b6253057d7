"""Writes matplotlib's figures: the suffix says the format, and the same figure the same bytes."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any, Literal, get_args

from prunenet.runtime.files import make_folders, write_atomic

ImageFormat = Literal["png", "svg", "pdf"]
_UNDATED = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}


def image_format(path: str | Path) -> ImageFormat:
    """Returns the format that a file's name asks for.

    Raises:
        ValueError: it is none of png, svg and pdf.
    """
    known: tuple[ImageFormat, ...] = get_args(ImageFormat)
    for name in known:
        if Path(path).suffix.lower() == f".{name}":
            return name
    raise ValueError(f"a figure ends in .{', .'.join(known)}, got {Path(path).name!r}")


def save_figure(figure: Any, path: str | Path, dpi: int) -> None:
    """Writes a figure; an existing file is replaced, a missing folder made.

    Args:
        figure: matplotlib's.
        path: of the file.
        dpi: of a PNG.

    Raises:
        ValueError: as `image_format`.
        OSError: the disk is full or refuses.
    """
    import matplotlib

    kind, image = image_format(path), BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "prunenet"}):
        figure.savefig(image, format=kind, dpi=dpi, metadata=_UNDATED[kind])
    make_folders(Path(path).parent)
    write_atomic(Path(path), image.getvalue())
