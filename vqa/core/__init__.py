"""What every other package leans on: errors, atomic files, distributed runs, hashing, dtypes, private APIs.

Nothing here knows of contests, rows or models. It imports none of the other packages.
"""
