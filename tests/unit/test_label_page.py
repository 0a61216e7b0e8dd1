"""The page of `ftcore label` by an HTTP client, and its script in a JavaScript engine where one is installed."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from ftcore.cli import main
from ftcore.feedback.desk import Desk
from ftcore.feedback.judgements import RaterFile, read_judgements
from ftcore.feedback.page import PageServer
from ftcore.feedback.pairs import Pair

HOSTILE = "<script>alert(1)</script>\u202e\x1b[31m"
Ask = Callable[..., tuple[int, Any]]


def served(folder: Path, *, scored: bool = False) -> PageServer:
    pairs = [Pair(({"role": "user", "content": f"{HOSTILE} {n}"},), f"It is {n}.", f"{HOSTILE}", "acme/support", "base") for n in range(3)]
    file = RaterFile(folder, "ann")
    file.open()
    return PageServer(Desk(pairs, file, scored=scored), 0)


@pytest.fixture
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[PageServer]:
    made = served(tmp_path, scored=getattr(request, "param", False))
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()
    made.desk._file.close()


@pytest.fixture
def ask(server: PageServer) -> Ask:
    def asked(path: str, body: Any = None, *, token: str | None = None, kind: str = "application/json", **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
        raw = None if body is None else json.dumps(body) if kind == "application/json" else body
        place = f"/{server.token if token is None else token}/{path}"
        connection.request("GET" if body is None else "POST", place, raw, {"content-type": kind, **headers})
        reply = connection.getresponse()
        text = reply.read().decode()
        connection.close()
        return reply.status, text if reply.headers.get_content_type() == "text/html" else json.loads(text)

    return asked


def test_pairs_are_judged_one_after_another_and_written_down_at_once(server: PageServer, ask: Ask, tmp_path: Path) -> None:
    _, first = ask("pair")
    assert (first["number"], first["total"]) == (1, 3)
    code, second = ask("press", {"id": first["id"], "key": "a"})
    assert code == 200 and second["number"] == 2
    kept = read_judgements([str(tmp_path)])["ann"]
    assert [one.pair for one in kept] == [first["id"]] and kept[0].choice == kept[0].shown[0]
    assert ask("press", {"id": second["id"], "key": "u"})[1]["id"] == first["id"]
    assert read_judgements([str(tmp_path)]) == {}
    for _ in range(3):
        _, state = ask("press", {"id": ask("pair")[1]["id"], "key": "t"})
    assert state == {"id": ""}


def test_a_second_click_on_a_pair_that_is_gone_judges_nothing(server: PageServer, ask: Ask, tmp_path: Path) -> None:
    _, first = ask("pair")
    ask("press", {"id": first["id"], "key": "a"})
    code, state = ask("press", {"id": first["id"], "key": "b"})
    assert code == 409 and state["number"] == 2 and len(read_judgements([str(tmp_path)])["ann"]) == 1
    assert ask("press", {"id": state["id"], "key": "x"})[0] == 422


def test_a_stranger_finds_nothing(server: PageServer, ask: Ask) -> None:
    for path, body in (("", None), ("pair", None), ("press", {"id": "", "key": "u"})):
        assert ask(path, body, token="guessed")[0] == 404
        assert ask(path, body, token="")[0] == 404
        assert ask(path, body, host="rebound.example")[0] == 404
    assert server.server_address[0] == "127.0.0.1" and len(server.token) >= 32


def test_what_is_no_press_is_refused(server: PageServer, ask: Ask, tmp_path: Path) -> None:
    pair = ask("pair")[1]["id"]
    for body in ([1], {"id": pair}, {"id": pair, "key": 1}, {"id": pair, "key": "a", "more": "x" * 5000}):
        assert ask("press", body)[0] == 400
    assert ask("press", f'{{"id": "{pair}", "key": "a"}}', kind="text/plain")[0] == 400
    assert read_judgements([str(tmp_path / "raters" / "ann.jsonl")]) == {}


def test_texts_reach_the_page_as_text_and_systems_not_at_all(server: PageServer, ask: Ask) -> None:
    _, page = ask("")
    _, state = ask("pair")
    said = json.dumps(state)
    assert "alert" not in page and "\x1b" not in said and "\u202e" not in said and "u202e" in said
    assert "acme" not in page + said and "base" not in said and "innerHTML" not in page
    assert re.search(r"<script nonce=", page) and "http://" not in page and "https://" not in page


def test_quit_ends_the_server_and_a_port_that_is_taken_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = served(tmp_path)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "x", "a": "y", "b": "z"}))
    port = str(server.server_port)
    assert main(["label", str(pairs), "--out", str(tmp_path / "out"), "--page", "--port", port, "--rater", "bob"]) == 2
    assert f"--port {port}" in capsys.readouterr().err
    place = urlsplit(server.address)
    connection = http.client.HTTPConnection(str(place.hostname), place.port or 0, timeout=60)
    connection.request("POST", f"{place.path}press", json.dumps({"id": "", "key": "q"}), {"content-type": "application/json"})
    assert json.loads(connection.getresponse().read())["ended"]
    thread.join(60)
    assert not thread.is_alive()
    connection.close()
    server.server_close()
    server.desk._file.close()


# A document of little more than what the page's script asks of one; keys come in on stdin's stead as a list.
DOCUMENT = """
const boxes = {}, on = {};
const box = () => ({ dataset: {}, children: [], hidden: false, textContent: "", append(...c) { this.children.push(...c) },
  replaceChildren(...c) { this.children = c }, setAttribute() {} });
