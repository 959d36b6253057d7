"""What the code cites, a clone has: documents, and the sections that are named in them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CITATION = re.compile(
    r"((?:[\w.-]+/)*[A-Za-z][\w-]*\.md)\b(?:,?[\s#]+sections?[\s#]+((?:\d+(?:\.\d+)?(?:,| and)?\s*)+))?"
)
GENERATED = {"README.md", "t.md"}
"""Names that the code writes, or that a test makes."""

if not (ROOT / "docs").is_dir():
    pytest.skip("the tests run outside a checkout", allow_module_level=True)


def sources() -> list[Path]:
    folders = ("prunenet", "envs", "policies", "benchmarks", "examples")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return [
        path for path in found if not {"envs", "policies"} & set(path.parts[len(ROOT.parts) + 1 :])
    ]


def citations(source: Path) -> list[tuple[str, list[str]]]:
    """(document, sections) of each citation in a file."""
    found = CITATION.findall(source.read_text(encoding="utf-8"))
    return [(document, re.findall(r"\d+(?:\.\d+)?", sections)) for document, sections in found]


def headings(document: Path) -> set[str]:
    """Numbers of a document's sections."""
    return set(re.findall(r"^#+ (\d+(?:\.\d+)?)\b", document.read_text(encoding="utf-8"), re.M))


@pytest.mark.parametrize("source", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_document_and_section_that_a_file_cites_exists(source: Path) -> None:
    for name, sections in citations(source):
        if name in GENERATED:
            continue
        assert (ROOT / name).is_file(), f"{name} is cited, and a clone has none"
        assert set(sections) <= headings(ROOT / name), f"{name} has no section {sections}"


def test_the_search_for_citations_reads_names_and_sections_over_a_line_break(
    tmp_path: Path,
) -> None:
    file = tmp_path / "module.py"
    file.write_text("# docs/methods.md,\n# sections 3 and 5, or docs/design.md")
    assert citations(file) == [("docs/methods.md", ["3", "5"]), ("docs/design.md", [])]


def test_the_methods_cite_the_documents_of_this_repository() -> None:
    cited = {name for source in sources() for name, _ in citations(source)}
    assert {"docs/methods.md", "docs/design.md"} <= cited
