"""Find possible mutations of the sources, and draw some of them."""

import ast
import itertools
import random
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from misc.command import UserError

FOLDERS = (".", "data", "misc", "models", "preprocess", "tools")  # "." stands for the scripts at the top level
EXCLUDED = ("tools/dev/", "tools/timing/", "tools/benchmark.py")
DRAWN = ("id", "folder", "file", "line", "kind", "before", "after")
COLUMNS = (*DRAWN, "old", "old_by", "old_seconds", "new", "new_by", "new_seconds")
SIGN, BOUND, AXIS, CHECK = KINDS = ("wrong sign", "off by one", "swapped axis", "dropped check")
OPERATORS = {sign: (other, SIGN) for sign, other in ("+-", "-+", "*/")}
OPERATORS |= {"<": ("<=", BOUND), "<=": ("<", BOUND), ">": (">=", BOUND), ">=": (">", BOUND)}
OPPOSITES = [("<", ">="), (">", "<="), ("==", "!="), ("in", "not in"), ("is", "is not")]
NEGATIONS = {sign: (other, CHECK) for pair in OPPOSITES for sign, other in (pair, pair[::-1])}
REDUCE = rb"\.(?:all|any|arg\w+|a?max|a?min|cat|flatten|flip|gather|index_\w+|mean|median|stack|std|sum|unbind|var)\("
RULES = (  # swapped axes: node type, pattern, and replacement for the pattern's first group
    (ast.keyword, rb"^(?:dim|axis)=(0)$", rb"1"),
    (ast.keyword, rb"^(?:dim|axis)=(-?[1-9])$", rb"0"),
    (ast.Call, REDUCE + rb"(?:\w+, )?(0)[,)]", rb"1"),
    (ast.Call, REDUCE + rb"(?:\w+, )?(-?[1-9])[,)]", rb"0"),
    (ast.Call, rb"\.(?:permute|transpose)\(((-?\d+), (-?\d+)), ", rb"\3, \2"),
    (ast.Tuple | ast.List, rb"^[(\[]?((-?\d+), (-?\d+))(?:, -?\d+)*[)\]]?$", rb"\3, \2"),
    (ast.Call, rb"(?<!np)(?<!torch)(\.(?:t|transpose|permute|swapaxes)\([^()]*\))$", rb""),
    (ast.Attribute, rb"(?<!self)(\.m?T)$", rb""),  # self.T is a temperature
    (ast.Attribute, rb"\.shape()$", rb"[::-1]"),
    (ast.Slice, rb"^(::-1)$", rb":"),
)
Edit = tuple[int, int, int, bytes, str]  # line, first and last column in bytes, new text, kind
Row = dict[str, str]  # keys are COLUMNS


def is_excluded_from_mutation(node: ast.AST, parent: ast.AST | None) -> bool:
    """Return whether a node must not be mutated, for example an f-string, flag, annotation or decorator."""
    match node:
        case ast.Call():
            is_flag = any(ast.unparse(argument).startswith("'--") for argument in node.args)
            return is_flag or ast.unparse(node.func).endswith(("add_argument", "sys.path.insert"))
        case ast.BinOp(left=left, right=right):  # do not mutate + and * on strings and lists, or % on strings
            return any(isinstance(x, (ast.JoinedStr, ast.List)) or ast.unparse(x)[0] in "'\"" for x in (left, right))
        case ast.If():
            return "__name__" in ast.unparse(node.test)
        case ast.JoinedStr() | ast.Raise():
            return True
    hints = [getattr(parent, name, None) for name in ("annotation", "returns")]
    return node in [*hints, *getattr(parent, "decorator_list", ())]


def walk_code(node: ast.AST, parent: ast.AST | None = None) -> Iterator[tuple[ast.AST, ast.AST | None]]:
    """Yield each node of a syntax tree that may be mutated, with its parent."""
    if not is_excluded_from_mutation(node, parent):
        yield node, parent
        for child in ast.iter_child_nodes(node):
            yield from walk_code(child, node)


def replace_operators(lines: list[bytes], node: ast.AST, signs: dict[str, tuple[str, str]]) -> Iterator[Edit]:
    """Yield edits that replace an operator in ``signs``, if the operator is on the same line as its operands."""
    if not isinstance(node, (ast.AugAssign, ast.BinOp, ast.Compare)):
        return
    operands = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
    for left, right in itertools.pairwise(operands):
        gap = lines[right.lineno - 1][left.end_col_offset : right.col_offset].decode()
        sign = gap.strip(" ()=" if isinstance(node, ast.AugAssign) else " ()")
        if left.end_lineno == right.lineno and sign in signs:
            start = left.end_col_offset + gap.index(sign)
            other, kind = signs[sign]
            yield right.lineno, start, start + len(sign), other.encode(), kind


