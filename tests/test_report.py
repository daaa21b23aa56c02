"""`packager report`: one page from receipts, which makes no request whatever they hold, and the same as JSON."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from packager.card.report import LEVELS, level_of, place_of_linear, report_page, report_values
from packager.cli.main import app
from packager.receipt import ExpertLinearRecord, FloorRecord, LinearRecord, LoaderRecord, LoaderRunRecord, Receipt
from packager.records import TaskDocuments, TaskRecord
from tests import card_fixtures as fixtures
from tests import tiny_recipe
from tests.test_card_width import BROWSER
from tests.tiny_recipe import Builds

SECTIONS = ["variants", "quality", "tasks", "loss", "loaders", "experts", "stages", "changes", "digests"]
LEAK = "report-leak.example"
HOSTILE = (
    f"</style></title><script src='https://{LEAK}/a.js'></script><img src=\"https://{LEAK}/b.png\" onerror=alert(1)>"
    f"<link rel=stylesheet href=//{LEAK}/c.css>{{{{ 7 * 7 }}}}\u202e"
)


def task(name: str, hostile: str, **scores: float | None) -> TaskRecord:
    """Return an invented record of 400 documents; a score that is not given is not known."""
    known = {key: scores.get(key) for key in ("score_error", "base_error", "recovery", "recovery_error")}
    return TaskRecord(
        name=f"{name}{hostile}",
        metric=f"acc{hostile}",
        filter="none",
        definition_sha256="",
        documents=TaskDocuments(source=f"nobody/{name}{hostile}", sha256=("0" * 64,)),
        examples=None,
        num_fewshot=5,
        num_documents=400,
        limit=400,
        chat=True,
        score=scores["score"] or 0.0,
        base_score=scores["base_score"] or 0.0,
        device=f"cpu{hostile}",
        dtype="float32",
        base_dtype="float32",
        kernel=f"TorchLinear{hostile}",
        versions={f"lm-eval{hostile}": "0.4.13"},
        **known,
    )


def receipts(*, hostile: str = "") -> list[Receipt]:
    """Return the receipts of a release with 40 blocks, one of which lost most; `hostile` is put into every text.

    Tasks were measured on the first two branches, the second one on main alone.
    """
    made = []
    for number, provenance in enumerate(fixtures.llama_receipts(fixtures.llama_recipe())):
        linears = [
            LinearRecord(
                name=f"model.layers.{block}.{module}{hostile}",
                loss=1e-4 * (block + 1) * (1000 if (block, module) == (2, "mlp.down_proj") else 1) / (number + 1),
                damp_percent=0.01,
            )
            for block in range(40)
            for module in ("self_attn.q_proj", "mlp.down_proj")
        ]
        experts = [
            ExpertLinearRecord(
                name=f"model.layers.7.mlp.experts.{expert}.up_proj", loss=1e-3, damp_percent=0.01, tokens=100 * expert,
                rho=1.0 if expert == 0 else 0.4,
            )
            for expert in range(3)
        ]  # fmt: skip
        loaders = (
            *provenance.loaders,
            LoaderRecord(loader=f"vllm-cpu{hostile}", required=False, status="failed", reason=f"it failed{hostile}"),
        )
        birds = task(
            "birds", hostile, score=0.61 + number / 100, score_error=0.024, base_score=0.65, base_error=0.023,
            recovery=0.9385, recovery_error=0.0071,
        )  # fmt: skip
        nests = task("nests", hostile, score=0.0, base_score=0.0)
        changed: dict[str, Any] = {
            "tasks": ((birds, nests), (birds,), (), ())[number],
            "linears": (*linears, *experts),
            "loaders": loaders,
            "not_quantized": {f"mlp.gate{hostile}": f"a router{hostile}"},
            "device": f"cpu{hostile}",
            "floor": FloorRecord(max_kl=0.015, missed=True, published_below=True),
        }
        made.append(
            Receipt(
                provenance=provenance.model_copy(update=changed),
                stages={},
                seconds={"quantize": 61.25, "pack": 2.0, f"evaluate{hostile}": 12.5},
                peak_memory_bytes=3_000_000_000,
                runs=(
                    LoaderRunRecord(
                        loader=f"onnxruntime{hostile}",
                        device=f"cpu{hostile}",
                        load_s=4.0,
                        forward_s=2.0,
                        num_tokens=512,
                        seq_len=64,
                        peak_memory_bytes=7_100_000_000,
                        beside=3,
                    ),
                ),
            )
        )
    return made


def changes(hostile: str = "") -> list[dict[str, Any]]:
    value = {"key": f"versions.torch{hostile}", "published": f"2.1{hostile}", "built": "2.2"}
    common = {"why": hostile, "weights_differ": True, "files": [f"config.json{hostile}"], "loaders": [], "quality": []}
    return [{"branch": "main", "standing": "changed", "values": [value], **common}]


class Page(HTMLParser):
    """The elements of a page, their ids, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.sections: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.sections += [value or "" for name, value in attrs if tag == "section" and name == "id"]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_has_everything_that_the_values_have() -> None:
    values = report_values(receipts(), changes())
    page = Page(report_page(values))
    assert page.sections == SECTIONS
    for words in (
        "0.0234 ± 0.0011", "+2.855 ± 0.057 %", "171 of 200", "misses the floor",
        "published by choice", "vllm-cpu", "it failed", "61.2",
        "3.00 GB", "7.10 GB", "512 in rows of 64", "Decoding is timed", "not measured",
        "versions.torch", "2.2", fixtures.fixture_sha256("weights main"), "mlp.experts.*.up_proj",
        "a router", "model.layers.2.mlp.down_proj",
    ):  # fmt: skip
        assert words in page.text.replace("\u00a0", " "), words
    assert values["loss"]["maps"][0]["worst"][0]["name"] == "model.layers.2.mlp.down_proj"
    (row,) = [row for row in values["loss"]["maps"][0]["rows"] if row["module"] == "mlp.down_proj"]
    assert row["losses"][2] == pytest.approx(0.3)
    assert [each["loader_runs"][0]["forward_tokens_per_s"] for each in values["stages"]] == [256.0] * 4
    assert [each["loader_runs"][0]["decode_tokens_per_s"] for each in values["stages"]] == [None] * 4
    assert values["experts"][0]["blocks"] == [
        {"block": 7, "linears": 3, "least": 0, "median": 100, "most": 200, "few": 1, "unseen": 1}
    ]
    assert json.loads(json.dumps(values, allow_nan=False)) == values


