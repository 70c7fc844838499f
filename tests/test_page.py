"""The pages in a real browser: a job's with its curve, and the playground."""

import os
import re
import struct
import subprocess
import urllib.parse
import urllib.request
import zlib
from html import unescape

import numpy as np
import pytest
from conftest import TINY
from harness import wait_for
from rows import sums

# The colours of the style sheet's light scheme.
TRAIN_COLOUR = (0x2F, 0x6F, 0xDE)
VALID_COLOUR = (0xC4, 0x56, 0x0A)


def chromium(tmp_path, *arguments):
    """Runs headless Chromium once, without any traffic of its own."""
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    return subprocess.run(
        [
            "chromium",
            "--headless",
            *sandbox,
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
            "--window-size=1200,1000",
            "--virtual-time-budget=5000",
            f"--user-data-dir={tmp_path / 'profile'}",
            *arguments,
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout


def dom(tmp_path, url):
    return chromium(tmp_path, "--dump-dom", url)


def page_url(service, job_id, key=None):
    origin = service.base_url.removesuffix("/v1")
    return f"{origin}/jobs/{job_id}" + ("" if key is None else f"#key={key}")


def text_of(html, element_id):
    found = re.search(rf'id="{element_id}"[^>]*>([^<]*)<', html)
    assert found, f"no #{element_id} in the page"
    return found[1]


def is_hidden(html, element_id):
    tag = re.search(rf'<[^>]*id="{element_id}"[^>]*>', html)[0]
    return " hidden" in tag


def read_png(path):
    """Rows × columns × RGB of an 8-bit PNG without interlacing, as Chromium writes it."""
    data = path.read_bytes()
    position, compressed = 8, b""
    while position < len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        kind, body = data[position + 4 : position + 8], data[position + 8 : position + 8 + length]
        if kind == b"IHDR":
            width, height, _, colour_type = struct.unpack(">IIBB", body[:10])
        elif kind == b"IDAT":
            compressed += body
        position += length + 12
    channels = {2: 3, 6: 4}[colour_type]
    raw = np.frombuffer(zlib.decompress(compressed), np.uint8).reshape(height, 1 + width * channels)
    previous = np.zeros(width * channels, np.uint8)
    pixels = np.empty((height, width * channels), np.uint8)
    for y in range(height):
        kind, line = raw[y, 0], raw[y, 1:].copy()
        if kind == 2:
            line += previous
        elif kind != 0:
            for x in range(len(line)):
                left = int(line[x - channels]) if x >= channels else 0
                up, corner = int(previous[x]), int(previous[x - channels]) if x >= channels else 0
                if kind == 1:
                    predicted = left
                elif kind == 3:
                    predicted = (left + up) // 2
                else:
                    guess = left + up - corner
                    predicted = min((left, up, corner), key=lambda value: abs(guess - value))
                line[x] = (int(line[x]) + predicted) & 0xFF
        pixels[y] = previous = line
    return pixels.reshape(height, width, channels)[:, :, :3]


@pytest.fixture(scope="module")
def job(service):
    created = service.create_job(
        sums(16), TINY, validation=sums(4, start=90), n_epochs=10, batch_size=4, eval_steps=4, learning_rate=1e-3
    )
    return service.finish(created.id)


def test_the_page_shows_the_curve_and_the_job_s_facts(service, job, tmp_path):
    html = dom(tmp_path, page_url(service, job.id, service.key))
    assert text_of(html, "job-name") == job.fine_tuned_model
    assert text_of(html, "status") == "succeeded"
    assert "step 40 of 40" in text_of(html, "progress-text")
    label = re.search(r'id="loss-chart"[^>]*aria-label="([^"]*)"', html)[1]
    assert label.startswith("Loss by step: 40 steps, from ")
    assert html.count("<canvas") == 4, "the loss and three small charts"
    for shown in ("learning_rate", "adapter.r", "The job has successfully completed.", "ckpt-step-"):
        assert shown in html, shown


def test_both_lines_are_drawn_across_the_chart(service, job, tmp_path):
    picture = tmp_path / "page.png"
    chromium(tmp_path, f"--screenshot={picture}", page_url(service, job.id, service.key))
    # The chart's part of the window, below the heading and above the tiles.
    pixels = read_png(picture)[230:560].astype(int)
    for colour in (TRAIN_COLOUR, VALID_COLOUR):
        near = (np.abs(pixels - np.array(colour)).sum(axis=2) < 24).any(axis=0)
        columns = np.flatnonzero(near)
        assert len(columns) > 500, f"{colour} spans {len(columns)} columns"
        assert columns[-1] - columns[0] > 700


def test_without_a_key_the_page_asks_for_one(service, job, tmp_path):
    html = dom(tmp_path, page_url(service, job.id))
    assert not is_hidden(html, "key-form") and is_hidden(html, "job")
    assert job.fine_tuned_model not in html


def test_a_wrong_key_is_said_and_asked_for_again(service, job, tmp_path):
    html = dom(tmp_path, page_url(service, job.id, "sk-wrong"))
    assert not is_hidden(html, "key-form") and is_hidden(html, "job")
    assert "refused" in text_of(html, "key-reason")


def test_an_unknown_job_is_said(service, tmp_path):
    html = dom(tmp_path, page_url(service, "ftjob-none", service.key))
    assert not is_hidden(html, "message")
    assert "Could not find fine tune: ftjob-none" in text_of(html, "message-text")


def test_a_failed_job_shows_its_error(service, tmp_path):
    job = service.create_job(sums(9), TINY)
    service.fail(job.id)
    html = dom(tmp_path, page_url(service, job.id, service.key))
    assert not is_hidden(html, "failure")
    assert "must have at least 10 examples" in text_of(html, "failure-text")


def test_the_page_asks_nothing_of_other_hosts(service, job):
    """Its policy would stop it, and there is nothing in it that tries."""
    origin = service.base_url.removesuffix("/v1")
    for path in (f"/jobs/{job.id}", "/assets/app.js", "/assets/app.css"):
        with urllib.request.urlopen(origin + path) as reply:
            text = reply.read().decode()
            if path.startswith("/jobs"):
                assert "default-src 'none'" in reply.headers["Content-Security-Policy"]
        hosts = set(re.findall(r"(?:src|href|import|url)\s*[=(]?\s*[\"']?https?://([\w.]+)", text))
        assert hosts == set()


def test_the_playground_answers_with_both_models_side_by_side(service, job, tmp_path):
    asked = {"left": TINY, "right": job.fine_tuned_model, "prompt": "What is 1 + 2?", "max_tokens": 4, "run": ""}
    origin = service.base_url.removesuffix("/v1")
    url = f"{origin}/playground?{urllib.parse.urlencode(asked)}#key={service.key}"

    def look():
        # The browser's clock does not wait for a stream, and so it may look too early.
        html = dom(tmp_path, url)
        return html if html.count('data-state="done"') == 3 else None

    html = wait_for("both answers", look)
    assert not is_hidden(html, "playground") and is_hidden(html, "job")
    for side, model in (("left", TINY), ("right", job.fine_tuned_model)):
        reply = service.sdk.chat.completions.create(
            model=model, messages=[{"role": "user", "content": asked["prompt"]}], max_tokens=4, temperature=0
        )
        assert unescape(text_of(html, f"{side}-answer")) == reply.choices[0].message.content
        assert reply.choices[0].message.content


def test_the_job_s_page_leads_to_the_playground(service, job, tmp_path):
    html = dom(tmp_path, page_url(service, job.id, service.key))
    link = urllib.parse.urlencode({"left": TINY, "right": job.fine_tuned_model})
    assert f"/playground?{link}" in unescape(html)
