"""The corpus of English prose: what benchmarks/prose.py takes for English, and what it leaves out."""

import importlib.util
import struct
import zlib
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "prose.py"
spec = importlib.util.spec_from_file_location("prose", SCRIPT)
prose = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prose)

ENGLISH = (
    "The command reads a list of packages from the file, and asks what to do with each of them. "
    "It is a simple system that tells you what it will do, and then goes and does it."
)
TECHNICAL = (
    "git remote add [-t <branch>] <name> <url>: add a remote named <name> for the repository at <url>. With -f, "
    "git fetch <name> is run immediately after the remote information is set up. --tags imports every tag from it."
)
OTHERS = {
    "German": "Das Programm liest eine Liste von Paketen aus der Datei und fragt, was mit jedem davon in dem System "
    "zu tun ist. Es ist ein einfaches Verfahren, das Ihnen sagt, was es tun wird, und es dann tut.",
    "French": "La commande lit une liste de paquets dans le fichier et demande ce qu'il faut faire de chacun. "
    "C'est un système simple, qui vous dit ce qu'il va faire, puis le fait. L'option a un effet or il a un nom.",
    "Spanish": "La orden lee una lista de paquetes del archivo y pregunta qué hacer con cada uno de ellos. "
    "Es un sistema sencillo que le dice lo que va a hacer y luego lo hace.",
    "Portuguese": "Ambos método dselect do APT e apt-get partilham a mesma interface. É um sistema simples que "
    "geralmente lhe diz o que vai fazer e depois fá-lo. O by-hash é um nome.",
    "Dutch": "Het programma leest een lijst van pakketten uit het bestand en vraagt wat er met elk daarvan moet. "
    "Het is een eenvoudig systeem dat in het kort zegt wat het gaat doen, en dit dan doet.",
    "Polish": "Program czyta listę pakietów z pliku i pyta, co zrobić z każdym z nich, a to jest prosty system.",
    "Japanese": "APT の dselect メソッドと apt-get は、どちらも同じインターフェースを共有しています。",
}


@pytest.mark.parametrize("text", [ENGLISH, TECHNICAL], ids=["prose", "technical"])
def test_english_is_taken(text):
    assert prose.is_english_prose(text)


@pytest.mark.parametrize("language", OTHERS)
def test_another_language_is_left_out(language):
    """Also where the page quotes a few English words."""
    text = OTHERS[language]
    assert not prose.is_english_prose(text)
    assert not prose.is_english_prose(
        10 * text + " Previous Next Home: the list of packages. Copyright by the authors."
    )


@pytest.mark.parametrize("text", ["", "1 2 3", "Airbrush, Airbrush\nAlien Map, Filters\nAlign, Tools\n"])
def test_what_is_no_prose_is_left_out(text):
    assert not prose.is_english_prose(text)


def test_pages_of_a_package(tmp_path):
    """The handbook's folders of other languages are not read; the text of the others comes without its markup."""
    pages = {
        "usr/share/doc/handbook/html/en-US/one.html": "<html><head><title>t</title></head><p>The  page <b>of</b> it.",
        "usr/share/doc/handbook/html/de-DE/one.html": "<p>Die Seite",
        "usr/share/doc/apt-doc/guide.de.html/ch1.html": "<p>Die Seite<script>x</script>",
        "usr/share/doc/apt-doc/genindex.html": "<p>index",
    }
    for name, content in pages.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    found = {Path(name).parts[-3]: text for name, text in prose.documents(tmp_path)}
    assert found == {"html": "The page of it.", "apt-doc": "Die Seite"}


LISTING = "\n".join(f"{name} = compute({name}, 3)" for name in "abcdefghijklmnopqrst")


def test_listings_and_menus_are_left_out_of_a_page():
    """Preformatted English stays; what is preformatted code, or in an element that is called a menu, does not."""
    listing, menu = f"<pre>{LISTING}</pre>", '<div class="navheader"><div>Up</div><a>Next</a></div>'
    text = prose.page(f'{menu}<h1>Title<a class="headerlink">¶</a></h1><p>One.{listing}<pre>{ENGLISH}</pre>Two.')
    assert text == f"Title\nOne.\n{ENGLISH}\nTwo."


def test_marks_and_listings_are_left_out_of_texts():
    pod = f"=head1 NAME\n\nC<cut> - the B<first I<one>>\n\n=over 4\n\n    {ENGLISH}\n\n    x = f(y)\n"
    assert prose.plain(pod) == f"NAME\ncut - the first one\n{ENGLISH}"
    info = "\x1f\nFile: a.info,  Node: One,  Next: Two,  Up: Top\n\n1 One\n=====\n\n* Menu:\n\n* Two::   The second.\n"
    assert prose.plain(info) == "1 One"


def test_blocks_of_code_are_left_out():
    english = [ENGLISH] * prose.BLOCK
    assert prose.blocks([*english, *LISTING.splitlines(), *english]) == "\n".join([*english, *english])


def test_long_texts_are_cut_at_ends_of_lines():
    text = "\n".join([ENGLISH] * 8_000)
    parts = list(prose.pieces(text))
    assert len(parts) == 3
    assert all(len(part) <= prose.LONGEST for part in parts)
    assert "\n".join(parts) == text


def test_books_of_a_module_of_sword(tmp_path):
    """The index has the start, the packed and the unpacked length of each block; an empty one holds nothing."""
    books = [zlib.compress(text.encode()) for text in ("<div sID='a'/>In the beginning", "was the word")]
    starts = 0, len(books[0])
    index = b"".join(struct.pack("<III", start, len(book), 0) for start, book in zip(starts, books, strict=True))
    (tmp_path / "ot.bzz").write_bytes(b"".join(books))
    (tmp_path / "ot.bzs").write_bytes(index + struct.pack("<III", 0, 0, 0))
    found = [text for _, text in prose.documents(tmp_path)]
    assert found == ["In the beginning", "was the word", ""]


def test_texts_are_read_where_there_are_no_pages(tmp_path):
    (tmp_path / "guide.pod").write_bytes("café".encode("cp1252"))
    assert list(prose.documents(tmp_path)) == [("guide.pod", "café")]
    (tmp_path / "guide.html").write_text("<p>The same")
    assert list(prose.documents(tmp_path)) == [("guide.html", "The same")]
