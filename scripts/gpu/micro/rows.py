"""What a run of microbenchmarks found: one row for each thing measured, printed, as JSON and as a page."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One line.

    Attributes:
        ms: median milliseconds of one call; None where nothing was timed.
        tflops, tbps: operations, and bytes read and written, a second, both in 1e12.
        error: norm of the difference over norm, against what `note` or the section says.
        note: in words.
    """

    section: str
    name: str
    ms: float | None = None
    tflops: float | None = None
    tbps: float | None = None
    error: float | None = None
    note: str = ""


SAID = {
    "ceilings": "What the device reaches at most: large products, a large copy.",
    "attention": "One layer's attention, each backend of `model.attention`. Errors are against float32, on 64 queries.",
    "gemm": "One linear of a layer. Errors are against float32 of what was not quantised; weights not in the cache.",
    "elementwise": "Operations of `kernels.py`, inputs not in the cache. Triton's errors are against PyTorch's.",
    "noise": "Noise is drawn ahead on the host; recorded passes read it and draw nothing.",
    "block": "Whole blocks, four steps and the clean pass, with a full window. TFLOP/s count all operations of the "
    "definition, whatever a preset saves. Errors are of the first block's latents against those of `reference`.",
    "vae": "Convolutions as the decoder calls them, and whole decoders, a latent frame of four frames. Errors are of "
    "bytes, against the plain class.",
}
"""What a page says under a section's heading."""
COLUMNS = {"ms": "ms", "tflops": "TFLOP/s", "tbps": "TB/s", "error": "error", "note": "note"}
"""Fields of a row by the heading of their column."""


def line(row: Row) -> str:
    """A row as the terminal shows it."""
    cells = [f"  {row.name:<62}"]
    for field, unit in (("ms", "ms"), ("tflops", "TFLOP/s"), ("tbps", "TB/s")):
        if getattr(row, field) is not None:
            cells.append(f"{_cell(row, field):>9} {unit}")
    if row.error is not None:
        cells.append(f"error {_cell(row, 'error')}")
    return "  ".join([*cells, row.note]).rstrip()


def write_json(path: Path, environment: dict[str, str], rows: list[Row]) -> None:
    """Writes `environment` and `rows`, each row as the fields of `Row`."""
    found = {"environment": environment, "rows": [asdict(row) for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def write_markdown(path: Path, environment: dict[str, str], rows: list[Row]) -> None:
    """Writes a page: how it was measured and where, then a table for each section."""
    page = [
        "# Microbenchmarks",
        "",
        "LongLive-1.3B's geometry with random weights, by `scripts/gpu/microbench.py`, which wrote this page. Medians",
        "by CUDA events of calls recorded as graphs, after warm-up, on random inputs; `note` says what is otherwise.",
        "",
        *table([Row("env", name, note=value) for name, value in environment.items()]),
    ]
    for section in dict.fromkeys(row.section for row in rows if row.section != "env"):
        page += ["", f"## {section}", "", SAID[section], ""]
        page += table([row for row in rows if row.section == section])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(page) + "\n", encoding="utf-8")


def table(rows: list[Row]) -> list[str]:
    """Lines of a Markdown table, without columns that no row has."""
    fields = [field for field in COLUMNS if any(getattr(row, field) not in (None, "") for row in rows)]
    lines = ["| " + " | ".join(["what", *(COLUMNS[field] for field in fields)]) + " |"]
    lines.append("|---" * (1 + len(fields)) + "|")
    for row in rows:
        cells = [row.name, *(_cell(row, field) for field in fields)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def _cell(row: Row, field: str) -> str:
    value = getattr(row, field)
    if value is None or field == "note":
        return value or ""
    if field == "error":
        return f"{value:.1e}" if value else "0"
    if field == "tbps":
        return f"{value:.2f}"
    return f"{value:.0f}" if value >= 1000 else f"{value:.4f}" if value < 1 else f"{value:.2f}"
