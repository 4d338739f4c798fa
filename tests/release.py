"""Build the wheel and the sdist, and try the wheel as a user would: in an environment of its own, without the checkout.

`make release` takes a minute or two beside the installation of torch. With --python it takes another Python, and with
--torch another torch, so that the oldest and the newest that pyproject.toml promises can be tried. The two files are
left in dist/. Nothing is uploaded.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
SMOKE = """
import pathlib, sys, torch, flash_entmax
assert pathlib.Path(flash_entmax.__file__).is_relative_to(sys.prefix), flash_entmax.__file__
from flash_entmax import entmax, entmax_attention, entmax_loss
from flash_entmax.nn import EntmaxAttention
query, key, value = (torch.randn(1, 4, 300, 32, requires_grad=True) for _ in range(3))
output, support = entmax_attention(query, key, value, is_causal=True, return_support=True)
output.sum().backward()
exact = entmax_attention(query.double(), key.double(), value.double(), is_causal=True, impl="reference")
assert (output - exact).abs().max() < 1e-4 and query.grad.isfinite().all() and support.size.min() >= 1
assert abs(entmax(torch.randn(5, 9)).sum(-1) - 1).max() < 1e-5
entmax_loss(torch.randn(5, 9, requires_grad=True), torch.arange(5)).backward()
assert EntmaxAttention(64, 4)(torch.randn(2, 50, 64)).shape == (2, 50, 64)
print("ten lines of Python: right, with", torch.__version__, "on Python", sys.version.split()[0])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="that the wheel is installed for")
    parser.add_argument("--torch", default="torch", help="what pip installs before the wheel, such as torch==2.13.0")
    options = parser.parse_args()
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", DIST, ROOT)  # the wheel is built from the sdist
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
    check_sdist(sdist)
    check_wheel(wheel)
    with tempfile.TemporaryDirectory() as folder:
        try_wheel(wheel, Path(folder), options.python, options.torch)
    print(f"{sdist.name} and {wheel.name} can be released")


def check_sdist(sdist: Path) -> None:
    """It holds every file of the repository, and what the build adds."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    same("sdist", names, tracked() | {"PKG-INFO"})


def check_wheel(wheel: Path) -> None:
    """It holds the package, its metadata and the licence."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    added = {f"{metadata}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    same("wheel", names, {name for name in tracked() if name.startswith("flash_entmax/")} | added)


def tracked() -> set[str]:
    """The files of the repository, as git knows them; .gitignore goes into every sdist."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines())


def same(where: str, found: set[str], expected: set[str]) -> None:
    if found != expected:
        sys.exit(f"{where}: too much: {sorted(found - expected)}; missing: {sorted(expected - found)}")
    print(f"{where}: {len(found)} files, as expected")


def try_wheel(wheel: Path, folder: Path, python: str, torch: str) -> None:
    """Install it, and run its commands and ten lines of Python outside of the checkout."""
    run(python, "-m", "venv", folder / "venv")
    bin = folder / "venv" / "bin"
    run(bin / "pip", "install", "--quiet", torch)
    run(bin / "pip", "install", "--quiet", wheel)
    run(bin / "pip", "check")
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for command in (("flash-entmax", "info"), ("flash-entmax", "check"), ("python", "-I", "-c", SMOKE)):
        run(bin / command[0], *command[1:], cwd=folder, env=outside)


def run(*command: object, **options) -> None:
    print("$", *(str(part) if len(str(part)) < 200 else "..." for part in command), flush=True)
    subprocess.run([str(part) for part in command], check=True, **options)


if __name__ == "__main__":
    main()
