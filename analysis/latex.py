"""Tables in LaTeX that need booktabs and nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence


class Strong(str):
    """A cell that stands out."""


_GREEK = {"α": "alpha", "β": "beta", "γ": "gamma", "η": "eta", "θ": "theta", "λ": "lambda", "σ": "sigma"}
_CHARACTERS = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "`": r"\textasciigrave{}",
    "<": "$<$",  # in LaTeX's first font encoding this and the next two are other characters
    ">": "$>$",
    "|": "$|$",
    '"': "''",
    "[": "{[}",  # at the start of a row it and the next would belong to the \\ before
    "*": "{*}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "\N{MINUS SIGN}": "$-$",
    "\N{EN DASH}": "--",
    "\N{EM DASH}": "---",
    "\N{HORIZONTAL ELLIPSIS}": r"\ldots{}",
    "\N{NO-BREAK SPACE}": "~",
    **{character: f"$\\{name}$" for character, name in _GREEK.items()},
}


def escaped(text: str) -> str:
    """The same words for LaTeX. A character that its first font encoding lacks is named by its code."""
    words = " ".join(text.split())  # an empty line would end the paragraph
    hyphens = re.sub(r"(?<=-)-", "\0", words)  # of two in a row LaTeX makes a dash
    return "".join("{-}" if character == "\0" else _escaped(character) for character in hyphens)


def _escaped(character: str) -> str:
    if character in _CHARACTERS:
        return _CHARACTERS[character]
    if " " <= character <= "~" or ("À" <= character <= "ÿ" and character not in "ÐÞðþ÷"):
        return character
    return f"{{[}}U+{ord(character):04X}]"


def tabular(columns: Sequence[str], blocks: Sequence[tuple[str, Sequence[Sequence[str]]]], left: int) -> str:
    """A tabular of titled blocks of rows, an empty title for none; the first `left` columns hold words."""
    lines = [
        r"% needs \usepackage{booktabs}",
        f"\\begin{{tabular}}{{{'l' * left}{'r' * (len(columns) - left)}}}",
        r"\toprule",
        _row(columns),
    ]
    for title, rows in blocks:
        lines.append(r"\midrule")
        if title:
            lines.append(f"\\multicolumn{{{len(columns)}}}{{l}}{{{escaped(title)}}} \\\\")
        lines += map(_row, rows)
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _row(cells: Sequence[str]) -> str:
    return " & ".join(map(_cell, cells)) + r" \\"


def _cell(cell: str) -> str:
    return f"\\textbf{{{escaped(cell)}}}" if isinstance(cell, Strong) else escaped(cell)
