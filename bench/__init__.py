"""Measures whatever obeys the decoder protocol: tasks, harness, records, tables.

Importing this package loads nothing else; each part is imported where it is used.
"""
