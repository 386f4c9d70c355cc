"""The one exception for mistakes that a user can correct, and a safe way to show names from outside."""

import unicodedata


class UserError(ValueError):
    """A mistake in an option or a file, in one line: the option or file, its value, the remedy.

    Raised where the value enters. The entry points print it once, on rank 0, without a traceback, and exit with code 2.
    """


def require(ok: bool, message: str) -> None:
    """Raise `UserError(message)` unless `ok`."""
    if not ok:
        raise UserError(message)


BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    """Escape what a terminal, page or table would obey rather than show, as in \\x1b.

    These are control characters, line breaks among them, characters that reverse the order of letters, and invalid UTF-8.
    """
    if text.isprintable():
        return text
    return "".join(char.encode("unicode_escape").decode() if _is_obeyed(char) else char for char in text)


def printable_lines(text: str) -> str:
    """Escape as `printable` does, but keep line breaks: for a table that is laid out already."""
    return "\n".join(map(printable, text.split("\n")))


def _is_obeyed(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char in BIDI
