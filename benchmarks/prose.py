"""English prose for the recipe language-model: python benchmarks/prose.py FOLDER, on Debian or Ubuntu.

Downloads Debian's documentation packages without installing them, and writes the text of each page to a file: of Debian
12, 128 million characters in 5,123 documents.
Then: flash-entmax recipe language-model --text FOLDER --out out/prose
"""

import gzip
import re
import struct
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from flash_entmax.programs.recipes.documents import NOT_PROSE, Prose, is_english_prose

PACKAGES = {
    "literature and lexicons": (
        "sword-comm-tdavid sword-comm-mhcc sword-text-web anarchism dict-foldoc dict-devil jargon-text fortunes"
    ),
    "Debian": (
        "debian-handbook debian-reference-en debian-policy debian-faq debian-history debian-edu-doc-en "
        "developers-reference installation-guide-amd64 harden-doc apt-doc aptitude-doc-en maint-guide "
        "live-manual-html fai-doc"
    ),
    "systems": (
        "linux-doc-6.1 user-mode-linux-doc libvirt-doc ganeti-doc borgbackup-doc openafs-doc krb5-doc slurm-wlm-doc "
        "nut-doc"
    ),
    "servers": (
        "apache2-doc exim4-doc-html postfix-doc bind9-doc kea-doc shorewall-doc dovecot-core varnish-doc mh-book "
        "mailman3-doc rt5-doc-html privoxy postgresql-doc-15 sqlite3-doc db5.3-doc derby-doc slony1-2-doc postgis-doc"
    ),
    "Python": (
        "python3.11-doc python-django-doc python-sqlalchemy-doc python-sklearn-doc python-celery-doc "
        "python-pytest-doc python-scrapy-doc python-flask-doc twisted-doc sphinx-doc docutils-doc buildbot-doc"
    ),
    "languages": (
        "perl-doc erlang-doc racket-doc rust-doc swi-prolog-doc ada-reference-manual-2012 c++-annotations-html "
        "haskell98-report sbcl-doc guile-3.0-doc bash-doc zsh-doc abs-guide"
    ),
    "tools": ("git-doc brz-doc swig4.0-doc scons-doc binutils-doc vim-doc gnutls-doc"),
    "mathematics and science": ("r-doc-html octave-doc maxima-doc gap-doc pari-doc"),
    "desktop and arts": (
        "gimp-help-en gnome-user-docs gnome-devel-docs libreoffice-help-en-us png-definitive-guide lilypond-doc-html "
        "snd-doc"
    ),
}
SHORTEST = 3_000  # characters; shorter texts are title pages and indexes
LONGEST = 500_000  # characters of a file; longer texts are cut
MOST = 5_000_000  # characters of one package
BLOCK = 10  # lines that are judged together
FEWEST = 0.12  # of a block's words are frequent English ones; listings, tables and indexes have fewer
OFTEN = 8  # pages of a package: a line that stands on more of them is a menu or a footer

PAGE = re.compile(r"\.(html?|page)$")
TEXT = re.compile(r"/jargon\.txt\.gz$|\.dict\.dz$|\.pod$|\.info(-\d+)?\.gz$|/dovecot/.*\.txt(\.gz)?$|/fortunes/[\w-]+$")
BOOKS = re.compile(r"\.[bc]zs$")  # the index of a module of SWORD: commentaries, the Bible
# Other languages, sources, lists of changes, indexes.
UNREAD = re.compile(
    r"/help/(?!C/)|/(?!en)[a-z]{2}-[A-Z]{2}/|apache2-doc/manual/(?!en/)|\.(?!en)[a-z]{2}(_[A-Z]{2})?\.html$"
    r"|/_(sources|modules|static)/|/(examples?|tests?|api|apidocs|javadoc|generated)/"
    r"|NEWS|[Ww]hats?[-_]?new|[Rr]elease|delta\.pod$|(xref|[-_.])[Ii]ndex\.html|index-all|contributors"
)
MENU = re.compile(r"(?<![\w-])nav|sidebar|\brelated|\btoc\b|\bfoot(er)?\b|breadcrumb|\bmenu|\bsearch", re.IGNORECASE)
# What marks no end of a line: the parser is faster without it. A link to a heading goes with its sign.
INLINE = re.compile(
    r'<a class="headerlink".*?</a>|<!--.*?-->|</?(?:a|abbr|acronym|b|cite|code|dfn|em|font|hi|i|img|kbd|q|samp|small'
    r"|span|strong|sub|sup|tt|u|var|w)(?:\s[^<>]*)?/?>",
    re.DOTALL | re.IGNORECASE,
)
# What texts mark: nodes of Info and its menus, commands and fonts of pod.
MARKS = re.compile(
    r"^(File: .*Node: .*|\* .*::.*|\* Menu:|=(?:over|back|cut|encoding|for|begin|end|pod)\b.*|=(?:head\d|item)\b[ *]*)",
    re.MULTILINE,
)
FONT = re.compile(r"\b[A-Z](?:<([^<>]*)>|<< (.*?) >>)")


