"""Test the environment set-up: requirements are checked, and nothing is changed if all are met."""

import os
import subprocess
import sys

from tools.check_requirements import find_unmet_requirements

from ..conftest import ROOT


def test_requirements_are_met_here():
    assert find_unmet_requirements(ROOT / "requirements.txt") == []


def test_unmet_requirements_are_named(tmp_path):
    (tmp_path / "r.txt").write_text("# a comment\nnumpy<1  # old\nsurely-not-a-package>=2\npytest\n\n")
    lines = find_unmet_requirements(tmp_path / "r.txt")
    assert [line.split(":")[0] for line in lines] == ["numpy<1", "surely-not-a-package>=2"]


def test_nothing_is_installed_if_all_requirements_are_met(tmp_path):
    """Run the set-up from another folder, through a link with a space in its name."""
    link = tmp_path / "a project"
    link.symlink_to(ROOT)
    environment = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    environment.pop("VENV", None)
    result = subprocess.run(
        ["sh", str(link / "tools" / "setup_env.sh")], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("nothing to do") and len(result.stdout.splitlines()) == 1
