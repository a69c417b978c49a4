"""Numbers as short texts, and rows of texts as Markdown tables."""


def number(value, digits=3):
    """Three digits that count, or a dash for None.

    Examples:
        >>> number(1234.5), number(25.679), number(0.4, 2), number(None)
        ('1234', '25.7', '0.40', '-')
    """
    if value is None:
        return "-"
    before = len(f"{abs(value):.0f}") if abs(value) >= 1 else 0
    return f"{value:.{max(0, digits - before)}f}"


def percent(share):
    """A share as text."""
    return "-" if share is None else f"{100 * share:.0f} %"


def markdown(rows):
    """Rows as a Markdown table: the first column to the left, the others to the right.

    Args:
        rows (list of dict): With the same keys.

    Examples:
        >>> print(markdown([{"model": "a", "MB": "1.5"}]))
        | model |  MB |
        |:------|----:|
        | a     | 1.5 |
    """
    keys = list(rows[0])
    widths = [max(len(text) for text in (key, *(row[key] for row in rows))) for key in keys]

    def line(texts):
        padded = (t.rjust(w) if i else t.ljust(w) for i, (t, w) in enumerate(zip(texts, widths)))
        return f"| {' | '.join(padded)} |"

    rule = "|".join(f"{'-' * (w + 1)}:" if i else f":{'-' * (w + 1)}" for i, w in enumerate(widths))
    return "\n".join([line(keys), f"|{rule}|", *(line(row.values()) for row in rows)])
