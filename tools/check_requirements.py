"""Check that the packages of a requirements file are installed in allowed versions.

    python tools/check_requirements.py requirements.txt

The script prints one line per unmet requirement and exits with status 1. If all requirements are met, the script prints
nothing and exits with status 0. The script needs only the standard library and pip's copy of the package packaging, so
it runs in an empty environment without network access.
"""

import sys
from importlib import metadata
from pathlib import Path


def find_unmet_requirements(path: Path) -> list[str]:
    """Return one line for each requirement of the file that is not met by the installed packages."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        from pip._vendor.packaging.requirements import Requirement
    missing = []
    for line in path.read_text().splitlines():
        text = line.split("#")[0].strip()
        if not text:
            continue
        requirement = Requirement(text)
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            missing.append(f"{text}: not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            missing.append(f"{text}: version {version} is installed")
    return missing


if __name__ == "__main__":
    lines = find_unmet_requirements(Path(sys.argv[1]))
    print("\n".join(lines), end="\n" if lines else "")
    sys.exit(bool(lines))
