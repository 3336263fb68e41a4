"""The same texts as a file of each kind that the readers read."""

import gzip
import json

import pyarrow
from pyarrow import parquet

EOS = 257
TEXTS = [f"document {i}: " + "\u00e9x" * (i * 7 % 40) for i in range(300)] + ["", None, "a\nb"]
KINDS = ["text", "text.gz", "text.jsonl", "text.jsonl.gz", "text.parquet"]


def write(path, texts=TEXTS, row_group_size=100, column="text"):
    """The texts as one file of the kind its name says; plain text joins them."""
    if path.name.endswith(".parquet"):
        table = pyarrow.table({"id": range(len(texts)), column: texts})
        parquet.write_table(table, path, row_group_size=row_group_size)
    else:
        lines = (json.dumps({"id": i, column: text}) for i, text in enumerate(texts))
        jsonl = ".jsonl" in path.suffixes
        data = "\n".join(lines) if jsonl else "".join(text or "" for text in texts)
        with (gzip.open if path.suffix == ".gz" else open)(path, "wb") as file:
            file.write(data.encode())
    return path
