"""The source archive and the wheel: what is in them, what PyPI shows, and how they are released."""

from __future__ import annotations

import re
import runpy
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from lightning_sft import __version__
from tests.helpers.processes import ROOT, run

pytest.importorskip("build")
URL = "https://github.com/lightning-sft/lightning-sft"
RAW = "https://raw.githubusercontent.com/lightning-sft/lightning-sft"
EXTRAS = {"gpu", "peft", "quant", "deepspeed", "loggers", "notebooks", "all", "tensorboard", "gguf"}


class Built(NamedTuple):
    """Names of the files of both archives, and the metadata of the wheel."""

    source: set[str]
    wheel: set[str]
    metadata: Message


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    out = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)], timeout=120)
    [source], [wheel] = out.glob("*.tar.gz"), out.glob("*.whl")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Built(names, set(archive.namelist()), Parser().parsestr(archive.read(metadata).decode()))


def files(*folders: str) -> set[str]:
    """The files below folders of the repository, without what Python and editors leave there."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {
        path.relative_to(ROOT).as_posix() for path in found if not {"__pycache__", ".ipynb_checkpoints"} & {*path.parts}
    }


def test_the_wheel_has_the_package_with_its_data_and_nothing_else(built: Built) -> None:
    package = {name for name in built.wheel if not name.startswith(f"lightning_sft-{__version__}.dist-info/")}
    assert package == files("lightning_sft")
    assert {"lightning_sft/py.typed", "lightning_sft/commands/page.css"} <= package


def test_the_source_archive_has_tests_pages_configs_and_what_runs_them(built: Built) -> None:
    missing = files("lightning_sft", "tests", "docs", "configs", "benchmarks", ".ci") - built.source
    assert not missing, sorted(missing)
    assert {"Makefile", "README.md", "LICENSE", "CITATION.cff", "CHANGELOG.md", "pyproject.toml"} <= built.source


def test_the_readme_on_pypi_has_addresses_of_files_that_exist_and_no_formula_in_tex(built: Built) -> None:
    text = str(built.metadata.get_payload())
    assert "```math" not in text
    assert "argmax" in text
    pictures = re.findall(r'!\[[^\]]*\]\(([^)]+)\)|src(?:set)?="([^"]+)"', text)
    links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)#]+)", text)
    for address in [*links, *map("".join, pictures)]:
        assert address.startswith("https://"), address
        for start in (f"{URL}/blob/v{__version__}/", f"{RAW}/v{__version__}/"):
            if address.startswith(start):
                assert (ROOT / address.removeprefix(start)).exists(), address
    assert any(address.startswith(URL) for address in links)


def test_there_is_an_extra_for_each_purpose_and_all_has_those_of_users(built: Built) -> None:
    assert {*built.metadata.get_all("Provides-Extra", [])} >= EXTRAS
    needs = built.metadata.get_all("Requires-Dist", [])

    def of(extra: str) -> set[str]:
        wanted = re.compile(rf"extra == '{extra}'")
        return {re.split(r"[<>=!; \[]", need)[0] for need in needs if wanted.search(need)}

    assert of("loggers") == {"mlflow", "tensorboard", "wandb"}
    assert of("all") == set().union(*(of(extra) for extra in EXTRAS - {"all"}))


def test_the_citation_and_the_addresses_are_those_of_the_project(built: Built) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    urls = dict(url.split(", ") for url in built.metadata.get_all("Project-URL", []))
    assert (citation["version"], citation["license"]) == (__version__, built.metadata["License-Expression"])
    assert citation["repository-code"] == urls["Repository"] == URL
    assert all(url.startswith(URL) for url in urls.values())


def test_badges_say_what_the_metadata_says(built: Built) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    badges = dict(re.findall(r"img\.shields\.io/badge/(\w+)-([\w.+-]+?)\+?-\w+\)", readme))
    needs = " ".join(built.metadata.get_all("Requires-Dist", []))
    assert built.metadata["Requires-Python"] == f">={badges.pop('python')}"
    assert badges.pop("license").replace("--", "-") == built.metadata["License-Expression"]
    assert badges.keys() == {"pytorch", "lightning"}
    assert f"torch>={badges['pytorch']}" in needs
    assert re.search(rf"lightning[^ ]*>={re.escape(badges['lightning'])}\b", needs)


def workflow(name: str) -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())
    return parsed


@pytest.mark.parametrize("name", ["release.yml", "tests.yml"])
def test_actions_are_pinned_by_commit_and_read_only(name: str) -> None:
    jobs = workflow(name)["jobs"].values()
    actions = [step["uses"] for job in jobs for step in job["steps"] if "uses" in step]
    assert actions
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action) for action in actions)
    assert workflow(name)["permissions"] == {"contents": "read"}


def test_a_release_is_tried_as_a_wheel_and_published_without_a_stored_token() -> None:
    jobs = workflow("release.yml")["jobs"]
    assert [job for job in jobs if "id-token" in jobs[job].get("permissions", {})] == ["publish"]
    assert (jobs["publish"]["needs"], jobs["try"]["needs"]) == ("try", "build")
    assert jobs["try"]["steps"][-1]["run"].startswith("python .ci/try_wheel.py")
    assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text()


def test_a_wheel_is_tried_with_what_the_readme_says() -> None:
    tried = runpy.run_path(str(ROOT / ".ci" / "try_wheel.py"))
    assert [command.split()[1] for command in tried["commands"]()] == ["fetch-demo-model", "fit", "export"]
    assert 'SFTModule("SmolLM2")' in tried["python"]()


def test_the_workflow_of_the_tests_runs_what_ci_runs() -> None:
    assert workflow("tests.yml")["jobs"]["tests"]["steps"][-1]["run"] == ".ci/run"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert Path(ROOT / ".ci" / "run").read_text().startswith("#!/usr/bin/env bash")
