"""Runs a notebook's cells without Jupyter, and writes their outputs into it: python -m tests.support.notebook FILE"""

import ast
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

Output = dict[str, Any]


def run_cells(notebook: dict[str, Any]) -> list[list[Output]]:
    """The outputs of each code cell, as nbformat 4 writes them; the cells share one namespace."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    return [
        run_cell("".join(cell["source"]), namespace, number)
        for number, cell in enumerate(notebook["cells"])
        if cell["cell_type"] == "code"
    ]


def run_cell(source: str, namespace: dict[str, Any], number: int) -> list[Output]:
    """What a cell printed, and its last expression's value as text and as SVG if it draws itself."""
    parsed = ast.parse(source)
    last = parsed.body.pop() if isinstance(parsed.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(parsed, f"cell {number}", "exec"), namespace)
        value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), namespace) if last else None
    stream = {"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(True)}
    return [output for output in (printed.getvalue() and stream, value is not None and result(value, number)) if output]


def result(value: Any, number: int) -> Output:
    """The value of a cell."""
    data = {"text/plain": repr(value).splitlines(True)}
    if hasattr(value, "_repr_svg_"):
        data["image/svg+xml"] = value._repr_svg_().splitlines(True)
    return {"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": data}


def write_outputs(file: Path) -> None:
    """Run a notebook and put its outputs into it."""
    notebook = json.loads(file.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, outputs) in enumerate(zip(cells, run_cells(notebook), strict=True), 1):
        cell["execution_count"], cell["outputs"] = number, outputs
        for output in outputs:
            if "execution_count" in output:
                output["execution_count"] = number
    file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write_outputs(Path(sys.argv[1]))
