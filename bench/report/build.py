"""Puts the report together: sections from records, one page without a network, its Markdown twin.

`write_report` is what `bench report` calls. The page holds its style, its script and its drawings;
it loads nothing, so it opens from disk and can be mailed.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from bench.claims_ours import run_folders
from bench.figures import gather
from bench.report.acceptance import acceptance
from bench.report.claims import claims
from bench.report.costs import utilisation, widths
from bench.report.headline import headline
from bench.report.markup import Section, part_html, part_markdown
from bench.report.miniature import miniature
from bench.report.player import HOW_TO_READ, examples, player
from bench.report.provenance import environment, reproduce, validity
from bench.report.quality import quality
from bench.report.results import results, step_costs
from bench.report.source import Source
from bench.store import read_record, write_whole
from tidar_ref.errors import UserError

HTML, MARKDOWN = "report.html", "report.md"


def write_report(folders: Sequence[Path], out: Path | None = None) -> tuple[Path, Path]:
    """Write report.html and report.md of these record folders; gives both paths.

    Without `out` they go into the record folder, of which there must then be one. UserError for a
    folder that is no record, a record without any generation, or a place that cannot be written.
    """
    if out is None and len(folders) != 1:
        raise UserError("a report of several records belongs to none: name a folder with --out")
    target = out or folders[0]
    title = "TiDAR, measured"
    # A width record has no run in it: its curves join the page, its header is its own.
    runs = run_folders(folders)
    curves = [folder for folder in folders if folder not in runs]
    sources = [_source(folder) for folder in runs]
    if not sources:
        raise UserError("only width records are named; name the record of a run too")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {target} ({error.strerror}); name another --out") from error
    made = build(sources, curves=curves)
    write_whole(target / HTML, page(made, title))
    write_whole(target / MARKDOWN, twin(made, title))
    return target / HTML, target / MARKDOWN


def _source(folder: Path) -> Source:
    record = read_record(folder)
    if not record.measurements:
        raise UserError(f"{folder} holds no finished generation; let its run finish one first")
    return Source(folder=folder, record=record)


def build(
    sources: Sequence[Source], *, curves: Sequence[Path] = (), paper_figures: bool = True
) -> list[Section]:
    """All sections in reading order; a section that has nothing to say is left out.

    curves: folders of width records (`bench slots`).
    The paper's figures are drawn by matplotlib and take seconds: a caller may do without.
    """
    folders = [*(source.folder for source in sources), *curves]
    ours = gather(folders) if paper_figures else None
    names = [source.record.name for source in sources]
    if len(set(names)) < len(names):
        raise UserError(f"record {max(names, key=names.count)} is named twice; name it once")
    # Random weights decode noise: their steps are played only where there is nothing else.
    played = [source for source in sources if source.scored] or list(sources)
    shown = [example for source in played for example in examples(source.folder, source.record)]
    total = sum(len(source.record.measurements) for source in played)
    watch = Section(
        id="player",
        title="Watch it decode",
        parts=[HOW_TO_READ, player(shown, total=total)],
    )
    every = [
        headline(sources),
        watch,
        results(sources),
        step_costs(sources),
        miniature(sources),
        quality(sources, ours),
        acceptance(sources),
        widths(sources, curves, ours),
        claims(folders),
        utilisation(sources),
        validity(sources),
        environment(sources),
        reproduce(sources, curves),
    ]
    return [section for section in every if section is not None]


def page(made: Sequence[Section], title: str) -> str:
    """The whole HTML page."""
    parts = {
        "title": escape(title),
        "style": asset("style.css"),
        "script": asset("player.js"),
        "made": "",
        "links": "".join(f'<li><a href="#{s.id}">{escape(s.title)}</a></li>' for s in made),
        "sections": "\n".join(map(_section, made)),
    }
    text = asset("page.html")
    # The records' own text may hold braces: every name is replaced once, where the frame has it.
    pieces = text.split("{{")
    out = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("}}")
        out += [parts[name], rest]
    return "".join(out)


def _section(section: Section) -> str:
    inner = "\n".join(part_html(part, title=section.title) for part in section.parts)
    return (
        f'<section id="{section.id}" aria-labelledby="{section.id}-title">'
        f'<h2 id="{section.id}-title">{escape(section.title)}</h2>\n{inner}\n</section>'
    )


def twin(made: Sequence[Section], title: str) -> str:
    """The same in Markdown; figures are their numbers, the player is a table."""
    chunks = [f"# {title}"]
    for section in made:
        chunks.append(f"## {section.title}")
        chunks += map(part_markdown, section.parts)
    return "\n\n".join(chunk.strip() for chunk in chunks if chunk.strip()) + "\n"


def asset(name: str) -> str:
    """A file of this package's data."""
    return files("bench.report").joinpath(name).read_text(encoding="utf-8")
