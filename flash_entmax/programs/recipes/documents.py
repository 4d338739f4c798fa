"""Text that is on the machine: English documents, and Python sources."""

import gzip
import os
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

SHORTEST = 2_000  # characters; shorter texts are title pages and indexes
LONGEST = 1_000_000  # bytes of one file
DOCUMENTS = {".txt", ".md", ".rst", ".html", ".htm", ".pod", ".1", ".3", ".5", ".7", ".8"}
# A part of a path that says what a file is no English document for: another language, a licence, a list of changes.
NOT_PROSE = re.compile(r"locale|copyright|licen[cs]e|change(log|s)|genindex|/man/[a-z]{2}(_\w+)?[./]", re.IGNORECASE)
ROOTS = Path("/usr/share"), Path("/usr/local/share")
HEADING = re.compile(r'^\.(?:SH|SS|B|I|BR|IR|RB|RI|IP|TP)\b\s*"?(.*?)"?$')
# Escapes of roff: fonts, sizes, spaces.
ESCAPE = re.compile(r"\\(?:[fm](?:\[\w*\]|\(..|\w)|\*?\(..|s[-+]?\d+|[&|/,:^cude]|(?=-))")
LOOKED_AT = 20_000  # characters of a document, to tell its language
# Frequent English words that translations do not have. They are at least 0.12 of the words on a page of prose, at most
# 0.011 in a translation, and at most 0.05 in an index of keywords.
ENGLISH = {
    "the", "of", "and", "to", "that", "it", "with", "by", "this",
    "from", "which", "you", "have", "are", "be", "or", "not",
}  # fmt: skip
FEWEST_ENGLISH = 0.08


class Prose(HTMLParser):
    """The text of a page, without its scripts, styles and menus."""

    SILENT = "script", "style", "nav", "head"
    ENDS_A_LINE = "p", "div", "li", "pre", "h1", "h2", "h3", "h4", "tr", "br", "dt", "dd"

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.silence = 0

    def handle_starttag(self, tag, attributes):
        self.silence += tag in self.SILENT
        if tag in self.ENDS_A_LINE:
            self.parts.append("\n")

    def handle_endtag(self, tag):
        self.silence -= tag in self.SILENT

    def handle_data(self, data):
        if not self.silence:
            self.parts.append(data)

    @property
    def text(self) -> str:
        lines = (" ".join(line.split()) for line in "".join(self.parts).splitlines())
        return "\n".join(line for line in lines if line)


def is_english_prose(text: str, fewest: float = FEWEST_ENGLISH) -> bool:
    """Whether enough words are ENGLISH, ``fewest`` of all: not in another language, and not in a list of keywords."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    return sum(word in ENGLISH for word in words) >= fewest * max(1, len(words))


def english_documents(most: int, folder: Path | None = None) -> list[str]:
    """Texts of ``folder``, or of the documentation on the machine: about ``most`` characters, in a shuffled order.

    Of the machine's documents, only English ones count, and none whose lines mostly stood in an earlier one. The
    order depends on nothing but the files' paths.
    """
    if folder is not None:
        files = [folder] if folder.is_file() else files_below(folder)
        return up_to(most, filter(str.strip, map(read, shuffled(files))))
    files = filter(is_document, files_below(*ROOTS, Path(sysconfig.get_path("purelib"))))
    return up_to(most, without_repeats(filter(None, map(document, shuffled(files)))))


def python_sources(most: int) -> list[str]:
    """The sources of Python and of the installed packages: about ``most`` characters, in a shuffled order."""
    roots = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    files = (file for file in files_below(*roots) if file.suffix == ".py")
    return up_to(most, (text for text in map(read, shuffled(files)) if len(text) >= SHORTEST))


def files_below(*folders: Path) -> Iterator[Path]:
    for folder in folders:
        for place, _, names in os.walk(folder):
            yield from (Path(place, name) for name in names)


def shuffled(files: Iterable[Path]) -> list[Path]:
    found = sorted(set(files))
    random.Random(0).shuffle(found)
    return found


def up_to(most: int, texts: Iterable[str]) -> list[str]:
    """Texts until they have ``most`` characters together."""
    found, total = [], 0
    for text in texts:
        found.append(text)
        total += len(text)
        if total >= most:
            break
    return found


def without_repeats(texts: Iterable[str]) -> Iterator[str]:
    """Those of whose long lines less than half stood in an earlier text, such as a book's page after its chapters."""
    seen: set[int] = set()
    for text in texts:
        lines = {hash(line) for line in text.splitlines() if len(line) > 20}
        if 2 * len(lines & seen) <= len(lines):
            yield text
        seen |= lines


def is_document(file: Path) -> bool:
    name = file.with_suffix("") if file.suffix == ".gz" else file
    is_wanted = name.suffix.lower() in DOCUMENTS or file.name == "METADATA"
    return is_wanted and not NOT_PROSE.search(file.as_posix())


def document(file: Path) -> str:
    """The text without its markup; empty if it is no English prose."""
    text = read(file)
    kind = (file.with_suffix("") if file.suffix == ".gz" else file).suffix.lower()
    if kind in (".html", ".htm"):
        page = Prose()
        page.feed(text)
        text = page.text
    elif kind[1:].isdigit():
        text = manual_page(text)
    elif file.name == "METADATA":
        text = text.partition("\n\n")[2]  # behind the fields is the package's own description
    return text if len(text) >= SHORTEST and is_english_prose(text[:LOOKED_AT]) else ""


def manual_page(text: str) -> str:
    """Paragraphs of a page of the manual, without the requests of roff and its escapes."""
    lines = (HEADING.sub(r"\1", line) for line in text.splitlines())
    return ESCAPE.sub("", "\n".join(line for line in lines if line[:1] not in (".", "'")))


def read(file: Path) -> str:
    """The file as UTF-8, unpacked; empty if it cannot be read, is something else, or longer than LONGEST."""
    try:
        if file.stat().st_size > LONGEST:
            return ""
        content = file.read_bytes()
        return (gzip.decompress(content) if file.suffix == ".gz" else content).decode()
    except (OSError, EOFError, ValueError):
        return ""