def test_tasks_have_their_scores_with_errors_on_each_branch() -> None:
    values = report_values(receipts())
    page = report_page(values)
    section = Page(page[page.index('<section id="tasks">') : page.index('<section id="loss">')]).text
    rows = [line for line in section.replace("\u00a0", " ").split("\n") if "gptq-" in line or "main" in line]
    assert rows == [
        "birdsmain61.0 ± 4.8 %65.0 ± 4.6 %93.8 ± 1.4 %acc, chat template400 (a limit)5float32 on cpu, TorchLinear",
        "gptq-4bit-32g-actorder_True62.0 ± 4.8 %65.0 ± 4.6 %93.8 ± 1.4 %"
        "acc, chat template400 (a limit)5float32 on cpu, TorchLinear",
        "gptq-4bit-64g-actorder_Truenot measured",
        "gptq-4bit-128g-actorder_Truenot measured",
        "nestsmain0.00 %0.00 %none: fp16 scores 0acc, chat template400 (a limit)5float32 on cpu, TorchLinear",
        "gptq-4bit-32g-actorder_Truenot measured",
        "gptq-4bit-64g-actorder_Truenot measured",
        "gptq-4bit-128g-actorder_Truenot measured",
    ]
    birds, nests = values["tasks"]
    assert birds["scores"][1]["record"]["score"] == {"value": 0.62, "standard_error": 0.024}
    assert birds["scores"][0]["record"]["documents"]["source"] == "nobody/birds"
    assert nests["scores"][0]["record"]["recovery"] == {"value": None, "standard_error": None}
    assert [each["record"] for each in nests["scores"][1:]] == [None] * 3


