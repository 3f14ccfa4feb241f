"""How quick the report's page is with ten thousand settings, and its map with 100,000 images, in
headless Chromium.

The last line is JSON {measure: figure}.

Each figure is the median of several fresh pages, in milliseconds on the page's own clock: first
contentful paint from the start of navigation; the time from a keystroke, a choice or a click until
the new rows are laid out, which is what a user waits for. A filter is timed for the first keystroke
too, when the text of all rows is put together. On the map, a hover is timed from the pointer's move
to the frame that has the card and the ring; the worst of fifty is printed too.

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

CASES = {"settings-10000": 10_000, "settings-1000": 1_000, "map-100000": 100_000}
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
        cases = options.case or list(CASES)
        if any(case.startswith("settings") for case in cases):
            make_data(Path(folder))
            finished_run(Path(folder))
        for case in cases:
            if case.startswith("map"):
                page = write_map(Path(folder), CASES[case])
                measured = time_map(browser, page, 3 if options.quick else 9)
                print(f"\n{case}: {page.stat().st_size / 1e6:.2f} MB of HTML, without pictures")
                figures[f"{case} MB"] = round(page.stat().st_size / 1e6, 3)
                for name, milliseconds in measured.items():
                    print(f"  {name:26} {milliseconds:8.0f} ms")
                    figures[f"{case} {name} ms"] = round(milliseconds, 1)
                continue
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


def write_map(folder: Path, n: int) -> Path:
    """The page of a map of n images: two layouts, and the colours of a run with patients."""
    import numpy as np
    import pandas as pd

    from headrace.pipelines.report.images.embedding import colourings, make_layouts
    from headrace.pipelines.report.page.blocks import Headline, PointMap, Section
    from headrace.pipelines.report.page.render import render_page

    rng = np.random.default_rng(0)
    label = rng.integers(0, 10, n)
    predicted = np.where(rng.random(n) < 0.9, label, rng.integers(0, 10, n))
    features = (rng.normal(size=(10, 64)) * 2)[label] + rng.normal(size=(n, 64))
    shown = pd.DataFrame(
        {
            "id": [f"photos/class{at}/image_{number:06}.jpg" for number, at in enumerate(label)],
            "content": "",
            "label": [f"class{at}" for at in label],
            "predicted": [f"class{at}" for at in predicted],
            "outcome": np.where(predicted == label, "right", "wrong"),
            "split": rng.choice(["validation", "test"], n, p=[0.8, 0.2]),
            "probability": rng.random(n),
            "patient": [f"patient {number}" for number in rng.integers(0, 2000, n)],
        }
    )
    layouts, _ = make_layouts(features.astype(np.float32))
    block = PointMap(
        "map", f"{n:,} images", layouts, colourings(shown, {"patient"}), tuple(shown["id"])
    )
    page = folder / "map.html"
    text = render_page("map", "", Headline(()), (Section("map", "Map", "", (block,)),))
    page.write_text(text)
    return page


def time_map(browser: str, page: Path, repeats: int) -> dict[str, float]:
    """Medians over fresh pages; of hovers also the worst."""
    from playwright.sync_api import sync_playwright

    found: dict[str, list[float]] = {}
    with sync_playwright() as player:
        chromium = player.chromium.launch(executable_path=browser)
        for _ in range(repeats):
            tab = chromium.new_page(viewport={"width": 1600, "height": 900})
            tab.goto(page.as_uri())
            tab.wait_for_selector("[data-map][data-drawn=yes]")
            paint = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
            tab.wait_for_function(f"{paint} !== undefined")
            measured = tab.evaluate(MAP_TIMES) | {"first paint": tab.evaluate(paint)}
            for name, value in measured.items():
                found.setdefault(name, []).append(value)
            tab.close()
        chromium.close()
    return {name: statistics.median(values) for name, values in found.items()}


MAP_TIMES = """async () => {
    const frame = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
    const canvas = document.querySelector('.map canvas'), box = canvas.getBoundingClientRect();
    const point = (type, x, y) => canvas.dispatchEvent(new PointerEvent(type, {
        bubbles: true, pointerId: 1, clientX: box.left + x * box.width, clientY: box.top + y * box.height }));
    canvas.setPointerCapture = () => {};
    const drawn = performance.now();
    const hovers = [];
    for (let step = 0; step < 50; step += 1) {
        await frame();
        const start = performance.now();
        point('pointermove', 0.3 + 0.008 * step, 0.5 + 0.2 * Math.sin(step));
        await frame();
        hovers.push(performance.now() - start);
    }
    hovers.sort((a, b) => a - b);
    const timed = async (act) => {
        await frame();
        const start = performance.now();
        act();
        await frame();
        return performance.now() - start;
    };
    const colour = [...document.querySelectorAll('.map .tools select')].at(-2);
    const recolour = await timed(() => { colour.value = 1; colour.dispatchEvent(new Event('change')); });
    const lasso = await timed(() => {
        point('pointermove', 0.3, 0.3);
        point('pointerdown', 0.3, 0.3);
        for (let step = 0; step < 200; step += 1) point('pointermove', 0.5 + 0.2 * Math.cos(step / 32), 0.5 + 0.3 * Math.sin(step / 32));
        point('pointerup', 0.7, 0.5);
    });
    return { 'map drawn': drawn, 'hover': hovers[25], 'hover, the worst': hovers.at(-1), 'another colour': recolour, 'lasso to the table': lasso };
}"""


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
