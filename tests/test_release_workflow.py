"""The workflows: what they may do, that nothing is published unchecked, and their scripts, run for real."""

import hashlib
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from comfyd import __version__

ROOT: Final = Path(__file__).parent.parent
WORKFLOWS: Final = sorted((ROOT / ".github/workflows").glob("*.yml"))
# YAML 1.1 reads the key `on` as a boolean.
ON: Final = True
# The permissions to write that each job of the release has, and has a reason for beside it.
MAY_WRITE: Final = {
    "verify": set(),
    "files": {"id-token", "attestations"},
    "images": {"packages", "id-token", "attestations"},
    "publish": {"contents"},
}

Workflow = dict[Any, Any]


def load(path: Path) -> Workflow:
    document: Workflow = yaml.safe_load(path.read_text())
    return document


@pytest.fixture
def ci() -> Workflow:
    return load(ROOT / ".github/workflows/ci.yml")


@pytest.fixture
def release() -> Workflow:
    return load(ROOT / ".github/workflows/release.yml")


def steps(workflow: Workflow) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job.get("steps", [])]


def script(workflow: Workflow, name: str) -> str:
    (found,) = (step["run"] for step in steps(workflow) if step.get("name") == name)
    text: str = found
    return text


def run(text: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a step as GitHub does where `shell` is not set: https://docs.github.com/actions (bash -e)."""
    return subprocess.run(
        ["bash", "-e", "-c", text],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_commit_with_their_version_beside_it(path: Path) -> None:
    used = re.findall(r"uses: (\S+)(.*)", path.read_text())
    assert used
    for action, comment in used:
        if action.startswith("./"):
            assert (ROOT / action).is_file()
            continue
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action), action
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), action


def test_an_action_has_one_version_in_all_workflows() -> None:
    used = {action for path in WORKFLOWS for action in re.findall(r"uses: ([\w-]+/[\w-]+@\S+)", path.read_text())}
    assert len({action.split("@")[0] for action in used}) == len(used)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_nothing_is_allowed_that_a_job_does_not_ask_for(path: Path) -> None:
    workflow = load(path)
    assert workflow["permissions"] == {}
    assert all(job["permissions"] for job in workflow["jobs"].values())