globalThis.document = { getElementById: id => (boxes[id] ||= box()), createElement: box, querySelectorAll: () => [],
  addEventListener: (kind, act) => { on[kind] = act } };
const real = fetch;
globalThis.fetch = (path, options) => real(ADDRESS + path, options);
const settled = async () => { do await new Promise(done => setTimeout(done, 2)); while (busy) };
"""
PLAY = """
(async () => {
  await settled();
  for (const key of KEYS) {
    on.keydown({ key, repeat: key === "A", ctrlKey: key === "B" });
    await settled();
  }
  console.log(JSON.stringify({ place: boxes.place.textContent, first: boxes.first.textContent, why: boxes.why.textContent,
    hidden: boxes.judging.hidden, asked: boxes.prompt.children.map(turn => turn.children[1].textContent) }));
})();
"""


def played(server: PageServer, ask: Ask, keys: list[str]) -> dict[str, Any]:
    """What the page shows after some keys."""
    script = ask("")[1].partition("<script nonce=")[2].partition(">")[2].partition("</script>")[0]
    head = f"const ADDRESS = {json.dumps(server.address)}, KEYS = {json.dumps(keys)};"
    program = "\n".join([head, DOCUMENT, script.replace('"use strict";', ""), PLAY])
    done = subprocess.run(["node", "-e", program], capture_output=True, text=True, check=True, timeout=60)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(shutil.which("node") is None, reason="no JavaScript engine")
def test_keys_on_the_page_judge_and_a_held_key_or_a_shortcut_does_not(server: PageServer, ask: Ask, tmp_path: Path) -> None:
    shown = played(server, ask, ["A", "B", "x", "a", "t", "u"])  # A is held, B comes with Ctrl
    assert shown["place"] == "2 of 3" and not shown["hidden"] and shown["asked"][0].startswith("<script>")
    assert [one.choice == one.shown[0] for one in read_judgements([str(tmp_path)])["ann"]] == [True]
    assert played(server, ask, ["s", "b"])["place"] == "everything is judged"


@pytest.mark.skipif(shutil.which("node") is None, reason="no JavaScript engine")
@pytest.mark.parametrize("server", [True], indirect=True)
def test_two_digits_on_the_page_score_the_first_and_the_second(server: PageServer, ask: Ask, tmp_path: Path) -> None:
    assert played(server, ask, ["9", "a", "4", "2"])["place"] == "2 of 3"
    (one,) = read_judgements([str(tmp_path)])["ann"]
    assert one.scores == ((4, 2) if one.shown == "ab" else (2, 4))
