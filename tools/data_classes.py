"""Write docs/data-check.md: how `afina data check` works, and every class of faults it knows.

python tools/data_classes.py            writes the page
python tools/data_classes.py --check    exits 1 when it is out of date
"""

import os
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "data-check.md"
BEGIN = "<!-- Everything below is made by tools/data_classes.py from src/afina/data/audit. Do not edit. -->\n"


def table() -> str:
    """Every class, by group."""
    from afina.data.audit.kinds import groups

    lines = [BEGIN, "## The classes\n", "An **error** stops training; a warning or a note does not.\n"]
    for name, kinds in groups().items():
        lines += [f"### {name}\n", "| class | | what was found | what to do |", "|---|---|---|---|"]
        for kind in kinds:
            severity = f"**{kind.severity}**" if kind.severity == "error" else kind.severity
            lines.append(f"| `{kind.id}` | {severity} | {kind.sentence} | {kind.advice} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    """Write the page, or say whether it is as it should be."""
    os.environ["AFINA_LANG"] = "en"
    before = PAGE.read_text("utf-8")
    after = before.partition(BEGIN)[0] + table()
    if "--check" in sys.argv:
        return int(before != after)
    PAGE.write_text(after, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
