"""Quantities as people read them."""


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


def printable(text: str, longest: int = 200) -> str:
    """A text that anybody may have written, as it may reach a terminal, a log or a curve's name:
    one line, cut to length, without what is not printed (escapes, control characters, marks that
    turn the direction of writing)."""
    begin = text[: 4 * longest]
    words = "".join(letter if letter.isprintable() else " " for letter in begin).split()
    line = " ".join(words)
    return line if len(line) <= longest and len(begin) == len(text) else f"{line[: longest - 1]}…"
