"""Prints what conversions cost as a table: python recipes/conversion/table.py CONVERTED .."""

import sys
from pathlib import Path

from latentkv.convert import read_record


def row(folder: Path) -> list[str]:
    """Source, sizes, bytes, and perplexity before, after conversion and after healing."""
    record = read_record(folder)
    converted, healed = record["quality"], record["healings"][-1]["evaluations"][-1]
    source = converted["source"]

    def cost(quality: dict) -> str:
        return f"{quality['converted']:.2f} ({quality['converted'] / source - 1:+.1%})"

    cache = record["cache"]
    return [
        record["source"],
        f"{record['rank']} + {record['rope_dim']}",
        f"{cache['before']:,}",
        f"{cache['after']:,}",
        f"{source:.2f}",
        cost(converted),
        cost(healed),
        f"{healed['agreement']:.1%}",
    ]


head = ["source", "rank + RoPE", "bytes a token", "after", "perplexity", "converted", "healed", "likeliest the same"]
print("|", " | ".join(head), "|")
print("|---" * len(head) + "|")
for name in sys.argv[1:]:
    print("|", " | ".join(row(Path(name))), "|")