def test_a_report_without_tasks_says_so() -> None:
    made = [
        each.model_copy(update={"provenance": each.provenance.model_copy(update={"tasks": ()})}) for each in receipts()
    ]
    values = report_values(made)
    assert values["tasks"] == []
    assert "names no task, or none was measured" in report_page(values)


def test_a_report_that_was_not_compared_says_so() -> None:
    page = Page(report_page(report_values(receipts())))
    assert "Not compared" in page.text
    assert page.sections == SECTIONS


def test_figures_that_are_no_numbers_are_said_to_be_none() -> None:
    (first, *_) = receipts()
    quality = first.provenance.quality
    assert quality is not None
    broken = first.provenance.model_copy(
        update={
            "quality": quality.model_copy(update={"perplexity": float("inf"), "kl_divergence": float("nan")}),
            "linears": (LinearRecord(name="a.0.b", loss=float("nan"), damp_percent=0.01),),
        }
    )
    values = report_values([first.model_copy(update={"provenance": broken})])
    assert values["variants"][0]["quality"]["kl_divergence"]["value"] is None
    assert "not known" in report_page(values)
    assert "No linear has a loss" in report_page(values)


@pytest.mark.parametrize(
    ("loss", "level"), [(1.0, 0), (1.99, 0), (2.1, 1), (512.0, LEVELS - 1), (None, None), (0.5, None)]
)
def test_a_loss_has_the_colour_of_its_order_of_magnitude(loss: float | None, level: int | None) -> None:
    assert level_of(loss, 1.0, 512.0) == level
    assert level_of(1.0, 1.0, 1.0) == 0


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.12.mlp.up_proj", (12, "mlp.up_proj")),
        ("transformer.h.0.attn.1.proj", (0, "attn.1.proj")),
        ("head", None),
        (f"model.layers.{'9' * 5000}.x", None),
    ],
)
def test_the_place_of_a_linear_is_read_from_its_name(name: str, place: tuple[int, str] | None) -> None:
    assert place_of_linear(LinearRecord(name=name, loss=1.0, damp_percent=0.01)) == place


def test_hostile_texts_stay_texts() -> None:
    page = report_page(report_values(receipts(hostile=HOSTILE), changes(HOSTILE)))
    read = Page(page)
    assert not {"script", "img", "link", "iframe", "object", "form", "a"} & set(read.tags)
    assert not [name for name, _ in read.attributes if name.startswith("on") or name in ("src", "href", "style")]
    assert "{{ 7 * 7 }}" in read.text
    assert "\u202e" not in page
    (policy,) = [value for _, value in read.attributes if value.startswith("default-src")]
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["report", *words], prog_name="packager")


def test_a_build_is_reported_by_its_recipe_and_by_its_folder(tmp_path: Path, builds: Builds) -> None:
    recipe, dist = builds.copy(tmp_path, published=True), tmp_path / "dist"
    result = run(str(recipe), "--dist", str(dist))
    assert result.exit_code == 0, result.stderr
    path = dist / "reports" / f"{tiny_recipe.REPOSITORY}.html"
    assert result.stdout == f"{path}\n"
    page = Page(path.read_text())
    assert page.sections == SECTIONS
    by_recipe = json.loads(run(str(recipe), "--dist", str(dist), "--format", "json").stdout)
    assert [each["standing"] for each in by_recipe["changes"]] == ["same"] * len(tiny_recipe.BRANCHES)
    shutil.rmtree(tmp_path / "model")
    folder = dist / "receipts" / tiny_recipe.REPOSITORY
    by_folder = json.loads(run(str(folder), "--format", "json").stdout)
    assert by_folder["changes"] is None
    assert {each["branch"] for each in by_folder["variants"]} == set(tiny_recipe.BRANCHES)
    assert run(str(dist / "hub")).exit_code == 10
    (folder / "main.json").write_text("{}")
    assert run(str(folder)).exit_code == 11


