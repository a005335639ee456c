"""Words, lines and sentences per page, and options and lines of ``--help`` per command.

    python benchmarks/prose_counts.py            # the counts of README, docs/ and the command line
    python benchmarks/prose_counts.py --check    # exits 1 where README or a sentence of a page is too long

A paragraph, a list item and a cell of a table end a sentence; code blocks are left out, and inline code is one word.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
README_LINES, README_WORDS, SENTENCE_WORDS = 110, 900, 30
HIDDEN = re.compile(r"^---\n.*?\n---\n|^ *(```|~~~).*?^ *\1[^\n]*$|<!--.*?-->|<[^>\n]+>", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[((?:[^\[\]]|\[[^\]]*\])*)\]\([^)]*\)")
BLOCK = re.compile(r"^ *(?:[-*+] |\d+\. |#+ |>|!!!|\|[-| :]+\|$)|^\s*$|\|")
END = re.compile(r"(?<!et al)(?<!e\.g)(?<!i\.e)(?<!\bvs)[.!?][)\"*]*\s+(?=[^a-z\s]|regrow)")


@dataclass(frozen=True)
class Page:
    """The counts of one page."""

    name: str
    words: int
    lines: int
    long: tuple[str, ...]
    longest: int


def sentences(text: str) -> Iterator[str]:
    """The sentences of a Markdown page."""
    text = LINK.sub(r"\1", re.sub(r"`+[^`]+`+", "CODE", HIDDEN.sub("\n", text)))
    block: list[str] = []
    for line in [*text.splitlines(), ""]:
        if BLOCK.match(line) or "|" in line:
            yield from END.split(" ".join(block))
            block = []
            *cells, line = line.split("|")
            for cell in cells:
                yield from END.split(cell)
        block.append(BLOCK.sub("", line, count=1).strip())


def size(sentence: str) -> int:
    """The number of words of a sentence."""
    return sum(any(map(str.isalnum, word)) for word in sentence.split())


def count(path: Path) -> Page:
    """The counts of a page."""
    text = path.read_text("utf-8")
    lengths = {sentence: size(sentence) for sentence in sentences(text)}
    long = tuple(sentence.strip() for sentence, n in lengths.items() if n > SENTENCE_WORDS)
    name = path.relative_to(ROOT).as_posix()
    return Page(name, len(text.split()), len(text.splitlines()), long, max(lengths.values(), default=0))


def checked(page: Page) -> list[str]:
    """What is too long on a page."""
    found = [f"{page.name}: {size(sentence)} words: {sentence}" for sentence in page.long]
    if page.name == "README.md" and (page.lines > README_LINES or page.words > README_WORDS):
        found.append(f"README.md: {page.lines} lines, {page.words} words; at most {README_LINES} and {README_WORDS}")
    return found


def commands() -> Iterator[tuple[str, int, int, int]]:
    """Per command: options in all, options that ``--help`` shows, and its lines."""
    import click

    from regrow.cli.app import regrow

    for name, command in regrow.commands.items():
        shown = command.get_help(click.Context(command, info_name=name, terminal_width=110)).splitlines()
        options = sum(isinstance(option, click.Option) for option in command.params)
        yield name, options, sum(line.startswith("  -") for line in shown), len(shown)


if __name__ == "__main__":
    pages = [count(path) for path in (*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")))]
    if "--check" in sys.argv[1:]:
        sys.exit("\n".join(line for page in pages for line in checked(page)) or None)
    for page in pages:
        print(f"{page.name}: {page.words} words, {page.lines} lines, longest {page.longest}, {len(page.long)} over 30")
    for name, options, shown, lines in commands():
        print(f"regrow {name}: {options} options, {shown} shown in {lines} lines of --help")
