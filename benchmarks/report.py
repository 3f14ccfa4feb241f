"""How quick the report's page is with ten thousand settings, in headless Chromium.

The last line is JSON {measure: figure}.

Each figure is the median of several fresh pages, in milliseconds on the page's own clock: first
contentful paint from the start of navigation; the time from a keystroke, a choice or a click until
the new rows are laid out, which is what a user waits for. A filter is timed for the first keystroke
too, when the text of all rows is put together.

python benchmarks/report.py [--case NAME] [--quick]
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

CASES = {"settings-10000": 10_000, "settings-1000": 1_000}
ACTIONS = {
    "filter, first keystroke": "[t.querySelector('input[type=search]'), 'input', 'lr=0.003']",
    "filter, next keystroke": "[t.querySelector('input[type=search]'), 'input', 'lr=0.003 C=1']",
    "choice of a kind": "[t.querySelector('select'), 'change', 'mlp']",
    "sort by a number": "[[...t.querySelectorAll('th button')].at(-1), 'click', null]",
    "sort by a text": "[[...t.querySelectorAll('th button')][5], 'click', null]",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--quick", action="store_true", help="three pages instead of nine")
    options = parser.parse_args()
    browser = next(
        (found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None
    )
    if browser is None:
        print("needs Chromium: apt-get install chromium")
        print(json.dumps({}))
        return 0
    from support.reports import finished_run, inflate, make_data

    from headrace.pipelines.report.build import write_report

    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        make_data(Path(folder))
        finished_run(Path(folder))
        for case in options.case or list(CASES):
            root = Path(folder) / case
            shutil.copytree(Path(folder) / "runs" / "single", root)
            inflate(root, CASES[case])
            report = write_report(root)
            measured = time_page(browser, report.page, 3 if options.quick else 9)
            print(f"\n{case}: {report.bytes / 1e6:.1f} MB of HTML")
            for name, milliseconds in measured.items():
                print(f"  {name:26} {milliseconds:8.0f} ms")
                figures[f"{case} {name} ms"] = round(milliseconds, 1)
    print(json.dumps(figures))
    return 0


def time_page(browser: str, page: Path, repeats: int) -> dict[str, float]:
    """Medians over fresh pages."""
    from playwright.sync_api import sync_playwright

    found: dict[str, list[float]] = {name: [] for name in ("first paint", "ready", *ACTIONS)}
    with sync_playwright() as player:
        chromium = player.chromium.launch(executable_path=browser)
        for _ in range(repeats):
            tab = chromium.new_page(viewport={"width": 1600, "height": 900})
            tab.goto(page.as_uri())
            tab.wait_for_selector("html[data-ready=yes]", state="attached")
            paint = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
            tab.wait_for_function(f"{paint} !== undefined")
            found["first paint"].append(tab.evaluate(paint))
            found["ready"].append(
                tab.evaluate("performance.getEntriesByType('navigation')[0].domComplete")
            )
            for name, action in ACTIONS.items():
                found[name].append(time_action(tab, action))
            tab.close()
        chromium.close()
    return {name: statistics.median(values) for name, values in found.items()}


def time_action(tab: Any, action: str) -> float:
    """Milliseconds until the handler has run and the table is laid out anew."""
    script = f"""() => {{
        const t = document.querySelector('#table-leaderboard');
        const [element, event, value] = {action};
        const start = performance.now();
        if (value !== null) element.value = value;
        if (event === 'click') element.click(); else element.dispatchEvent(new Event(event, {{ bubbles: true }}));
        t.getBoundingClientRect();
        return performance.now() - start;
    }}"""
    return float(tab.evaluate(script))


if __name__ == "__main__":
    sys.exit(main())
