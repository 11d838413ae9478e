"""The report: one page that opens from disk and its Markdown twin, made from record folders.

`build.py` puts the page together, `sections.py`, `acceptance.py` and `costs.py` say what stands on
it, `player.py` feeds the step player, `plots.py` draws, `markup.py` turns Markdown into HTML.
Everything shown comes from a record. No torch, no matplotlib, no network.
"""
