"""The report: one page that opens from disk and its Markdown twin, made from record folders.

`build.py` puts the page together; `headline.py`, `results.py`, `quality.py`, `acceptance.py`,
`costs.py`, `claims.py` and `provenance.py` say what stands on it, `paper.py` sets the paper's
figures, `player.py` feeds the step player, `plots.py` draws, `markup.py` turns Markdown into HTML.
Everything shown comes from a record. No torch, no matplotlib, no network.
"""
