"""How much a reader must read: `python tests/reading.py [FOLDER] [--commit REV]` prints the figures
of the house.

Files, lines and Python tokens on the run path (all modules that importing `sftx.training.loop`
brings in, top-level and inner imports alike), tokens per line of code, complex functions, the share
of `Any` among annotations, the longest file and function. Tokens count what is read: no comments,
no docstrings, no line ends, no indentation.
"""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import sys
import tarfile
import tempfile
import tokenize
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

SILENT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
RUN_PATH_ROOT = "sftx.training.loop"
COMPLEX = 10


@dataclass
class Module:
    """One file of the package, measured."""

    name: str
    path: Path
    tree: ast.Module
    lines: int
    tokens: int
    code_lines: int
    imports: set[str] = field(default_factory=set)


def docstring_lines(tree: ast.Module) -> set[int]:
    """The numbers of all lines that belong to a string standing alone as a statement."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
            continue
        if isinstance(node.value.value, str):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def measure(path: Path, name: str) -> Module:
    """Count the tokens and the lines of code of one file."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    documented = docstring_lines(tree)
    tokens = 0
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in SILENT or token.start[0] in documented:
            continue
        tokens += 1
        code.update(range(token.start[0], token.end[0] + 1))
    return Module(name, path, tree, len(text.splitlines()), tokens, len(code))


def load(package: Path) -> dict[str, Module]:
    """Every module below `package` by its dotted name, with the modules of the package that it
    imports.
    """
    modules: dict[str, Module] = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        modules[name] = measure(path, name)
    for module in modules.values():
        module.imports = _imports(module, modules)
    return modules


def _imports(module: Module, modules: dict[str, Module]) -> set[str]:
    wanted: set[str] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            wanted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                is_package = module.path.name == "__init__.py"
                parts = module.name.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base]).rstrip(".")
            wanted |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    found = {name for name in wanted if name in modules}
    # Importing a module runs the packages that it lies in.
    for name in tuple(found):
        while "." in name:
            name = name.rpartition(".")[0]
            found.add(name)
    return found - {module.name}


def closure(modules: dict[str, Module], root: str) -> list[Module]:
    """The modules that a reader of `root` may have to open: itself, and all it imports, however far
    down.
    """
    seen = {root}
    waiting = deque([root])
    while waiting:
        for name in sorted(modules[waiting.popleft()].imports - seen):
            seen.add(name)
            waiting.append(name)
    return [modules[name] for name in sorted(seen)]


def complexity(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """McCabe's number: one, and one more for every branch."""
    branches = 1
    for node in ast.walk(function):
        if isinstance(
            node, ast.If | ast.For | ast.While | ast.IfExp | ast.ExceptHandler | ast.comprehension
        ):
            branches += 1
        elif isinstance(node, ast.BoolOp):
            branches += len(node.values) - 1
        elif isinstance(node, ast.match_case):
            branches += 1
    return branches


def annotation_texts(tree: ast.Module) -> list[str]:
    """The text of every annotation: parameters, returns, variables and fields."""
    found: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            extra = [
                argument for argument in (node.args.vararg, node.args.kwarg) if argument is not None
            ]
            found += [
                argument.annotation
                for argument in parameters + extra
                if argument.annotation is not None
            ]
            if node.returns is not None:
                found.append(node.returns)
        elif isinstance(node, ast.AnnAssign):
            found.append(node.annotation)
    return [ast.unparse(annotation) for annotation in found]


def report(package: Path) -> str:
    """The figures, one to a line."""
    modules = load(package)
    library = list(modules.values())
    run_path = closure(modules, RUN_PATH_ROOT)
    functions = [
        (module.name, node)
        for module in library
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    longest_function = max(functions, key=lambda item: (item[1].end_lineno or 0) - item[1].lineno)
    longest_file = max(library, key=lambda module: module.lines)
    complex_functions = [node.name for _, node in functions if complexity(node) > COMPLEX]
    texts = [text for module in library for text in annotation_texts(module.tree)]
    with_any = [text for text in texts if "Any" in text]
    by_package: Counter[str] = Counter()
    for module in library:
        by_package[package_of(module)] += module.tokens
    node = longest_function[1]
    lines = [
        f"run path: {len(run_path)} files, {sum(m.lines for m in run_path):,} lines, "
        f"{sum(m.tokens for m in run_path):,} tokens, {density(run_path):.1f} per line of code",
        f"package: {len(library)} files, {sum(m.lines for m in library):,} lines, "
        f"{sum(m.tokens for m in library):,} tokens, {density(library):.1f} per line of code",
        "tokens by package: "
        + ", ".join(f"{name} {count:,}" for name, count in by_package.most_common()),
        f"functions of a complexity over {COMPLEX}: {len(complex_functions)}",
        f"annotations with Any: {len(with_any)} of {len(texts)} = "
        f"{100 * len(with_any) / max(len(texts), 1):.1f} %",
        f"longest file: {longest_file.name}, {longest_file.lines} lines",
        f"longest function: {longest_function[0]}.{node.name}, "
        f"{(node.end_lineno or 0) - node.lineno + 1} lines",
    ]
    return "\n".join(lines)


def package_of(module: Module) -> str:
    """The package right below `sftx` that a module lies in; "." for those that lie in none."""
    parts = module.name.split(".")[1:]
    if module.path.name != "__init__.py":
        parts.pop()
    return parts[0] if parts else "."


def density(modules: list[Module]) -> float:
    """Tokens per line of code."""
    return sum(module.tokens for module in modules) / max(
        sum(module.code_lines for module in modules), 1
    )


def main() -> None:
    """Print the figures of a folder, or of a commit of this repository."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    root = Path(__file__).parents[1]
    parser.add_argument("folder", nargs="?", type=Path, default=root / "src" / "sftx")
    parser.add_argument(
        "--commit", help="measure this state of the repository instead of the files at hand"
    )
    given = parser.parse_args()
    if given.commit is None:
        print(report(given.folder))
        return
    archive = subprocess.run(
        ["git", "archive", given.commit, "src/sftx"], cwd=root, check=True, capture_output=True
    ).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
            packed.extractall(folder, filter="data")
        print(report(Path(folder) / "src" / "sftx"))


if __name__ == "__main__":
    sys.exit(main())
