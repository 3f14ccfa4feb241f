"""Draws docs/demo.svg, what the terminal shows at the end of the demo without the times of the
machine that draws it, and photographs its report: docs/report-*.png. Needs Chromium.

python docs/make_picture.py headrace-demo
"""

import dataclasses
import io
import math
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.terminal_theme import MONOKAI

from headrace.pipelines.cli.demo import REFERENCE, write_demo
from headrace.pipelines.cli.run import show_result
from headrace.pipelines.console import make_console
from headrace.pipelines.recipe.load import load_recipe
from headrace.pipelines.report.build import write_report
from headrace.pipelines.run import run_recipe

# rich's own frame, without the web font that it would load: the picture must open offline.
FRAME = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g>
</g>
</svg>
"""


class WrappingConsole(Console):
    """A picture has no lines longer than it is wide."""

    def print(self, *objects: Any, soft_wrap: bool | None = None, **options: Any) -> None:
        super().print(*objects, **options)


# The summary's card and the leaderboard's last column.
_WITHOUT_TIMES = """() => {
  for (const card of document.querySelectorAll("main section:first-of-type *"))
    if (card.children.length > 1 && card.children[0].textContent.trim() === "time") card.remove();
  for (const row of document.querySelectorAll("#table-leaderboard tr"))
    if (/^seconds|^[\\d.,]+$/.test(row.lastElementChild.textContent)) row.lastElementChild.remove();
}"""


def photograph(report: Path, folder: Path) -> None:
    """The page's beginning at 1,600 pixels, light, and at 360, dark; the map, with images around a
    point drawn into the table and one of them pointed at.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=shutil.which("chromium"))
        for name, width, height, scheme in (
            ("wide", 1600, 1150, "light"),
            ("narrow", 360, 1150, "dark"),
            ("map", 1000, 1100, "light"),
        ):
            page = browser.new_page(
                viewport={"width": width, "height": height}, color_scheme=scheme
            )
            page.goto(report.absolute().as_uri())
            page.wait_for_selector("html[data-ready=yes]", state="attached")
            page.evaluate(_WITHOUT_TIMES)
            if name == "map":
                # At once: while the page still scrolls, a box is not where the mouse will be.
                page.evaluate(
                    "document.querySelector('#map').scrollIntoView({ behavior: 'instant' })"
                )
                page.wait_for_selector("[data-map][data-drawn=yes]")
                canvas = page.locator("#map canvas").first.bounding_box()
                centre_x = canvas["x"] + 0.66 * canvas["width"]
                centre_y = canvas["y"] + 0.7 * canvas["height"]
                page.mouse.move(centre_x + 90, centre_y)
                page.mouse.down()
                for step in range(1, 33):
                    angle = step / 32 * 2 * math.pi
                    page.mouse.move(
                        centre_x + 90 * math.cos(angle), centre_y + 90 * math.sin(angle)
                    )
                page.mouse.up()
                page.mouse.move(centre_x, centre_y)
                page.wait_for_timeout(500)
            page.screenshot(path=folder / f"report-{name}.png")
            page.close()
        browser.close()


if __name__ == "__main__":
    recipe = load_recipe(write_demo(Path(sys.argv[1])))
    result = run_recipe(recipe, console=make_console(stderr=True))
    console = WrappingConsole(
        record=True,
        width=112,
        file=io.StringIO(),
        force_terminal=True,
        markup=False,
        highlight=False,
    )
    result = dataclasses.replace(result, stages=())
    show_result(console, result, reference=REFERENCE)
    picture = console.export_svg(
        title="make demo", theme=MONOKAI, code_format=FRAME, unique_id="demo"
    )
    lines = (line.rstrip() for line in picture.splitlines())
    folder = Path(__file__).parent
    (folder / "demo.svg").write_text("\n".join(lines) + "\n")
    photograph(write_report(recipe.paths.root).page, folder)
