"""Check every internal link of the Markdown files: the file exists, and so does the heading.

`make lint` runs it. External links are not followed. Exit code 1 and one line for each broken link.
"""

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.token import Token

EXTERNAL = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def tokens(file: Path) -> list[Token]:
    """All tokens of a file, the inline ones included."""
    blocks = MarkdownIt("commonmark").enable("table").parse(file.read_text(encoding="utf-8"))
    return [token for block in blocks for token in (block, *(block.children or []))]


def anchors(file: Path) -> set[str]:
    """The ids that GitHub gives the headings: lower case, no punctuation, hyphens, -1 and -2 if repeated."""
    found: set[str] = set()
    parsed = tokens(file)
    for opening, content in pairwise(parsed):
        if opening.type == "heading_open":
            text = "".join(t.content for t in content.children or [] if t.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            number = 0
            while (name := f"{slug}-{number}" if number else slug) in found:
                number += 1
            found.add(name)
    return found


def broken(file: Path) -> list[str]:
    """The file's links that lead nowhere, as `file: link: why`."""
    links = [t.attrGet("href") or t.attrGet("src") for t in tokens(file) if t.type in ("link_open", "image")]
    faults = []
    for link in (str(link) for link in links if link and not EXTERNAL.match(str(link))):
        path, _, anchor = link.partition("#")
        target = (file.parent / unquote(path)).resolve() if path else file.resolve()
        if not target.exists():
            faults.append(f"{file}: {link}: no such file")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            faults.append(f"{file}: {link}: no such heading")
    return faults


def main() -> int:
    names = subprocess.check_output(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"], text=True
    )
    files = [Path(name) for name in names.splitlines() if Path(name).exists()]
    faults = [fault for file in files for fault in broken(file)]
    sys.stdout.write(
        "".join(f"{fault}\n" for fault in faults)
        + f"{len(files)} Markdown files, {len(faults)} broken links\n"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