def iterate_rule_mutations(source_lines: list[bytes], node: ast.AST, parent: ast.AST | None) -> Iterator[Edit]:
    """Yield the edits that RULES make to a syntax node, if the node lies on a single line."""
    if getattr(node, "lineno", 0) != getattr(node, "end_lineno", None):
        return
    text = source_lines[node.lineno - 1][node.col_offset : node.end_col_offset]
    ignores_order = isinstance(parent, ast.Compare | ast.For | ast.comprehension | ast.keyword)  # x in (0, 1)
    is_indexed = isinstance(parent, (ast.Attribute, ast.Subscript))
    for nodes, pattern, new in RULES:
        found = re.search(pattern, text) if isinstance(node, nodes) else None
        if found and not (is_indexed and new == b"[::-1]") and not (ignores_order and nodes == ast.Tuple | ast.List):
            start, end = (node.col_offset + column for column in found.span(1))
            yield node.lineno, start, end, found.expand(new), AXIS


def mutate_raise_condition(lines: list[bytes], node: ast.AST) -> Iterator[Edit]:
    """Yield edits that make a condition before ``raise`` always false, or that negate a part of the condition."""
    if not isinstance(node, ast.If) or not isinstance(node.body[0], ast.Raise):
        return
    if node.test.lineno == node.test.end_lineno:
        yield node.test.lineno, node.test.col_offset, node.test.end_col_offset, b"False", CHECK
    for part, _ in walk_code(node.test):
        if isinstance(part, ast.UnaryOp) and isinstance(part.op, ast.Not):
            yield part.lineno, part.col_offset, part.col_offset + len("not "), b"", CHECK
        elif isinstance(part, ast.Compare):
            yield from replace_operators(lines, part, NEGATIONS)


def find_possible_mutations(source: bytes) -> list[Edit]:
    """Return all mutations of a file. An integer that is an axis gets no off-by-one mutation."""
    lines, edits = source.split(b"\n"), []
    for node, parent in walk_code(ast.parse(source)):
        edits += [*mutate_raise_condition(lines, node), *iterate_rule_mutations(lines, node, parent)]
        edits += replace_operators(lines, node, OPERATORS)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            edits.append((node.lineno, node.col_offset, node.col_offset + 1, b"", SIGN))
        if isinstance(node, ast.Constant) and type(node.value) is int:
            edits.append((node.lineno, node.col_offset, node.end_col_offset, b"%d" % (node.value + 1), BOUND))
    axes = {edit[:3] for edit in edits if edit[4] == AXIS}
    return sorted({edit for edit in edits if edit[4] != BOUND or edit[:3] not in axes})


def interleave_streams(streams: Iterable[Iterable]) -> Iterator:
    """Yield one item of each stream in turn until all streams end."""
    for items in itertools.zip_longest(*streams):
        yield from (item for item in items if item is not None)


def list_tracked_files(checkout: Path) -> list[str]:
    """Return the names of the tracked files that exist in the checkout."""
    git = subprocess.run(["git", "-C", checkout, "ls-files", "-z"], capture_output=True, encoding="utf-8", check=False)
    if git.returncode:
        raise UserError(f"--checkout {checkout} is not a git checkout; give the folder that has .git")
    return [name for name in git.stdout.split("\0") if (checkout / name).is_file()]


def draw_mutations_in_folder(sources: dict[str, bytes], seed: int) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield mutations (file, line, kind, before, after) in random order, cycling through the kinds.

    Only lines that occur once in their file are mutated.
    """
    candidates = [(name, edit) for name, source in sources.items() for edit in find_possible_mutations(source)]
    random.Random(seed).shuffle(candidates)
    drawn = set()
    for name, (line, start, end, text, kind) in interleave_streams(
        [c for c in candidates if c[1][4] == k] for k in KINDS
    ):
        lines = sources[name].split(b"\n")
        before = lines[line - 1]
        after = before[:start] + text + before[end:]
        if (name, line) not in drawn and lines.count(before) == 1 and after != before:
            drawn.add((name, line))
            yield name, str(line), kind, before.decode(), after.decode()


def draw_mutations(checkout: Path, seed: int, count: int) -> list[Row]:
    """Draw mutations from each folder in turn. The same seed and sources give the same rows."""
    sources: dict[str, dict[str, bytes]] = {folder: {} for folder in FOLDERS}
    for name in list_tracked_files(checkout):
        folder = name.split("/")[0] if "/" in name else "."
        if name.endswith(".py") and folder in sources and not name.startswith(EXCLUDED):
            sources[folder][name] = (checkout / name).read_bytes()
    streams = [zip(itertools.repeat(folder), draw_mutations_in_folder(sources[folder], seed)) for folder in FOLDERS]
    rows = []
    for folder, values in itertools.islice(interleave_streams(streams), count):
        values = (f"m{len(rows) + 1:03d}", folder, *values)
        rows.append(dict(itertools.zip_longest(COLUMNS, values, fillvalue="")))
    return rows
