"""The page of `worldline serve` in a real browser, over the public routes alone.

Where jobs must take a certain time, fail or be many, a stand-in draws the videos.
"""

from __future__ import annotations

import base64
import json
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="needs worldline[serve]")
pytest.importorskip("selenium", reason="needs selenium")

from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select

from tests.serve.served import Served
from tests.serve.stub_server import BASE, FLOW, Stub, serving
from worldline.video.write import write_video

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]
KEY = "a-key-of-this-test"
ENDED = ("completed", "failed", "cancelled")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of `worldline serve` with a prompted world (FLOW) and one that takes none (BASE)."""
    server = Served(tmp_path_factory.mktemp("server"), FLOW, BASE)
    yield server.url
    server.stop()


@pytest.fixture(scope="module")
def keyed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server that asks for KEY."""
    with serving(Stub(tmp_path_factory.mktemp("keyed"), keys=(KEY,))) as address:
        yield address


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def chromium(downloads: Path) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1280,900"):
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


class Page:
    """A browser's window on the page, by the names that tests know its parts by."""

    def __init__(self, driver: webdriver.Chrome, address: str) -> None:
        self.driver, self.address = driver, address

    def open(self, *, ready: bool = True) -> Page:
        self.driver.get(self.address)
        if ready:
            self.until(lambda: self.part("generate").is_enabled(), "a world")
            self.until(
                lambda: self.part("connection").get_attribute("data-state") == "live", "live"
            )
        return self

    def part(self, name: str, inside: WebElement | None = None) -> WebElement:
        return (inside or self.driver).find_element(By.CSS_SELECTOR, f'[data-testid="{name}"]')

    def text(self, name: str, inside: WebElement | None = None) -> str:
        return self.part(name, inside).get_property("textContent")

    def visible(self, name: str, inside: WebElement | None = None) -> bool:
        return self.part(name, inside).is_displayed()

    def runs(self) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, '[data-testid="run"]')

    def run(self, id: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, f'[data-id="{id}"]')

    def script(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def click(self, name: str, inside: WebElement | None = None) -> None:
        """A click where it is: rows of a menu are opened first."""
        button = self.part(name, inside)
        if inside is not None and not button.is_displayed():
            self.click("menu-open", inside)
        self.script('arguments[0].scrollIntoView({block: "center"})', button)
        button.click()

    def write(self, name: str, text: str) -> None:
        field = self.part(name)
        self.script("arguments[0].closest('details')?.setAttribute('open', '')", field)
        field.clear()
        field.send_keys(text)

    def until(self, condition: Callable[[], Any], what: str, seconds: float = 20) -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if value := condition():
                    return value
            except WebDriverException:
                pass
            time.sleep(0.05)
        raise AssertionError(f"{what}: not within {seconds} s")

    def generate(self, number: int = 1) -> list[WebElement]:
        """The new runs, newest first."""
        before = {run.get_attribute("data-id") for run in self.runs()}
        self.click("generate")

        def new() -> list[WebElement]:
            return [run for run in self.runs() if run.get_attribute("data-id") not in before]

        return self.until(lambda: len(new()) == number and new(), f"{number} runs")

    def end(self, run: WebElement, status: str = "completed") -> WebElement:
        self.until(lambda: run.get_attribute("data-status") in ENDED, "an end", 120)
        assert run.get_attribute("data-status") == status, self.text("run-error", run)
        return run

    def video(self, run: WebElement) -> WebElement:
        """The video of a run that has ended, once it can be played."""
        self.script('arguments[0].scrollIntoView({block: "center"})', run)
        self.until(lambda: self.visible("video", run), "a video")
        return self.part("video", run)

    def make(self, prompt: str, steps: int = 2) -> WebElement:
        """A finished run."""
        self.write("prompt", prompt)
        self.write("field-num_steps", str(steps))
        [run] = self.generate()
        return self.end(run)

    def job(self, run: WebElement) -> dict[str, Any]:
        """The video object."""
        return json.loads(self.fetch(f"videos/{run.get_attribute('data-id')}"))

    def fetch(self, path: str) -> bytes:
        with urllib.request.urlopen(f"{self.address}/v1/{path}") as response:
            return response.read()


@pytest.fixture
def page(chromium: webdriver.Chrome, server: str) -> Iterator[Page]:
    chromium.get_log("browser")
    page = Page(chromium, server)
    page.open()
    chromium.execute_script("sessionStorage.clear()")
    yield page.open()
    for window in chromium.window_handles[1:]:
        chromium.switch_to.window(window)
        chromium.close()
    chromium.switch_to.window(chromium.window_handles[0])
    chromium.execute_script("sessionStorage.clear()")


def picture(path: Path) -> Path:
    Image.fromarray(np.full((192, 320, 3), 90, np.uint8)).save(path)
    return path


def clip(path: Path) -> Path:
    write_video(np.full((9, 192, 320, 3), 90, np.uint8), path, 16)
    return path


def test_upload_progress_preview_video_download(
    page: Page, tmp_path: Path, downloads: Path
) -> None:
    page.part("file").send_keys(str(picture(tmp_path / "in.png")))
    page.until(lambda: page.part("input-image").get_property("naturalWidth") == 320, "the input")
    page.write("prompt", "A ball rolls.")
    page.write("field-num_steps", "30")
    [run] = page.generate()
    values: list[int] = []

    def ended() -> bool:
        values.append(int(page.part("run-bar", run).get_attribute("aria-valuenow")))
        return run.get_attribute("data-status") in ENDED

    assert page.until(lambda: page.visible("run-preview", run), "a preview")
    page.until(ended, "an end", 120)
    assert values == sorted(values)
    assert len(set(values)) > 3
    video = page.video(page.end(run))
    page.until(lambda: video.get_property("currentTime") > 0, "playing")
    assert video.get_property("videoWidth") == page.job(run)["width"]
    assert video.get_property("loop")
    id = run.get_attribute("data-id")
    page.click("download", run)
    file = downloads / f"{id}.mp4"
    page.until(file.exists, "the file")
    assert file.read_bytes() == page.fetch(f"videos/{id}/content")


def test_clip_as_input_and_world_without_prompt(page: Page, tmp_path: Path) -> None:
    Select(page.part("world")).select_by_value(BASE)
    assert not page.visible("prompt-field")
    page.click("generate")
    page.until(lambda: page.visible("error-input_reference"), "an error")
    page.part("file").send_keys(str(clip(tmp_path / "in.mp4")))
    page.until(lambda: page.part("input-video").get_property("videoWidth") == 320, "the input")
    assert not page.visible("error-input_reference")
    [run] = page.generate()
    page.until(lambda: page.visible("run-preview", run), "the input's last frame")
    page.end(run)
    assert BASE in page.text("run-facts", run)


def test_reload_and_second_window_have_the_same_run(page: Page) -> None:
    page.write("prompt", "A long one.")
    page.write("field-num_steps", "60")
    [run] = page.generate()
    id = run.get_attribute("data-id")
    page.until(lambda: run.get_attribute("data-status") == "in_progress", "a start")
    page.driver.switch_to.new_window("window")
    page.open()
    first = int(page.part("run-bar", page.run(id)).get_attribute("aria-valuenow"))
    page.until(
        lambda: int(page.part("run-bar", page.run(id)).get_attribute("aria-valuenow")) > first,
        "progress of another window's run",
    )
    page.open()
    assert page.run(id).get_attribute("data-status") == "in_progress"
    assert page.text("run-prompt", page.run(id)) == "A long one."
    page.click("cancel", page.run(id))
    page.end(page.run(id), "cancelled")
    page.driver.close()
    page.driver.switch_to.window(page.driver.window_handles[0])
    page.end(page.run(id), "cancelled")
    assert json.loads(page.fetch(f"videos/{id}"))["status"] == "cancelled"


def test_errors_are_at_their_field(page: Page) -> None:
    page.write("prompt", "A ball rolls.")
    page.write("field-num_video_frames", "32")
    page.click("generate")
    page.until(lambda: "32" in page.text("error-num_video_frames"), "an error")
    field = page.part("field-num_video_frames")
    assert field.get_attribute("aria-invalid") == "true"
    assert page.driver.switch_to.active_element == field
    page.write("field-num_video_frames", "33")
    assert not page.visible("error-num_video_frames")
    # a folded field is unfolded
    page.write("field-guidance", "101")
    page.script("arguments[0].open = false", page.part("advanced"))
    page.click("generate")
    page.until(lambda: page.visible("error-guidance"), "an error")
    page.write("field-guidance", "5")
    page.write("seed", "-1")
    page.click("generate")
    page.until(lambda: page.visible("error-seed"), "an error")


def test_use_settings_and_same_seed_give_the_same_bytes(page: Page) -> None:
    page.write("field-guidance", "3")
    first = page.make("The same twice.", 3)
    seed = page.job(first)["seed"]
    page.write("prompt", "Another.")
    page.write("field-guidance", "9")
    page.click("use-settings", first)
    assert page.part("prompt").get_property("value") == "The same twice."
    assert page.part("field-guidance").get_property("value") == "3"
    assert page.part("seed").get_property("value") != str(seed)
    random = page.part("seed").get_property("value")
    page.click("dice")
    assert page.part("seed").get_property("value") != random
    page.click("same-seed", first)
    assert page.part("seed").get_property("value") == str(seed)
    assert page.part("keep").is_selected()
    [second] = page.generate()
    page.end(second)
    assert page.part("seed").get_property("value") == str(seed)
    contents = [page.fetch(f"videos/{r.get_attribute('data-id')}/content") for r in (first, second)]
    assert contents[0] == contents[1]


def test_four_seeds_are_four_runs_and_one_upload(page: Page, tmp_path: Path) -> None:
    page.part("file").send_keys(str(picture(tmp_path / "in.png")))
    page.write("prompt", "Four balls.")
    page.write("field-num_steps", "1")
    page.write("seed", "4294967294")
    page.part("four-seeds").click()
    runs = page.generate(4)
    videos = [page.job(r) for r in runs]
    assert sorted(video["seed"] for video in videos) == [0, 1, 4294967294, 4294967295]
    assert all(video["request"]["input_reference"] for video in videos)
    for run in runs:
        page.end(run)


def test_compare_plays_in_step(page: Page) -> None:
    for prompt in ("One.", "Two."):
        page.make(prompt)
    for run in page.runs()[:2]:
        page.script("arguments[0].click()", page.part("compare-toggle", run))
    page.click("compare-open")
    tiles = page.until(
        lambda: page.driver.find_elements(By.CSS_SELECTOR, '[data-testid="compare"] video'), "tiles"
    )
    assert len(tiles) == 2
    times = "return [...arguments].map(video => video.currentTime)"
    page.until(lambda: min(page.script(times, *tiles)) > 0.3, "playing")
    for _ in range(20):
        one, other = page.script(times, *tiles)
        assert abs(one - other) < 0.05
        time.sleep(0.05)
    page.click("compare-play")
    scrub = page.part("compare-scrub")
    page.script("arguments[0].value = 8; arguments[0].dispatchEvent(new Event('input'))", scrub)
    fps = page.job(page.runs()[0])["fps"]
    page.until(lambda: page.script(times, *tiles) == [8.5 / fps] * 2, "frame 9 of both")
    scrub.send_keys(Keys.ARROW_RIGHT)
    page.until(lambda: page.script(times, *tiles) == [9.5 / fps] * 2, "frame 10 of both")
    page.click("compare-close")
    page.click("compare-clear")
    assert not page.visible("tray")


def test_arrow_keys_step_a_frame(page: Page) -> None:
    video = page.video(page.make("A step."))
    video.send_keys(Keys.HOME)
    label = page.part("frame", page.runs()[0])
    page.until(lambda: label.text == "1 / 33", "the first frame")
    video.send_keys(Keys.ARROW_RIGHT)
    page.until(lambda: label.text == "2 / 33", "the second frame")
    assert video.get_property("paused")
    video.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    page.until(lambda: label.text == "33 / 33", "the last frame")
    video.send_keys(Keys.SPACE)
    page.until(lambda: not video.get_property("paused"), "playing")


def test_markup_in_a_prompt_is_text(page: Page) -> None:
    page.driver.get_log("performance")
    prompt = "<img src=x onerror=\"document.title='broken'\"><script>alert(1)</script>"
    run = page.make(prompt)
    assert page.text("run-prompt", run) == prompt
    assert not page.driver.find_elements(By.CSS_SELECTOR, 'img[src="x"]')
    page.click("report", run)
    page.until(lambda: page.visible("report-dialog"), "the report")
    assert prompt in page.text("report-body")
    page.open()
    assert "broken" not in page.driver.title
    logged = [entry["message"] for entry in page.driver.get_log("browser")]
    assert logged == []
    urls = set()
    for entry in page.driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            urls.add(message["params"]["request"]["url"])
    assert urls
    own = (page.address, f"blob:{page.address}", "data:image/")
    assert [url for url in urls if not url.startswith(own)] == []


def test_report_and_curl_make_the_same_video(page: Page) -> None:
    run = page.make("It's a ball.")
    id = run.get_attribute("data-id")
    page.click("report", run)
    page.until(lambda: page.visible("report-dialog"), "the report")
    curl = page.text("curl")
    assert curl.startswith(f"curl {page.address}/v1/videos ")
    body = json.loads(curl.partition(" -d '")[2].rstrip("'").replace("'\\''", "'"))
    request = urllib.request.Request(
        f"{page.address}/v1/videos",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:
        again = json.load(response)["id"]
    page.click("report-close")
    page.end(page.until(lambda: page.run(again), "the run of another client"))
    assert page.fetch(f"videos/{id}/content") == page.fetch(f"videos/{again}/content")


def test_continue_remix_delete(page: Page) -> None:
    first = page.make("A beginning.")
    page.click("continue", first)
    page.until(lambda: page.visible("input-video"), "the video that is continued")
    page.write("prompt", "What follows.")
    [second] = page.generate()
    page.end(second)
    page.click("input-clear")
    page.click("remix", first)
    page.until(lambda: page.visible("remix-dialog"), "the question")
    page.write("remix-prompt", "Something else.")
    number = len(page.runs())
    page.click("remix-submit")
    page.until(lambda: len(page.runs()) == number + 1, "the remix")
    third = page.end(page.runs()[0])
    video = page.job(third)
    assert video["remixed_from_video_id"] == first.get_attribute("data-id")
    id = third.get_attribute("data-id")
    page.click("delete", third)
    page.click("delete", third)
    page.until(lambda: len(page.runs()) == number, "the removal")
    with pytest.raises(urllib.error.HTTPError) as failure:
        page.fetch(f"videos/{id}")
    assert failure.value.code == 404
    failure.value.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_window_has_no_sideways_scroll(page: Page, scheme: str) -> None:
    page.make("A word" + "y" * 120)
    sizes = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        page.open()
        page.video(page.runs()[0])
        page.script("document.querySelector('[data-testid=advanced]').open = true")
        widths = page.script("return [document.documentElement.scrollWidth, innerWidth]")
        assert widths == [360, 360]
        picture = base64.b64decode(page.driver.get_screenshot_as_base64())
        assert picture.startswith(b"\x89PNG")
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_everything_by_keyboard(page: Page) -> None:
    page.make("By keys.")
    page.open()
    page.until(lambda: page.visible("video", page.runs()[0]), "a video")
    reached = []
    for _ in range(40):
        ActionChains(page.driver).send_keys(Keys.TAB).perform()
        reached.append(
            page.script(
                "const node = document.activeElement, style = getComputedStyle(node);"
                "return [node.dataset.testid, node.tagName, style.outlineStyle]"
            )
        )
    names = [name for name, _, _ in reached]
    wanted = ("world", "file", "prompt", "seed", "dice", "keep", "generate", "four-seeds")
    wanted += ("compare-toggle", "video", "play", "scrub", "download", "use-settings", "menu-open")
    assert [name for name in wanted if name not in names] == []
    # the file chooser and the picker lie in boxes, which are outlined in their place
    boxed = ("file", "compare-toggle")
    assert [
        n for n, tag, line in reached if line == "none" and tag != "BODY" and n not in boxed
    ] == []


def test_key_is_asked_once(chromium: webdriver.Chrome, keyed_server: str) -> None:
    page = Page(chromium, keyed_server).open(ready=False)
    page.until(lambda: page.visible("key-dialog"), "the question")
    page.write("key-input", "wrong")
    page.click("key-submit")
    page.until(lambda: page.visible("key-error"), "the refusal")
    page.write("key-input", KEY)
    page.click("key-submit")
    page.until(lambda: page.part("generate").is_enabled(), "a world")
    assert not page.visible("key-dialog")
    page.video(page.make("Behind a key."))
    page.open()
    assert not page.visible("key-dialog")
    page.video(page.runs()[0])
    assert page.script("return localStorage.length") == 0


def test_example_makes_the_first_video(chromium: webdriver.Chrome, tmp_path: Path) -> None:
    with serving(Stub(tmp_path)) as address:
        page = Page(chromium, address).open()
        chromium.execute_script("sessionStorage.clear()")
        page.open()
        page.until(lambda: page.visible("empty"), "the empty state")
        page.click("example")
        assert "ball" in page.part("prompt").get_property("value")
        [run] = page.generate()
        assert not page.visible("empty")
        page.end(run)
        Select(page.part("world")).select_by_value(BASE)
        page.script("document.querySelector('[data-testid=example]').click()")
        page.until(lambda: page.visible("input-image"), "a drawn picture")
        [run] = page.generate()
        page.end(run)


def test_older_videos_come_by_pages(chromium: webdriver.Chrome, tmp_path: Path) -> None:
    with serving(Stub(tmp_path, step_s=0.0)) as address:
        body = {"prompt": "x", "num_steps": 1, "num_video_frames": 1}
        for _ in range(45):
            request = urllib.request.Request(
                f"{address}/v1/videos",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            urllib.request.urlopen(request).close()

        def ended() -> bool:
            with urllib.request.urlopen(f"{address}/v1/videos?limit=100") as response:
                return all(video["status"] in ENDED for video in json.load(response)["data"])

        page = Page(chromium, address)
        page.until(ended, "45 videos")
        page.open()
        assert len(page.runs()) == 20
        for number in (40, 45):
            page.click("older")
            page.until(lambda number=number: len(page.runs()) == number, f"{number} runs")
        assert not page.visible("older")
        ids = [run.get_attribute("data-id") for run in page.runs()]
        assert ids == sorted(ids, reverse=True)


def test_runs_are_right_again_after_a_lost_connection(
    chromium: webdriver.Chrome, tmp_path: Path
) -> None:
    stub = Stub(tmp_path)
    with serving(stub) as address:
        port = int(address.rpartition(":")[2])
        page = Page(chromium, address).open()
        run = page.make("Before.")
        gone = run.get_attribute("data-id")
    page.until(lambda: page.part("connection").get_attribute("data-state") == "lost", "a loss")
    page.write("prompt", "Meanwhile.")
    page.write("field-guidance", "4")
    page.click("generate")
    page.until(lambda: page.visible("form-error"), "words")
    stub.runs.pop(gone)
    stub.device, stub.listeners = type(stub.device)(), []
    with serving(stub, port):
        page.until(lambda: page.part("connection").get_attribute("data-state") == "live", "live")
        page.until(lambda: not page.runs(), "the list of the server")
        assert page.part("field-guidance").get_property("value") == "4"
        page.make("After.")


def test_list_is_read_where_no_stream_can_be_had(
    chromium: webdriver.Chrome, tmp_path: Path
) -> None:
    with serving(Stub(tmp_path, streams=False)) as address:
        page = Page(chromium, address).open(ready=False)
        page.until(lambda: page.part("generate").is_enabled(), "a world")
        assert page.make("Polled.")


def test_stub_has_both_worlds(server: str) -> None:
    with urllib.request.urlopen(f"{server}/v1/models") as response:
        assert [entry["id"] for entry in json.load(response)["data"]] == [FLOW, BASE]
