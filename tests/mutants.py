"""Mutation testing: break one expression of a module at a time, and see whether its tests notice.

    pip install cosmic-ray
    python -m tests.mutants [objective training/schedules ...]

The mutations are cosmic-ray's, which would start Python for each of them; here torch and transformers are imported
once, and each mutation runs in a fork. Prints those that no test noticed: where, which, and the line before and after.
Some may survive: mutants that compute the same, and constants of speed or memory.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_sft"

TESTS = {
    "objective": ["tests/test_objective.py", "tests/test_likelihood_precision.py"],
    "training/schedules": ["tests/training/test_schedules.py"],
    "evaluation/metrics": ["tests/evaluation/test_metrics.py"],
    "checkpoints/resume": ["tests/checkpoints/test_resume.py"],
    "checkpoints/run_files": ["tests/checkpoints/test_run_files.py"],
    "checkpoints/run_lock": ["tests/checkpoints/test_run_lock.py"],
    "checkpoints/writing": ["tests/checkpoints/test_writing.py", "tests/checkpoints/test_addresses.py"],
    "data/batches/plan": ["tests/data/batches/test_plan.py"],
    "data/batches/packing": ["tests/data/batches/test_packing.py"],
    "data/tokens/encode": ["tests/data/tokens/test_encode.py"],
    "data/tokens/rendering": ["tests/data/tokens/test_encode.py", "tests/test_templates_page.py"],
    "data/tokens/answer_shape": ["tests/data/tokens/test_encode.py", "tests/test_templates_page.py"],
    "data/tokens/render": ["tests/data/tokens/test_render.py", "tests/data/tokens/test_encode.py"],
    "data/tokens/tokenize": ["tests/data/tokens/test_tokenize.py", "tests/data/tokens/test_encode.py"],
}
"""The tests that are to notice, beside the module's own doctests."""

QUIET = ("-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--assert=plain")
"""Arguments of pytest; rewriting assertions, it would read the modules itself."""

OPERATORS = (
    *("ReplaceBinaryOperator_Add_Sub", "ReplaceBinaryOperator_Sub_Add", "ReplaceBinaryOperator_Mul_Div"),
    *("ReplaceBinaryOperator_Div_Mul", "ReplaceBinaryOperator_FloorDiv_Mul", "ReplaceBinaryOperator_Mod_Add"),
    *("ReplaceBinaryOperator_Pow_Mul", "ReplaceBinaryOperator_BitAnd_BitOr"),
    *("ReplaceComparisonOperator_Eq_NotEq", "ReplaceComparisonOperator_NotEq_Eq"),
    *("ReplaceComparisonOperator_Lt_LtE", "ReplaceComparisonOperator_Lt_Gt", "ReplaceComparisonOperator_LtE_Lt"),
    *("ReplaceComparisonOperator_LtE_Gt", "ReplaceComparisonOperator_Gt_GtE", "ReplaceComparisonOperator_Gt_Lt"),
    *("ReplaceComparisonOperator_GtE_Gt", "ReplaceComparisonOperator_GtE_Lt"),
    *("ReplaceComparisonOperator_Is_IsNot", "ReplaceComparisonOperator_IsNot_Is"),
    *("ReplaceUnaryOperator_Delete_USub", "ReplaceUnaryOperator_Delete_Not", "ReplaceUnaryOperator_Delete_Invert"),
    *("AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd"),
    *("ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ExceptionReplacer", "NumberReplacer"),
    *("RemoveDecorator", "ZeroIterationForLoop"),
)


@dataclass(frozen=True)
class Mutant:
    """A module with one expression changed: which, where, and the whole source."""

    operator: str
    line: int
    column: int
    source: str


def mutants(path: Path) -> Iterator[Mutant]:
    """All mutants of a module, in the order of the operators."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source = path.read_text(encoding="utf-8")
    for name in OPERATORS:
        operator: Any = get_operator(f"core/{name}")()
        places = [place for node in ast_nodes(get_ast(source)) for place in operator.mutation_positions(node)]
        for number, ((line, column), _) in enumerate(places):
            mutated = mutate_code(source, operator, number)
            if mutated is not None and mutated != source:
                yield Mutant(name, line, column, mutated)


def passes(path: Path, source: str, tests: list[str], limit: float) -> bool:
    """Whether the tests pass, within ``limit`` seconds, with this source in the place of the module's."""
    child = os.fork()
    if not child:
        status = 1
        with contextlib.suppress(BaseException), open(os.devnull, "w") as nowhere:
            for stream in (1, 2):
                os.dup2(nowhere.fileno(), stream)
            _replace(path, source)
            status = int(pytest.main([*QUIET, str(path), *tests]))
        os._exit(status)
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


def _replace(path: Path, source: str) -> None:
    original = SourceFileLoader.get_code

    def get_code(loader: SourceFileLoader, name: str) -> CodeType | None:
        if loader.path == str(path):
            return compile(source, str(path), "exec", dont_inherit=True)
        return original(loader, name)

    SourceFileLoader.get_code = get_code  # type: ignore[method-assign]  # in the fork alone


def main(arguments: list[str] | None = None) -> int:
    """Test the modules that are named, or all, and print what survives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(TESTS)}; all by default")
    for module in parser.parse_args(arguments).modules or TESTS:
        path = PACKAGE / f"{module}.py"
        source, begun = path.read_text(encoding="utf-8"), time.monotonic()
        if not passes(path, source, TESTS[module], limit=600):
            raise SystemExit(f"{module}: its tests fail as it is")
        limit, survivors, number = 10 + 5 * (time.monotonic() - begun), 0, 0
        for mutant in mutants(path):
            number += 1
            if passes(path, mutant.source, TESTS[module], limit):
                survivors += 1
                before, after = source.splitlines(), mutant.source.splitlines()
                changed = next(
                    (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after) - 1
                )
                print(f"{module}.py:{mutant.line}:{mutant.column}: {mutant.operator}", flush=True)
                print(f"  - {before[changed].strip()}\n  + {after[changed].strip()}", flush=True)
        print(f"{module}: {number - survivors} of {number} mutations noticed", flush=True)
    return 0


if __name__ == "__main__":
    import torch  # noqa: F401  # once, before the forks
    import transformers  # noqa: F401
    from lightning.pytorch import LightningModule  # noqa: F401

    sys.exit(main())
