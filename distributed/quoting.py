"""Quote text from files in messages. A name in a checkpoint may contain any character and be as long as the file."""

LIMIT = 100
"""Number of characters of a name that are shown."""


def printable(text: object) -> str:
    """Return `text` on one line, with control characters escaped, truncated to LIMIT characters."""
    whole = str(text)
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in whole[:LIMIT])
    return "".join(shown) + "..." * (len(whole) > LIMIT)


def quote(name: object) -> str:
    """Return the name in quotes, escaped and truncated by `printable`."""
    return f"'{printable(name)}'"


def first_names(keys: list[str]) -> str:
    """Return the first three names, quoted, and the number of further names."""
    return ", ".join(map(quote, keys[:3])) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
