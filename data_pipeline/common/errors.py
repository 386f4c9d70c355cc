"""The one exception for mistakes that a user can mend, and how names from outside are shown."""

import unicodedata


class UserError(ValueError):
    """A mistake in an option or a file, said in one line: what, which value, what to do.

    Raised where the value enters. The entry points print it once, on rank 0, without a traceback, and exit with code 2.
    """


def require(ok: bool, message: str) -> None:
    """Raise `UserError(message)` unless `ok`."""
    if not ok:
        raise UserError(message)


BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    """Text as any terminal, page or table takes it: what would be obeyed rather than shown is escaped, as in \\x1b.

    That is control characters, line breaks among them, what reverses the order of letters, and bytes that are no UTF-8.
    """
    if text.isprintable():
        return text
    return "".join(char.encode("unicode_escape").decode() if _is_obeyed(char) else char for char in text)


def printable_lines(text: str) -> str:
    """`printable`, but the line breaks are meant: of a table that is laid out already."""
    return "\n".join(map(printable, text.split("\n")))


def _is_obeyed(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char in BIDI
