"""Draw the pictures of the documentation from a run of the quickstart, with Chromium.

python scripts/make_screenshots.py [RUN]    by default examples/quickstart/run
"""

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
PICTURES = {
    "report-curves.png": ("#curves", 1180, ""),
    "report-tokens.png": (
        "#samples",
        620,
        "byId('order').value = 'low'; byId('step').selectedIndex = byId('step').options.length - 1; filter();"
        "byId('colour').value = 'log_prob'; move(3);",
    ),
}
"""The part of the report that each shows, its height in pixels, and what a script does in the page before."""


def main() -> int:
    """Write the report of the run, and a picture of each part."""
    run = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "examples" / "quickstart" / "run"
    browser = next(path for name in ("chromium", "google-chrome") if (path := shutil.which(name)))
    with TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        iiverl = Path(sys.executable).with_name("iiverl")
        subprocess.run([iiverl, "report", run, "-o", page], check=True)
        text = page.read_text("utf-8")
        for name, (part, height, script) in PICTURES.items():
            page.write_text(text.replace("</body>", f"<script>{script}</script></body>"), "utf-8")
            command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
            command += [f"--user-data-dir={folder}/profile", f"--window-size=1300,{height}"]
            command += [f"--screenshot={ROOT / 'docs' / 'pictures' / name}", page.as_uri() + part]
            subprocess.run(command, check=True, capture_output=True)
            print(f"docs/pictures/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
