"""How much a reader must read, in figures: `python tests/reading.py [FOLDER] [--commit REV]`.

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
from collections.abc import Iterator
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
GENERATED = "sftx.settings.keywords"
"""Made from the schema, for editors: nobody reads it as a file."""


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
    """Every module below `package` by its dotted name, with the modules that it imports."""
    modules: dict[str, Module] = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        modules[name] = measure(path, name)
    for module in modules.values():
        module.imports = _imports(module, modules)
    return modules


def _imports(module: Module, modules: dict[str, Module]) -> set[str]:
    """The modules that this one imports; a package that runs on the way to another module imports
    nothing for type checkers alone.
    """
    is_package = module.path.name == "__init__.py"
    wanted: set[str] = set()
    for node in _executed(module.tree) if is_package else ast.walk(module.tree):
        if isinstance(node, ast.Import):
            wanted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
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


def _executed(tree: ast.Module) -> Iterator[ast.AST]:
    """All of a file but what stands below `if TYPE_CHECKING`."""
    for statement in tree.body:
        if not isinstance(statement, ast.If) or ast.unparse(statement.test) != "TYPE_CHECKING":
            yield from ast.walk(statement)


def closure(modules: dict[str, Module], root: str) -> list[Module]:
    """The modules that a reader of `root` may have to open.

    These are `root`, the modules that it imports, those that they import, and so on.
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


@dataclass
class Figures:
    """How much there is to read in a package."""

    run_path: list[Module]
    library: list[Module]
    complex_functions: int
    with_any: int
    annotations: int
    longest_file: Module
    longest_function: str
    longest_function_lines: int

    @property
    def run_path_tokens(self) -> int:
        """Tokens of all modules that a run brings in."""
        return sum(module.tokens for module in self.run_path)

    @property
    def tokens_per_line(self) -> float:
        """Tokens per line of code, over the whole package."""
        return density(self.library)

    @property
    def any_share(self) -> float:
        """Annotations with `Any`, in percent."""
        return 100 * self.with_any / max(self.annotations, 1)


def figures(package: Path) -> Figures:
    """Measure the package in a folder."""
    modules = load(package)
    library = list(modules.values())
    complex_functions = 0
    longest_name, longest_lines = "", 0
    texts: list[str] = []
    for module in library:
        texts += annotation_texts(module.tree)
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            complex_functions += complexity(node) > COMPLEX
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > longest_lines:
                longest_name, longest_lines = f"{module.name}.{node.name}", lines
    return Figures(
        run_path=closure(modules, RUN_PATH_ROOT),
        library=library,
        complex_functions=complex_functions,
        with_any=sum("Any" in text for text in texts),
        annotations=len(texts),
        longest_file=max(
            (module for module in library if module.name != GENERATED),
            key=lambda module: module.lines,
        ),
        longest_function=longest_name,
        longest_function_lines=longest_lines,
    )


def report(package: Path) -> str:
    """The figures, one to a line."""
    found = figures(package)
    by_package: Counter[str] = Counter()
    for module in found.library:
        by_package[package_of(module)] += module.tokens
    packages = ", ".join(f"{name} {count:,}" for name, count in by_package.most_common())
    lines = [
        f"run path: {size(found.run_path)}",
        f"package: {size(found.library)}",
        f"tokens by package: {packages}",
        f"functions of a complexity over {COMPLEX}: {found.complex_functions}",
        f"annotations with Any: {found.with_any} of {found.annotations} = {found.any_share:.1f} %",
        f"longest file: {found.longest_file.name}, {found.longest_file.lines} lines",
        f"longest function: {found.longest_function}, {found.longest_function_lines} lines",
    ]
    return "\n".join(lines)


def size(modules: list[Module]) -> str:
    """Files, lines and tokens, in words."""
    lines = sum(module.lines for module in modules)
    tokens = sum(module.tokens for module in modules)
    return (
        f"{len(modules)} files, {lines:,} lines, {tokens:,} tokens, "
        f"{density(modules):.1f} per line of code"
    )


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
        "--commit", help="measure this state of the repository instead of the working tree"
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
