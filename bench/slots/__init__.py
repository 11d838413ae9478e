"""What a forward costs by query width, KV length and batch: measured, split, and made tables of.

`plan` says what to measure, `timing` and `engine` measure it (torch), `record` keeps every sample,
`curves` and `page` read it again without torch; the plot is `bench.figures.slots`. docs/slots.md.
"""
