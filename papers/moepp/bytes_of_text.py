"""What a byte is in its text, so that routing can be told by kind of byte (the stand-in for the paper's parts of speech, Fig. 5)."""

from __future__ import annotations

import numpy as np

CLASSES = ("word start", "inside a word", "digit", "indentation", "space", "newline", "operator or bracket", "other")


def classify(text: np.ndarray) -> np.ndarray:
    """Index into :data:`CLASSES` for every byte of ``text`` (uint8 [n]).

    A word is a run of letters, digits and underscores that starts with a letter or underscore; indentation is the run of blanks at the
    start of a line; a NUL or a byte above 127 is ``other``.
    """
    blank = (text == 32) | (text == 9)
    newline = (text == 10) | (text == 13)
    letter = ((text >= 65) & (text <= 90)) | ((text >= 97) & (text <= 122)) | (text == 95)
    number = (text >= 48) & (text <= 57)
    in_word = letter | number
    run_start = in_word & ~np.concatenate([[False], in_word[:-1]])
    identity = np.maximum.accumulate(np.where(run_start, np.arange(len(text)), 0))
    word = in_word & letter[identity]
    kind = np.full(len(text), CLASSES.index("operator or bracket"))
    kind[(text > 126) | (text < 32)] = CLASSES.index("other")
    kind[newline] = CLASSES.index("newline")
    line_start = np.maximum.accumulate(np.where(newline, np.arange(len(text)), -1)) + 1
    solid = np.maximum.accumulate(np.where(~blank, np.arange(len(text)), -1))
    kind[blank] = CLASSES.index("space")
    kind[blank & (solid < line_start)] = CLASSES.index("indentation")
    kind[number & ~word] = CLASSES.index("digit")
    kind[word] = CLASSES.index("inside a word")
    kind[word & run_start] = CLASSES.index("word start")
    return kind
