"""``pc3d data check``: what is in a folder of clouds, before anyone trains on it."""

from __future__ import annotations

from pathlib import Path

from pc3d.cli.parser import Parser, suggest
from pc3d.cli.predict import parse_columns
from pc3d.errors import InputError

EXAMPLES = """\
  pc3d data check my_scans
  pc3d data check my_scans --labels labels.yaml
  pc3d data check my_scans --labels labels.yaml --label_field classification --json report.json

labels.yaml maps the codes in the files to class names, 'ignore' leaves points out:
  2: ground
  6: building
  7: ignore"""


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["inspect"]:
        from pc3d.cli.inspect_data import main as inspect

        return inspect(arguments[1:])
    parser = Parser("data", "Check a folder of clouds: counts per class, unknown codes, ranges, grid size.", EXAMPLES)
    parser.add_argument("action", metavar="check", help="or inspect: see pc3d data inspect --help")
    parser.add_argument("folder", metavar="DIR", help="folder of clouds (or one file), searched with its sub-folders")
    parser.add_argument("--labels", metavar="YAML", help="label map: code -> class name")
    parser.add_argument("--label_field", metavar="NAME", help="field that holds the labels; default: a usual name")
    parser.add_argument("--columns", metavar="NAMES", help="columns of .bin, .npy and text files: x,y,z,intensity")
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON too")
    options = parser.parse_args(arguments)
    if options.action != "check":
        raise InputError(f"pc3d data: unknown action '{options.action}'{suggest(options.action, ['check', 'inspect'])}")

    from pc3d.data.check import check_folder
    from pc3d.io import atomic_write

    report = check_folder(Path(options.folder), options.labels, options.label_field, parse_columns(options.columns))
    report.print()
    if options.json:
        with atomic_write(options.json) as temporary:
            temporary.write_text(report.to_json() + "\n")
    if not report.ok:
        broken = [item.error for item in report.files if item.error]
        unknown = ", ".join(f"{code} ({count:,} points)" for code, count in report.unknown.items())
        problems = ([f"{len(broken)} of {len(report.files)} files cannot be used: {broken[0]}"] if broken else []) + (
            [f"codes outside the label map {options.labels}: {unknown}"] if unknown else []
        )
        raise InputError(f"{options.folder}: {'; '.join(problems)}")
    return 0
