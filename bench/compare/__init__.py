"""Base against head: counters must be equal, speedups may not fall; see docs/regress.md.

Reading half: measuring is `bench.regress`. Nothing here imports torch at module level.
"""