def test_the_release_writes_where_it_has_to_and_nowhere_else(ci: Workflow, release: Workflow) -> None:
    written = {
        name: {what for what, how in job["permissions"].items() if how == "write"}
        for name, job in release["jobs"].items()
    }
    assert written == MAY_WRITE
    assert {how for job in ci["jobs"].values() for how in job["permissions"].values()} == {"read"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_no_expression_is_pasted_into_a_script(path: Path) -> None:
    scripts = [step["run"] for step in steps(load(path)) if "run" in step]
    assert scripts
    assert [text for text in scripts if "${{" in text] == [], "what a stranger can name would be executed"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_checkouts_leave_no_token_behind(path: Path) -> None:
    checkouts = [step for step in steps(load(path)) if step.get("uses", "").startswith("actions/checkout@")]
    assert checkouts
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_job_has_a_time_limit(path: Path) -> None:
    jobs = load(path)["jobs"].values()
    assert all(job["timeout-minutes"] <= 120 for job in jobs if "uses" not in job)


def test_ci_runs_what_a_developer_runs_on_every_supported_python(ci: Workflow) -> None:
    job = ci["jobs"]["run"]
    assert job["steps"][-1]["run"] == ".ci/run"
    assert os.access(ROOT / ".ci/run", os.X_OK)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = [each.split(" :: ")[-1] for each in project["classifiers"] if "Python :: 3." in each]
    assert job["strategy"]["matrix"]["python"] == versions


def test_ci_builds_the_api_image_and_sees_it_get_healthy_and_stop(ci: Workflow) -> None:
    job = ci["jobs"]["image"]
    assert re.fullmatch(r"python:3\.1[123]-slim-\w+", job["env"]["BASE_IMAGE"])
    scripts = [step["run"] for step in job["steps"] if "run" in step]
    assert scripts[0] == "docker/build api"
    assert "--read-only" in scripts[1]
    assert [line.strip() for line in scripts[2].splitlines()][-2:] == [
        'test "$health" = healthy',
        "test \"$(docker inspect --format '{{.State.ExitCode}}' comfyd)\" = 0",
    ]


def test_ci_never_runs_with_more_rights_than_the_pull_requests_author(ci: Workflow) -> None:
    assert set(ci[ON]) == {"push", "pull_request", "workflow_call"}


def test_nothing_is_built_or_published_before_ci_has_passed(release: Workflow) -> None:
    jobs = release["jobs"]
    assert jobs["verify"]["uses"] == "./.github/workflows/ci.yml"
    assert {name: job.get("needs") for name, job in jobs.items()} == {
        "verify": None,
        "files": "verify",
        "images": "verify",
        "publish": ["files", "images"],
    }


def test_a_release_is_a_tag_and_nothing_else(release: Workflow) -> None:
    assert set(release[ON]) == {"push"}
    assert set(release[ON]["push"]) == {"tags"}


def test_images_are_built_from_our_recipes_with_sbom_and_provenance(release: Workflow) -> None:
    builds = [step["with"] for step in steps(release) if step.get("uses", "").startswith("docker/build-push-action@")]
    assert [build["file"] for build in builds] == ["docker/comfyui.dockerfile", "docker/api.dockerfile"]
    for build in builds:
        assert (ROOT / build["file"]).is_file()
        assert (build["push"], build["sbom"], build["provenance"]) == (True, True, "mode=max")
    assert release["jobs"]["images"]["strategy"]["matrix"]["variant"] == ["runtime", "devel"]


def test_every_outputs_reference_leads_to_a_step_of_the_same_job(release: Workflow) -> None:
    for name, job in release["jobs"].items():
        ids = {step["id"] for step in job.get("steps", []) if "id" in step}
        used = set(re.findall(r"steps\.([\w-]+)\.outputs", yaml.safe_dump(job)))
        assert used <= ids, name


@pytest.mark.parametrize(("tag", "code"), [(f"v{__version__}", 0), ("v99.0.0", 1), (__version__, 1)])
def test_the_tag_has_to_be_the_version_of_the_code(release: Workflow, tag: str, code: int) -> None:
    assert run(script(release, "The tag is the version of the code"), ROOT, GITHUB_REF_NAME=tag).returncode == code


def outputs(path: Path) -> dict[str, str]:
    """Read what a step wrote to GITHUB_OUTPUT: name=value, and name<<END for several lines."""
    found: dict[str, str] = {}
    lines = iter(path.read_text().splitlines())
    for line in lines:
        name, separator, value = re.split(r"(=|<<)", line, maxsplit=1)
        found[name] = value if separator == "=" else "\n".join(iter(lines.__next__, value))
    return found


def test_images_are_named_after_the_repository_and_the_pattern(release: Workflow, tmp_path: Path) -> None:
    text = script(release, "Names and the base's build arguments, from docker/build")
    output = tmp_path / "output"
    result = run(text, ROOT, GITHUB_OUTPUT=str(output), GITHUB_REPOSITORY="Some-Org/Comfyd", VARIANT="devel")
    assert result.returncode == 0, result.stderr
    told = outputs(output)
    image = "ghcr.io/some-org/comfyd"  # registries want lower case
    assert told["image"] == image
    assert re.fullmatch(rf"{image}:comfy[\d.]+-torch[\d.]+-cuda[\d.]+-devel", told["base"])
    assert re.fullmatch(rf"{image}:comfy[\d.]+-api{re.escape(__version__)}-torch[\d.]+-cuda[\d.]+-devel", told["api"])
    assert "VARIANT=devel" in told["base-arguments"].splitlines()


def test_the_api_image_stands_on_the_base_of_this_run(release: Workflow, tmp_path: Path) -> None:
    text = script(release, "Build arguments of what stands on it, the base by its digest")
    base = "ghcr.io/some-org/comfyd@sha256:" + "a" * 64
    output = tmp_path / "output"
    result = run(text, ROOT, GITHUB_OUTPUT=str(output), BASE_IMAGE=base, VARIANT="runtime")
    assert result.returncode == 0, result.stderr
    assert f"BASE_IMAGE={base}" in outputs(output)["arguments"].splitlines()


def test_checksums_are_of_every_file_and_are_checked_before_publishing(release: Workflow, tmp_path: Path) -> None:
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "comfyd-1.0.0.tar.gz").write_bytes(b"source")
    (folder / "comfyd-linux-x86_64").write_bytes(b"program")
    assert run(script(release, "Checksums"), tmp_path).returncode == 0
    told = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert told == {
        "comfyd-1.0.0.tar.gz": hashlib.sha256(b"source").hexdigest(),
        "comfyd-linux-x86_64": hashlib.sha256(b"program").hexdigest(),
    }
    check = script(release, "Still the bytes that were attested")
    assert run(check, tmp_path).returncode == 0
    (folder / "comfyd-linux-x86_64").write_bytes(b"another program")
    assert run(check, tmp_path).returncode != 0