@pytest.mark.parametrize(
    ("words", "what"),
    [(["--format", "json", "--open"], "writes no page"), (["--published"], "names no published repository")],
)
def test_a_wrong_question_is_refused(tmp_path: Path, words: list[str], what: str) -> None:
    result = run(str(tmp_path), *words)
    assert (result.exit_code, what in result.stderr) == (2, True)


MEASURE = """<script>
const all = [...document.querySelectorAll("section")];
const sections = all.map((each) => [each.id, each.getBoundingClientRect().height]);
const wide = [...document.querySelectorAll("section > p, h1, h2, h3")].filter((each) => each.scrollWidth > innerWidth);
document.title = JSON.stringify([innerWidth, document.documentElement.scrollWidth, wide.length, sections,
  getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector(".h8")).backgroundColor]);
</script>"""


def chromium(page: str, folder: Path, *options: str, width: int = 800) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    (folder / "report.html").write_text(page, encoding="utf-8")
    quiet = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
    command = [BROWSER, "--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={width},1200", *quiet]
    command += [f"--user-data-dir={folder / 'profile'}", *options, (folder / "report.html").as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is on the PATH")
@pytest.mark.parametrize("width", [800, 1280])
@pytest.mark.parametrize(("scheme", "background"), [(1, "rgb(255, 255, 255)"), (0, "rgb(13, 17, 23)")])
def test_every_section_is_seen_in_a_browser(width: int, scheme: int, background: str, tmp_path: Path) -> None:
    page = report_page(report_values(receipts(hostile=HOSTILE), changes(HOSTILE)))
    page = page.replace("</body>", f"{MEASURE}</body>").replace("style-src", "script-src 'unsafe-inline'; style-src", 1)
    colours = f"--blink-settings=preferredColorScheme={scheme}"
    shown = chromium(page, tmp_path, "--dump-dom", colours, width=width).stdout
    (title,) = re.findall(r"<title>(\[.*?\])</title>", shown, re.DOTALL)
    seen, whole, wide, sections, own, darkest = json.loads(title.replace("&amp;", "&"))
    assert (seen, whole, wide) == (width, width, 0), "nothing is wider than the window but what scrolls"
    assert [name for name, _ in sections] == SECTIONS
    assert all(height > 40 for _, height in sections)
    assert own == background
    assert darkest not in (own, "rgba(0, 0, 0, 0)"), "the policy lets the page's own style in"


def requests_and_messages(page: str, folder: Path) -> tuple[list[str], list[str]]:
    """Return the addresses that a browser asks for on a page, and the messages of its console."""
    log = folder / "net.json"
    done = chromium(page, folder, f"--log-net-log={log}", "--enable-logging=stderr", "--dump-dom")
    addresses = re.findall(r'"url":"([^"]+)"', log.read_text(encoding="utf-8"))
    messages = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return [each for each in addresses if LEAK in each], messages


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is on the PATH")
def test_no_request_leaves_the_page_and_its_console_is_empty(tmp_path: Path) -> None:
    page = report_page(report_values(receipts(hostile=HOSTILE), changes(HOSTILE)))
    assert requests_and_messages(page, tmp_path) == ([], [])
    image = f'<img src="https://{LEAK}/control.png"></body>'
    refused = page.replace("</body>", image)
    requests, messages = requests_and_messages(refused, tmp_path)
    assert requests == []
    assert len(messages) == 1, "the policy refuses it"
    open_page = re.sub(r"default-src[^\"]*", "default-src *", refused)
    assert requests_and_messages(open_page, tmp_path)[0], "the log would show a request"
