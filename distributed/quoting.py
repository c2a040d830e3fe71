"""Text from files in messages: a name out of a checkpoint may hold anything, and be as long as the file."""

LIMIT = 100
"""Characters that are shown of a name."""


def printable(text: object, limit: int = LIMIT) -> str:
    """Return `text` in one line: control characters escaped, cut after `limit` characters."""
    whole = str(text)
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in whole[:limit])
    return "".join(shown) + "..." * (len(whole) > limit)


def quote(name: object) -> str:
    """Return a name in quotes, as `printable` shows it."""
    return f"'{printable(name)}'"


def first_names(keys: list[str]) -> str:
    """Return the first three names, quoted, and how many there are beside them."""
    return ", ".join(map(quote, keys[:3])) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
