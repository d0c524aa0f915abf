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
    """Another party's text as one line that is safe for a log and a terminal, of at most so many letters."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:longest])
