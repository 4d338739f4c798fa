"""English prose for the recipe language-model: python benchmarks/prose.py FOLDER, on Debian or Ubuntu.

Downloads Debian's documentation packages without installing them, and writes the text of each page to a file.
Then: flash-entmax recipe language-model --text FOLDER --out out/prose
"""

import gzip
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from flash_entmax.programs.recipes.documents import Prose, is_english_prose

PACKAGES = (
    "debian-handbook",
    "debian-reference-en",
    "debian-policy",
    "debian-faq",
    "developers-reference",
    "jargon-text",
    "git-doc",
    "apt-doc",
    "aptitude-doc-en",
    "gimp-help-en",
    "r-doc-html",
)
SHORTEST = 5_000  # characters; shorter texts are title pages and indexes
FOREIGN = "/html/"  # the handbook has a folder for each language


def documents(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of every English page of an unpacked package."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or path.is_symlink() or (FOREIGN in name and f"{FOREIGN}en-US/" not in name):
            continue
        if path.suffix == ".html" and "genindex" not in name:
            page = Prose()
            page.feed(path.read_text(encoding="utf-8", errors="replace"))
            yield name, page.text
        elif "jargon" in name and path.suffix == ".gz" and "changelog" not in name:
            yield name, gzip.decompress(path.read_bytes()).decode(errors="replace")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out, total, count, seen = Path(sys.argv[1]), 0, 0, set()
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True)
        for archive in sorted(Path(folder).glob("*.deb")):
            unpacked = archive.with_suffix("")
            subprocess.run(["dpkg-deb", "-x", archive, unpacked], check=True)
            for name, text in sorted(documents(unpacked), key=lambda document: -len(document[1])):
                lines = set(text.splitlines())
                if len(text) < SHORTEST or not is_english_prose(text):
                    continue
                if 2 * len(lines & seen) > len(lines):
                    continue  # a chapter of a book whose single page came first
                seen |= lines
                count += 1
                file = out / f"{archive.name.partition('_')[0]}-{count:03}-{Path(name).stem}.txt"
                total += file.write_text(text, encoding="utf-8")
    print(f"{out}: {count} documents, {total / 1e6:.2f} million characters")


if __name__ == "__main__":
    main()
