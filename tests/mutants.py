"""Mutation testing: break one expression of a module at a time, and see whether its tests notice.

    pip install cosmic-ray
    python -m tests.mutants [--sample N] [--seed S] [objective training/schedules ...]

The mutations are cosmic-ray's, which would start Python for each of them; here torch and transformers are imported
once, and each mutation runs in a fork, up to the first test that fails, the quickest tests first. Prints those that no
test noticed: where, which, and the line before and after. Some may survive: mutants that compute the same, and
constants of speed or memory.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import SourceFileLoader
from importlib.metadata import entry_points
from pathlib import Path
from types import CodeType

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_sft"


def without(file: str, *tests: str) -> list[str]:
    """A file of tests without those whose names begin so."""
    return [file, *(f"--deselect={file}::{test}" for test in tests)]


TESTS = {
    "objective": ["tests/test_objective.py", "tests/test_likelihood_precision.py"],
    "training/schedules": ["tests/training/test_schedules.py"],
    "evaluation/metrics": ["tests/evaluation/test_metrics.py"],
    "checkpoints/resume": [
        "tests/checkpoints/test_run_state.py",
        *without("tests/checkpoints/test_resume.py", "test_runs_", "test_other_data"),
        "tests/training/test_optimizers.py::test_a_resumed_run_has_the_state_and_settings_of_a_whole_one",
        "tests/training/test_optimizers.py::test_state_among_the_settings_is_kept_when_one_of_them_is_changed",
        "tests/training/test_optimizers.py::test_a_checkpoint_of_another_optimizer_is_refused_by_name",
        "tests/training/test_optimizers.py::test_another_schedule_begins_at_the_learning_rate_that_was_asked_for",
        "tests/callbacks/test_defaults.py::test_at_the_end_fit_says_why_where_the_checkpoints_are_and_what_to_do",
        "tests/callbacks/test_defaults.py::test_resuming_from_weights_alone_is_one_message",
    ],
    "checkpoints/run_files": ["tests/checkpoints/test_run_files.py"],
    "checkpoints/run_lock": ["tests/checkpoints/test_run_lock.py"],
    "checkpoints/writing": ["tests/checkpoints/test_writing.py", "tests/checkpoints/test_addresses.py"],
    "data/batches/plan": ["tests/data/batches/test_plan.py"],
    "data/batches/packing": ["tests/data/batches/test_packing.py"],
    "data/tokens/encode": ["tests/data/tokens/test_encode.py"],
    "data/tokens/rendering": [
        *(f"tests/data/tokens/test_{name}.py" for name in ("encode", "generation_tags", "trained_prompts")),
        "tests/test_templates_page.py",
    ],
    "data/tokens/answer_shape": ["tests/data/tokens/test_answer_shape.py", "tests/data/tokens/test_encode.py"],
    "data/tokens/render": ["tests/data/tokens/test_render.py", "tests/data/tokens/test_encode.py"],
    "data/tokens/tokenize": ["tests/data/tokens/test_tokenize.py", "tests/data/tokens/test_encode.py"],
}
"""The tests that are to notice, beside the module's own doctests; runs in processes of their own cannot."""

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
    ast, mutating, plugins = (import_module(f"cosmic_ray.{name}") for name in ("ast", "mutating", "plugins"))
    source = path.read_text(encoding="utf-8")
    for name in OPERATORS:
        operator = plugins.get_operator(f"core/{name}")()
        places = [place for node in ast.ast_nodes(ast.get_ast(source)) for place in operator.mutation_positions(node)]
        for number, ((line, column), _) in enumerate(places):
            try:
                mutated = mutating.mutate_code(source, operator, number)
            except AttributeError:  # cosmic-ray cannot replace ``except module.Error``
                continue
            if mutated is not None and mutated != source:
                yield Mutant(name, line, column, mutated)


class QuickestFirst:
    """Plugin of pytest that notes what each test takes, and runs the quickest first.

    Args:
        path: File that keeps the seconds of each test from one run to the next.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.seconds = path, dict[str, float]()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Sort the tests."""
        before = json.loads(self.path.read_text()) if self.path.exists() else {}
        items.sort(key=lambda item: before.get(item.nodeid, 0.0))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a test, without its fixtures, which others may share."""
        if report.when == "call":
            self.seconds[report.nodeid] = report.duration

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Keep the seconds when all tests have run."""
        if exitstatus == 0:
            self.path.write_text(json.dumps(self.seconds))


def passes(path: Path, source: str, tests: list[str], limit: float, order: QuickestFirst) -> bool:
    """Whether the tests pass, within ``limit`` seconds, with this source in the place of the module's."""
    child = os.fork()
    if not child:
        status = 1
        with contextlib.suppress(BaseException), open(os.devnull, "w") as nowhere:
            for stream in (1, 2):
                os.dup2(nowhere.fileno(), stream)
            _replace(path, source)
            status = int(pytest.main([*QUIET, str(path), *tests], plugins=[order]))
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

    SourceFileLoader.get_code = get_code  # type: ignore[assignment, method-assign]  # in the fork alone


def survivors(module: str, sample: int | None, seed: int) -> Iterator[str]:
    """Test the mutants of a module: those that no test notices, and at last how many were noticed.

    Args:
        module: Its name, a key of ``TESTS``.
        sample: Number of mutants to draw, or ``None`` for all.
        seed: Seed of the draw.

    Raises:
        SystemExit: When its tests fail as it is.
    """
    path, tests = PACKAGE / f"{module}.py", TESTS[module]
    source, all_mutants = path.read_text(encoding="utf-8"), list(mutants(path))
    numbers = range(len(all_mutants))
    drawn = numbers if sample is None else sorted(random.Random(seed).sample(numbers, min(sample, len(numbers))))
    noticed, begun = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        order = QuickestFirst(Path(folder, "seconds"))
        if not all(passes(path, source, tests, 600, order) for _ in range(2)):  # the second in the new order
            raise SystemExit(f"{module}: its tests fail as it is")
        limit = 10 + 3 * (time.monotonic() - begun)
        for mutant in (all_mutants[number] for number in drawn):
            if not passes(path, mutant.source, tests, limit, order):
                noticed += 1
                continue
            before, after = source.splitlines(), mutant.source.splitlines()
            changed = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after) - 1)
            yield f"{module}.py:{mutant.line}:{mutant.column}: {mutant.operator}"
            yield f"  - {before[changed].strip()}\n  + {after[changed].strip()}"
    of = "" if len(drawn) == len(numbers) else f", drawn from {len(numbers)} with seed {seed}"
    yield f"{module}: {noticed} of {len(drawn)} mutations noticed{of}"


def main(arguments: list[str] | None = None) -> int:
    """Test the modules that are named, or all, and print what survives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(TESTS)}; all by default")
    parser.add_argument("--sample", type=int, metavar="N", help="draw so many mutants of each module; all by default")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the draw; 0 by default")
    options = parser.parse_args(arguments)
    for module in options.modules or TESTS:
        for line in survivors(module, options.sample, options.seed):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    for name in ("lightning.pytorch.cli", "torch", "transformers.models.llama.modeling_llama"):
        import_module(name)  # once, before the forks
    for plugin in entry_points(group="pytest11"):
        plugin.load()
    gc.freeze()  # nor do they look at these objects, as pytest has them do at its end
    status = main()
    gc.unfreeze()
    sys.exit(status)
