"""The pages of `explore.py` and `analyze.py`: charts, groups of rows, diagnostics, templates.

May import every package but `training`.
"""
