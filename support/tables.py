"""A table in a terminal."""

MOST_COLUMNS = 12  # side by side


def show(cell: float | str) -> str:
    return f"{cell:#.4g}" if isinstance(cell, float) else str(cell)


def print_table(title: str, rows: dict[str, dict], columns: list[str], most_rows: int | None = None) -> None:
    """Print rows of numbers or texts, twelve columns side by side. A missing cell is a dash.

    Args:
        rows: {name of the row: {name of the column: cell}}.
        most_rows: if there are more, dots stand for the rows between the first two and the last ones. None: no limit.
    """
    texts = {name: {column: show(row.get(column, "-")) for column in columns} for name, row in rows.items()}
    if most_rows and len(texts) > most_rows:
        names = [*list(texts)[:2], "...", *list(texts)[-(most_rows - 3) :]]
        texts = {name: texts.get(name, dict.fromkeys(columns, "...")) for name in names}
    indent = max([14, *(len(name) + 2 for name in (title, *texts))])
    for first in range(0, len(columns), MOST_COLUMNS):
        block = columns[first : first + MOST_COLUMNS]
        widths = {column: max(len(row[column]) for row in ({column: column}, *texts.values())) + 2 for column in block}
        print(f"  {title:<{indent}}" + "".join(f"{column:>{widths[column]}}" for column in block))
        for name, row in texts.items():
            print(f"    {name:<{indent - 2}}" + "".join(f"{row[column]:>{widths[column]}}" for column in block))
