"""What mkdocs.yml cannot say: pages that lie outside of docs/, and the dated measurements in the navigation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
MEASUREMENTS = "Measurements"
EXPECTED, OPTIONAL = (
    "What to expect",
    {"Reproduction of the paper": "reproduction.md"},
)  # in the navigation once it is there


def on_config(config: Any) -> Any:
    """Fill the section of measurements, newest first, and add pages that may be there."""
    names = sorted((path.name for path in (ROOT / "docs" / "benchmarks").glob("*.md")), reverse=True)
    for section in config.nav:
        if MEASUREMENTS in section:
            section[MEASUREMENTS] = [f"benchmarks/{name}" for name in names]
        if EXPECTED in section:
            there = {title: name for title, name in OPTIONAL.items() if (ROOT / "docs" / name).is_file()}
            section[EXPECTED] += [{title: name} for title, name in there.items()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the top folder."""
    from mkdocs.structure.files import File

    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=inside((ROOT / source).read_text(encoding="utf-8"))))
    return files


def inside(text: str) -> str:
    """Links of a page of the top folder, as they must be under docs/."""
    text = re.sub(r'(\]\(|src="|href=")docs/', r"\1", text)
    for source, page in OUTSIDE.items():
        text = text.replace(f"]({source}", f"]({page}")
    return text
