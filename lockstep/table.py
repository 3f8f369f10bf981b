"""Plain tables for terminals."""

from collections.abc import Sequence

from lockstep.client.results import RankInfo


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns of equal width, right aligned, separated by " | "."""
    cells = [list(map(str, header)), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    ]
    rule = "-+-".join("-" * width for width in widths)
    return "\n".join([lines[0], rule, *lines[1:]])


def rank_table(ranks: Sequence[RankInfo]) -> str:
    """What each rank is and did."""
    header = (
        "rank",
        "pid",
        "device",
        "heads",
        "KV heads",
        "parameters",
        "bytes read",
        "all-reduces",
    )
    rows = [
        (
            rank.rank,
            rank.pid,
            rank.device,
            rank.local_q_head_count,
            rank.local_kv_head_count,
            f"{rank.parameter_count:,}",
            f"{rank.bytes_read:,}",
            f"{rank.all_reduce_count:,}",
        )
        for rank in ranks
    ]
    return format_table(header, rows)
