"""Data transforms: rows in, rows out.

Every row carries its number in the data set under ``ROW``; a transform that makes new rows keeps it where it
can, so that messages can name the row. A transform that meets a row it cannot use raises ``BadRow``;
``on_bad_row`` then decides. Any other exception is a fault of the transform.
"""

from __future__ import annotations

from rlx.core.errors import DataError

ROW = "_row"
PLAIN = "_plain"  # true in rows of text that has its own marks for turns: no chat template for it


class BadRow(DataError):
    """A row that cannot be used, and why, in a few words; rows with the same words are told together."""

    default_code = "E-DATA-ROW"
