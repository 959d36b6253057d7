"""Writes the table of model types into README.md, from the code."""

from pathlib import Path

from prunenet.models.listing import known_types, summary_of

README = Path(__file__).resolve().parents[1] / "README.md"

head, start, rest = README.read_text(encoding="utf-8").partition("<!--types-->\n")
_, end, tail = rest.partition("<!--/types-->")
README.write_text(
    head + start + summary_of(known_types(cached=False)) + end + tail, encoding="utf-8"
)
