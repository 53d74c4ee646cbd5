"""Say what is wrong with data: no answer where answers are to be learnt, a loss that is not finite.

One need not read this to understand Bone.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import data
from binidx import Binidx, Documents


def check_mask(documents: Documents, config: data.BatchConfig) -> tuple[int, int]:
    """Count the rows without an answer, of 300 windows of the run or of 1000 documents.

    Returns their number, and how many rows were looked at. ValueError if none has an answer.
    """
    markers = data.markers_of(config.loss_mask)
    if markers is None:
        return 0, 0
    if documents.vocabulary:
        raise ValueError(
            f"{documents.prefix}: its tokens are characters, in which --loss_mask finds no marker; "
            "use pad or none"
        )
    one_row = not isinstance(documents, Binidx)
    if one_row and config.dataload != "get":
        raise ValueError(
            f"{documents.prefix}: one long row of tokens, in whose pieces --loss_mask cannot tell "
            "where a line begins; use --dataload get, or documents (a .jsonl, binidx files)"
        )
    if config.dataload == "get":
        kind, steps = "windows", range(math.ceil(300 / config.micro_bsz))
        silent = [not row.any() for i in steps for row in data.batch(documents, i, config)[2]]
    else:
        kind = "documents"
        one_by_one = replace(config, micro_bsz=1, dataload="only", shuffle=False)
        silent = []
        for i in range(min(1000, len(documents))):
            _, _, mask = data.batch(documents, i, one_by_one)
            silent.append(not mask.any())
    if all(silent):
        begin, end = markers
        where = " at the beginning of a line" if begin[0].isalnum() else ""
        if config.cut and config.dataload != "get":
            where += f" in the first {config.ctx_len} tokens"
        advice = (
            f"answers follow {begin} and end at {end}; --loss_mask se --mask_id takes other "
            "markers, --loss_mask pad learns all"
        )
        if config.cut and config.dataload != "get":
            advice += "; a longer --ctx_len reaches farther"
        raise ValueError(
            f"{documents.prefix}: no answer in {len(silent)} {kind}: no {begin}{where}; {advice}"
        )
    return sum(silent), len(silent)


def describe_bad_rows(
    documents: Documents, losses: Sequence[float], first: int, *, config: data.BatchConfig
) -> str:
    """Name the rows of micro batches `first`, ... whose loss is not finite; all, if each is."""
    bad = [n for n, loss in enumerate(losses) if not math.isfinite(loss)]
    rows = []
    for n in bad or range(len(losses)):
        rows += data.rows_of(documents, first + n, config)
    if documents.numbers is not None:
        rows = documents.numbers[rows].tolist()
    what = "rows that begin at tokens" if config.dataload == "get" else "documents"
    return f"{what} {' '.join(map(str, rows))}, counted from 0"