CHANGELOG: Final = """# Changelog

## [Unreleased]

- not yet

## [1.2.3] - 2026-01-02

### Added

- what is new

## [1.2.2] - 2026-01-01

- what was new
"""


def test_the_release_tells_of_its_own_changes(release: Workflow, tmp_path: Path) -> None:
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    result = run(script(release, "Its section of the changelog"), tmp_path, GITHUB_REF_NAME="v1.2.3")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "notes.md").read_text().strip() == "### Added\n\n- what is new"


def test_a_version_without_a_section_in_the_changelog_is_not_released(release: Workflow, tmp_path: Path) -> None:
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    result = run(script(release, "Its section of the changelog"), tmp_path, GITHUB_REF_NAME="v1.2.4")
    assert result.returncode == 1
    assert "no section for v1.2.4" in result.stderr


@pytest.mark.parametrize(
    ("tag", "kind"),
    [("v1.2.3", "--latest"), ("v1.2.3rc1", "--prerelease"), ("v1.2.3-beta.2", "--prerelease")],
)
def test_a_preview_is_not_the_latest_release(release: Workflow, tmp_path: Path, tag: str, kind: str) -> None:
    fake = tmp_path / "gh"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    (tmp_path / "release").mkdir()
    (tmp_path / "release/SHA256SUMS").touch()
    result = run(script(release, "Release"), tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}", GITHUB_REF_NAME=tag)
    assert result.stdout.strip() == f"release create {tag} --verify-tag {kind} --notes-file notes.md release/SHA256SUMS"


def test_what_the_example_image_downloads_is_what_the_release_publishes(release: Workflow) -> None:
    example = (ROOT / "docker/own-image.example.dockerfile").read_text()
    (downloaded,) = re.findall(r"/download/v\$\{COMFYD_VERSION\}/(\S+)", example)
    assert f"release/{downloaded}" in script(release, "One-file program")


def test_the_program_is_made_by_a_target_that_there_is(release: Workflow) -> None:
    (target,) = re.findall(r"^make (\w+)$", script(release, "One-file program"), re.MULTILINE)
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_version_numbers_of_the_hashed_build_requirements_are_the_projects(release: Workflow) -> None:
    """The workflow builds with requirements/build.txt, without the isolation that would read pyproject.toml."""
    assert "--require-hashes --requirement requirements/build.txt" in script(release, "Wheel and sdist")
    (backend,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert f"{backend} " in (ROOT / "requirements/build.txt").read_text()
