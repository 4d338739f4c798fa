"""How Sphinx makes the pages (`make docs`). Its source folder is the repository, where links lead to the same files."""

import flash_entmax

project = "flash-entmax"
author = "the flash-entmax developers"
version = release = flash_entmax.__version__

root_doc = "docs/index"
include_patterns = ["docs/**.md", "benchmarks/results/*.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
autodoc_typehints = "none"  # the docstrings say shapes, units and dtypes
autodoc_member_order = "bysource"
napoleon_use_rtype = False
myst_heading_anchors = 4

html_theme = "furo"
html_title = "flash-entmax"
html_show_sphinx = False
html_copy_source = False
