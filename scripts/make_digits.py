"""Writes zoo/data/embedded/digits.parquet: UCI's optical recognition of handwritten digits, test part, as 8x8 PNGs.

Source: E. Alpaydin and C. Kaynak (1998), archive.ics.uci.edu/dataset/80, doi:10.24432/C50P49, CC BY 4.0; taken from
scikit-learn, which ships it. The 17 grey levels 0..16 are spread over 0..255. Layout: the Hub's (image, label).

    python scripts/make_digits.py
"""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits

TARGET = Path(__file__).parent.parent / "zoo" / "data" / "embedded" / "digits.parquet"


def main() -> None:
    digits = load_digits()
    rows = []
    for i, picture in enumerate(digits.images):
        buffer = io.BytesIO()
        Image.fromarray(np.round(picture * 255 / 16).astype(np.uint8)).save(buffer, "PNG", optimize=True)
        rows.append({"bytes": buffer.getvalue(), "path": f"{i:04d}.png"})
    features = {
        "image": {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": [str(digit) for digit in range(10)]},
    }
    table = pa.table(
        {
            "image": pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "label": pa.array(digits.target.tolist(), pa.int64()),
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, TARGET, compression="zstd")
    print(f"{TARGET.name}: {table.num_rows} pictures, {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
