"""Open a generated HTML page in headless Chromium and run a script that clicks through it."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def browse(page: Path, script: str, milliseconds: int = 8000) -> dict:
    """Run ``script`` in the page and return its result.

    ``script`` is the body of an async function that runs after the page has loaded.

    The test is skipped if Chromium is not installed. Errors in the page or in the script make the test fail.
    """
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no Chromium here: apt-get install chromium, and pages are clicked through too")
    catcher = """<script>window.failures = []; window.onerror = (text) => { window.failures.push(text); };</script>"""
    runner = f"""<script>(async () => {{
      let found;
      try {{ found = await (async () => {{ {script} }})(); }} catch (error) {{ found = {{ error: String(error) }}; }}
      if (window.failures.length) found = {{ error: window.failures.join("; ") }};
      const made = document.createElement("pre");
      made.id = "found-by-the-test";
      made.textContent = JSON.stringify(found);
      document.body.append(made);
    }})();</script>"""
    copy = page.with_name(f"clicked-{page.name}")
    copy.write_text(catcher + page.read_text(encoding="utf-8") + runner, encoding="utf-8")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1200", "--dump-dom")
    profile = f"--user-data-dir={page.parent / 'profile'}"
    done = subprocess.run(
        [program, *flags, profile, f"--virtual-time-budget={milliseconds}", copy.resolve().as_uri()],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    found = re.search(r'<pre id="found-by-the-test">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, f"the page never got to its end: {done.stderr[-500:]}"
    result = json.loads(html.unescape(found[1]))
    assert "error" not in result, result["error"]
    return result
