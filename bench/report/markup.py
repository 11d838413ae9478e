"""The Markdown the suite writes, as HTML: headings, bullets, tables, fences, bold, code, links.

Sections are written once, in Markdown; the twin is that text, the page is what this file makes of
it. Only what `bench.tables` and the sections use is known; anything else is shown as a paragraph.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape

_INLINE = re.compile(r"`([^`]+)`|\*\*(.+?)\*\*|\[([^\]]+)\]\(([^)\s]+)\)")
CAPTION = "Table: "
_NUMBER = re.compile(r"-?[\d.]+( ?%|x| ms| s)?( \[.*\])?( \([a-z]\))*( of \d+)?|-?")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing with its text alternative: what it shows in a sentence, its numbers as a table."""

    caption: str
    svg: str
    numbers: str


@dataclass(frozen=True, kw_only=True)
class Raw:
    """HTML that has a wording of its own in the Markdown twin."""

    html: str
    markdown: str


@dataclass(frozen=True, kw_only=True)
class Folded:
    """Markdown that the page keeps closed until asked for."""

    title: str
    markdown: str


Part = str | Figure | Raw | Folded


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of the page; `id` is its anchor."""

    id: str
    title: str
    parts: list[Part] = field(default_factory=list)


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar inside a cell is escaped."""
    lines = [tuple(head), tuple("---" for _ in head), *(tuple(row) for row in body)]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in lines
    )


def inline(text: str) -> str:
    """A line with its bold, code and links as HTML, everything else escaped."""
    parts, end = [], 0
    for found in _INLINE.finditer(text):
        parts.append(escape(text[end : found.start()]))
        code, bold, label, target = found.groups()
        if code is not None:
            parts.append(f"<code>{escape(code)}</code>")
        elif bold is not None:
            parts.append(f"<strong>{inline(bold)}</strong>")
        else:
            parts.append(f'<a href="{escape(target)}">{inline(label)}</a>')
        end = found.end()
    return "".join(parts) + escape(text[end:])


def to_html(text: str, *, title: str, level: int = 2) -> str:
    """Markdown as HTML. A table's caption is the line "Table: ..." before it, else the heading
    above, else `title`. The text's highest heading comes one below `level`."""
    out = []
    caption = ""
    for kind, lines in _groups(lowered(text, level)):
        if kind == "heading":
            mark, _, title = lines[0].partition(" ")
            depth = len(mark)
            out.append(f"<h{depth}>{inline(title)}</h{depth}>")
        elif kind == "table":
            out.append(_table(lines, caption or title))
            caption = ""
        elif kind == "bullets":
            items = "".join(f"<li>{inline(line[2:])}</li>" for line in lines)
            out.append(f"<ul>{items}</ul>")
        elif kind == "fence":
            out.append('<pre tabindex="0"><code>' + escape("\n".join(lines[1:])) + "</code></pre>")
        elif kind == "caption":
            caption = lines[0].removeprefix(CAPTION)
        else:
            out.append(f"<p>{inline(' '.join(lines))}</p>")
    return "\n".join(out)


def lowered(text: str, level: int) -> str:
    """The text with its headings moved, the highest to one below `level`."""
    marks = [len(mark) for kind, (mark, *_) in _marked(text) if kind == "heading"]
    shift = level + 1 - min(marks, default=level + 1)
    return "\n".join(
        "#" * min(6, len(mark) + shift) + rest if kind == "heading" else mark + rest
        for kind, (mark, rest) in _marked(text)
    )


def _marked(text: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Each line as ("heading", (its marks, the rest)) or ("", (the line, "")); fences are text."""
    fenced = False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        heading = None if fenced else re.match(r"(#+)( .*)", line)
        yield ("heading", (heading[1], heading[2])) if heading else ("", (line, ""))


def _groups(text: str) -> Iterator[tuple[str, list[str]]]:
    """Neighbouring lines of one kind; a fence ends with its closing line, which is dropped."""
    group: list[str] = []
    kind = ""
    for line in text.splitlines():
        if kind == "fence":
            if line.startswith("```"):
                yield kind, group
                kind, group = "", []
            else:
                group.append(line)
            continue
        now = _kind(line)
        if group and (now != kind or now == "heading"):
            yield kind, group
            group = []
        kind = now
        if now:
            group.append(line)
    if group:
        yield kind, group


def _kind(line: str) -> str:
    if not line.strip():
        return ""
    if re.match(r"#+ ", line):
        return "heading"
    for mark, kind in (("|", "table"), ("- ", "bullets"), ("```", "fence"), (CAPTION, "caption")):
        if line.startswith(mark):
            return kind
    return "text"


def cells(line: str) -> list[str]:
    """The cells of a Markdown table line."""
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def _table(lines: list[str], caption: str) -> str:
    head, body = cells(lines[0]), [cells(line) for line in lines[2:]]
    columns = "".join(f'<th scope="col">{inline(cell)}</th>' for cell in head)
    rows = []
    for row in body:
        first, *rest = row
        columns_left = "".join(
            f'<td class="number">{inline(cell)}</td>'
            if _NUMBER.fullmatch(cell)
            else f"<td>{_breakable(cell)}</td>"
            for cell in rest
        )
        rows.append(f'<tr><th scope="row">{_breakable(first)}</th>{columns_left}</tr>')
    label = escape(re.sub(r"[`*]", "", caption))
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table: {label}">'
        f"<table><caption>{inline(caption)}</caption><thead><tr>{columns}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _breakable(cell: str) -> str:
    """A cell in which long labels (`tidar:block_len=4,beta=1`) may break at their marks."""
    return re.sub(r"(?<=\w)([,:/])(?=\w)(?![^<]*>)", r"\1<wbr>", inline(cell))


def part_html(part: Part, *, title: str) -> str:
    """One part of a section as HTML."""
    if isinstance(part, Raw):
        return part.html
    if isinstance(part, Figure):
        return (
            f"<figure>{part.svg}<figcaption>{inline(part.caption)}</figcaption>"
            f"<details><summary>The numbers of this figure</summary>"
            f"{to_html(part.numbers, title=part.caption)}</details></figure>"
        )
    if isinstance(part, Folded):
        inner = to_html(part.markdown, title=part.title, level=3)
        return f"<details><summary>{inline(part.title)}</summary>{inner}</details>"
    return to_html(part, title=title)


def part_markdown(part: Part) -> str:
    """One part of a section as Markdown; a figure is its caption and its numbers."""
    if isinstance(part, Raw):
        return part.markdown
    if isinstance(part, Figure):
        return f"{part.caption}\n\n{part.numbers}"
    if isinstance(part, Folded):
        return f"#### {part.title}\n\n{lowered(part.markdown, 4)}"
    return lowered(part, 2)
