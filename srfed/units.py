"""Quantities as people read them, and what anybody may have written as people may see it."""

from collections.abc import Sequence

LONGEST_SENTENCE = 2000
"""Characters of a sentence of ours with what it quotes."""
_MOST_LINES = 500
_END_OF_SENTENCE = 500
"""So much of a longer one's end stays: it says what to do."""


def bytes_in_words(count: float) -> str:
    """3145728 -> "3.1 MB" (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def seconds_in_words(seconds: float) -> str:
    """75 -> "1m15s"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m"


def tasks_in_words(names: Sequence[str]) -> str:
    """["a"] -> "task a", ["a", "b", "c", "d"] -> "tasks a, b, c and 1 more"; each is named once."""
    different = list(dict.fromkeys(names))
    if len(different) == 1:
        return f"task {different[0]}"
    more = f" and {len(different) - 3} more" if len(different) > 3 else ""
    return f"tasks {', '.join(different[:3])}{more}"


def printable(text: str, longest: int = 200) -> str:
    """A text that anybody may have written, as it may reach a terminal, a log or a curve's name:
    one line, cut to length, without what is not printed (escapes, control characters, marks that
    turn the direction of writing)."""
    begin = text[: 4 * longest]
    words = "".join(letter if letter.isprintable() else " " for letter in begin).split()
    line = " ".join(words)
    return line if len(line) <= longest and len(begin) == len(text) else f"{line[: longest - 1]}…"


def escaped(text: str, longest: int = LONGEST_SENTENCE) -> str:
    """A line of ours that may quote what anybody wrote (a file's name, a key of YAML, a library's
    words), as it may reach a terminal, a log or a record: what is not printed stands there as
    Python writes it, and of one that is too long the middle is left out.

    >>> escaped("cannot read a\\x1b[2J\\nb")
    'cannot read a\\\\x1b[2J\\\\nb'
    """
    if len(text) > longest:
        end = min(_END_OF_SENTENCE, longest // 4)
        text = f"{text[: longest - end - 3]} … {text[-end:]}"
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def escaped_lines(text: str) -> list[str]:
    """The lines of a text such as a traceback, each as :func:`escaped`; of too many the last."""
    return [escaped(line) for line in text.splitlines()[-_MOST_LINES:]]