class Page(Prose):
    """The text of a page without the menus around it, and without listings: what is preformatted but no English."""

    ENDS_A_LINE = *Prose.ENDS_A_LINE, "title", "td", "th", "h5", "h6", "section", "blockquote"
    LEFT_OUT = "footer", "info", "pre"
    MAY_BE_A_MENU = "div", "table", "ul", "header", "aside"

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.depth, self.start = "", 0, 0

    def handle_starttag(self, tag, attributes):
        super().handle_starttag(tag, attributes)
        if self.outer:
            self.depth += tag == self.outer
        elif tag in self.LEFT_OUT or (tag in self.MAY_BE_A_MENU and is_menu(attributes)):
            self.outer, self.depth, self.start = tag, 1, len(self.parts)

    def handle_endtag(self, tag):
        super().handle_endtag(tag)
        self.depth -= tag == self.outer
        if self.outer and not self.depth:
            if self.outer != "pre" or not is_english_prose("".join(self.parts[self.start :]), FEWEST):
                del self.parts[self.start :]
            self.outer = ""
        if tag in self.ENDS_A_LINE:
            self.parts.append("\n")


def is_menu(attributes: list[tuple[str, str | None]]) -> bool:
    return any(name in ("class", "id", "role") and MENU.search(value or "") for name, value in attributes)


def documents(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of every English page of an unpacked package, the longest first; of its texts if it has no pages."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    files = {n: p for n, p in files.items() if not p.is_symlink() and not UNREAD.search(n) and not NOT_PROSE.search(n)}
    for name in sorted(files, key=lambda name: (-files[name].stat().st_size, name)):
        if PAGE.search(name):
            yield name, page(decoded(files[name].read_bytes()))
        elif BOOKS.search(name):
            yield from ((f"{name}-{number}", page(book)) for number, book in enumerate(books(files[name])))
        elif TEXT.search(name) and not any(map(PAGE.search, files)):
            content = files[name].read_bytes()
            yield name, plain(decoded(gzip.decompress(content) if name.endswith(("gz", "dz")) else content))


def page(content: str) -> str:
    reader = Page()
    reader.feed(INLINE.sub("", content))
    return reader.text


def plain(text: str) -> str:
    """Paragraphs without marks, and without listings: what is indented but no English."""
    text = re.sub(r"\x1f|^%$", "\n", MARKS.sub("", text.expandtabs()), flags=re.M)
    paragraphs = re.split(r"\n\s*\n", FONT.sub(r"\1\2", FONT.sub(r"\1\2", text)))
    kept = (each for each in paragraphs if not each.startswith(" ") or is_english_prose(each, FEWEST))
    return "\n".join(line.strip() for each in kept for line in each.splitlines() if any(map(str.isalnum, line)))


def books(index: Path) -> Iterator[str]:
    """The blocks of a module of SWORD; its index has a block's start, its bytes, and how many they are unpacked."""
    content = index.with_suffix(index.suffix[:-1] + "z").read_bytes()
    for start, length, _ in struct.iter_unpack("<III", index.read_bytes()):
        yield zlib.decompress(content[start : start + length]).decode() if length else ""


def decoded(content: bytes) -> str:
    """UTF-8, or what came before it."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


def prose(archive: Path) -> list[tuple[str, str]]:
    """(name, text) of a package's English documents: about MOST characters, without what stands on many pages."""
    found, total = [], 0
    with TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
        for name, text in documents(Path(folder)):
            if len(text) >= SHORTEST and is_english_prose(text):
                found.append((name, text))
                total += len(text)
            if total >= MOST:
                break
    pages = Counter(line for _, text in found for line in set(text.splitlines()))
    found = [(name, blocks([line for line in text.splitlines() if pages[line] <= OFTEN])) for name, text in found]
    return sorted(found, key=lambda document: -len(document[1]))


def blocks(lines: list[str]) -> str:
    """The lines without those blocks of them that are a listing, a table or an index."""
    cut = ("\n".join(lines[start : start + BLOCK]) for start in range(0, len(lines), BLOCK))
    return "\n".join(block for block in cut if is_english_prose(block, FEWEST))


def pieces(text: str) -> Iterator[str]:
    """The text, cut at ends of lines if it is longer than LONGEST."""
    while len(text) > LONGEST:
        cut = text.rindex("\n", 0, LONGEST)
        yield text[:cut]
        text = text[cut + 1 :]
    yield text


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out, written, count, seen = Path(sys.argv[1]), Counter(), 0, set()
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder, ProcessPoolExecutor() as pool:
        subprocess.run(["apt-get", "download", *" ".join(PACKAGES.values()).split()], cwd=folder, check=True)
        archives = sorted(Path(folder).glob("*.deb"))
        for archive, found in zip(archives, pool.map(prose, archives), strict=True):
            package = archive.name.partition("_")[0]
            for name, text in found:
                lines = set(text.splitlines())
                if len(text) < SHORTEST or 2 * len(lines & seen) > len(lines):
                    continue  # a chapter of a book whose single page came first
                seen |= lines
                for piece in pieces(text):
                    count += 1
                    file = out / f"{package}-{count:05}-{Path(name).stem}.txt"
                    written[package] += file.write_text(piece, encoding="utf-8")
            print(f"{written[package]:>9} characters of {package}", flush=True)
    print(f"{out}: {count} documents, {written.total() / 1e6:.2f} million characters")


if __name__ == "__main__":
    main()
