"""The pages fit together: links, navigation, and lists that must name everything that the sources have."""

import itertools
import json
import re
import statistics
import tomllib
from pathlib import Path

import pytest
from pages import ROOT, anchors, links, pages

import fastseq
from fastseq import ops
from fastseq.bench.cases import SUITES
from fastseq.training.options import train_parser

READ = re.compile(r"(?:getenv\(|environ(?:\.get\(|\[)|switch\(|setdefault\()\s*[\"']([A-Z_0-9]+)[\"']")
SWITCH = re.compile(r"(?<!-D)\b(FASTSEQ_[A-Z0-9_]+)(?==)")  # FASTSEQ_X=1 of a recipe or a sentence
SOURCES = (
    "fastseq/**/*.py",
    "csrc/**/*.cpp",
    "csrc/**/*.h",
    "csrc/**/*.cu*",
    "benchmarks/*.py",
    "setup.py",
    "build_support/*.py",
)
PAGE = ROOT / "docs/benchmarks.md"
MODES = ("inference", "training")
RECIPES = ("Makefile", ".ci/run", "README.md", "CONTRIBUTING.md", "docs/**/*.md")


def read(places: tuple[str, ...]) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for place in places for path in sorted(ROOT.glob(place)))


def unresolved(page: Path) -> list[str]:
    """Links of the page to no file, or to no heading of a page."""
    bad = []
    for link in links(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        known = target.suffix != ".md" or not anchor
        if not target.exists() or not (known or anchor in anchors(target.read_text(encoding="utf-8"))):
            bad.append(link)
    return bad


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert not unresolved(page)


def test_a_wrong_link_is_found(tmp_path):
    (tmp_path / "other.md").write_text("# One `thing`, two\n## Again\n## Again\n")
    page = tmp_path / "page.md"
    good = "[a](other.md) [b](other.md#one-thing-two) [c](other.md#again-1) [d](https://x.example) `[e](none)`\n"
    page.write_text(
        good + "[f](none.md) [g](other.md#two) ![h](none.png)\n\n```text\n[i](none.md)\n```\n# H\n[j](#h) [k](#i)\n"
    )
    assert unresolved(page) == ["none.md", "other.md#two", "none.png", "#i"]


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"[\w/-]+\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {str(path.relative_to(ROOT / "docs")) for path in ROOT.glob("docs/**/*.md")}


def test_the_environment_page_lists_every_variable():
    rows = set(re.findall(r"^\| `(\w+)", (ROOT / "docs/environment.md").read_text(), re.MULTILINE))
    used = set(READ.findall(read(SOURCES))) | set(SWITCH.findall(read(SOURCES) + read(RECIPES)))
    assert {"FASTSEQ_BACKEND", "FASTSEQ_CPU_ISA", "TORCH_CUDA_ARCH_LIST"} <= used  # the patterns still find them
    assert used - rows == set()
    assert {name for name in rows if name.startswith("FASTSEQ_")} <= used


def test_messages_quoted_in_troubleshooting_are_those_of_the_sources():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    quoted = [
        text for text in re.findall(r'"([^"\n]+)"', re.sub(r"^```.*?^```", "", page, flags=re.S | re.M)) if " " in text
    ]
    sources = read(SOURCES).lower()
    assert len(quoted) >= 5
    assert [text for text in quoted if text.lower() not in sources] == []


def test_the_api_pages_list_every_public_name():
    text = read(("docs/api/*.md",))
    listed = set(re.findall(r"^(?::::|  +heading:) (.+)$", text, re.MULTILINE))
    public = {f"fastseq.{name}" for name in fastseq.__all__ if name != "ops"}
    public |= {f"fastseq.ops.{name}" for name in ops.__all__}
    assert public <= listed


def test_the_documentation_extra_is_what_the_makefile_installs():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["docs"]
    recipe = re.search(r"^\$\(DOCS_READY\):.*\n\t(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert re.findall(r'"([^"]+)"', recipe) == wanted


def test_the_guide_names_options_that_exist():
    options = train_parser().get_defaults()
    named = re.findall(r"`(?:--)?((?:data|model|optim|trainer)\.\w+)`", (ROOT / "docs/seq2seq.md").read_text())
    assert len(named) > 10
    assert [name for name in named if name not in options] == []


def test_the_guide_states_the_defaults():
    options = train_parser().get_defaults()
    guide = (ROOT / "docs/seq2seq.md").read_text()
    table = re.findall(r"^\| (`(?:data|model|optim|trainer)\.\w+`.*?) \| (.+?) \|", guide, re.MULTILINE)
    assert len(table) > 8
    for names, stated in table:
        values = [str(options[name]).lower() for name in re.findall(r"`([\w.]+)`", names)]
        assert stated.split(", ") in (values, values[:1] if len(set(values)) == 1 else None), names


def results(threads: str) -> dict[tuple[str, str], dict]:
    rows = json.loads((ROOT / f"benchmarks/results/cpu-zen4-{threads}.json").read_text())["rows"]
    return {(row["case"], row["mode"]): row for row in rows if row["candidate"] == "auto"}


def test_the_figures_are_those_of_the_result_files():
    one, two = results("1thread"), results("2threads")
    table = re.findall(
        r"^\| (.+?) \| (\d.*?) \| (\d.*?) \| (.+?) \| (.+?) \|$",
        PAGE.read_text().partition("### Whole models")[0],
        re.MULTILINE,
    )
    assert {row[0] for row in table} == {case for case, _ in one}
    for case, *ratios, baseline, served in table:
        measured = [f"{one[case, mode]['ratio']:.2f} / {two[case, mode]['ratio']:.2f}" for mode in MODES]
        backends = [one[case, mode]["served_by"] for mode in MODES]
        each = ", ".join(f"{name} ({mode})" for name, mode in zip(backends, MODES, strict=True))
        assert (ratios, baseline) == (measured, one[case, MODES[0]]["baseline"]), case
        assert served == (backends[0] if len(set(backends)) == 1 else each), case


def test_the_whole_models_are_those_of_the_result_files():
    measured = {}
    for size, vectors in itertools.product(("translation", "long"), ("", "-avx2")):
        rows = json.loads((ROOT / f"benchmarks/results/seq2seq-{size}-xeon{vectors}-1thread.json").read_text())["rows"]
        for row in rows:
            if row["candidate"] == "fastseq":
                measured.setdefault(row["case"], {}).setdefault(row["mode"], []).append(f"{row['ratio']:.2f}")
    table = {cells[0]: cells[1:] for cells in (line.split(" | ") for line in PAGE.read_text().splitlines())}
    assert len(measured) == 4
    for case, modes in measured.items():
        assert table[f"| {case}"] == [*(" / ".join(pair) for pair in list(modes.values())[:-1]), table[f"| {case}"][-1]]
        assert table[f"| {case}"][-1] == " / ".join(list(modes.values())[-1]) + " |"


@pytest.mark.parametrize(
    ("file", "start"),
    [("amx-2threads", "AVX-512, AMX | 2"), ("avx2-2threads", "AVX2 | 2"), ("avx2-1thread", "AVX2 | 1")],
)
def test_the_grid_is_that_of_the_result_files(file, start):
    rows = json.loads((ROOT / f"benchmarks/results/auto-grid-xeon-{file}.json").read_text())["rows"]
    ratios = {}
    for row in rows:
        if row["candidate"] == "auto":
            ratios.setdefault((row["group"], row["mode"]), []).append(row["ratio"])
    means = {group: f"{statistics.geometric_mean(values):.2f}" for group, values in ratios.items()}
    dtypes = [" / ".join(means[f"grid {dtype}", mode] for mode in MODES) for dtype in ("float32", "bfloat16")]
    assert f"| {start} | {sum(map(len, ratios.values()))} | {' | '.join(dtypes)} |" in PAGE.read_text()


def test_the_other_engines_are_those_of_the_result_files():
    page, measured = PAGE.read_text(), {}
    for vectors in ("avx512", "avx2"):
        path = ROOT / f"benchmarks/results/alternatives-xeon-{vectors}-1thread.json"
        for row in json.loads(path.read_text())["rows"]:
            if row["over"] and row["candidate"] != "nn.LSTM":
                _, batch, hidden, _ = re.findall(r"\d+", row["case"])
                cells = measured.setdefault(f"{batch}, {hidden}", {})
                cells.setdefault(row["candidate"], []).append(f"{row['ratio']:.2f}")
    assert len(measured) == 6
    for case, engines in measured.items():
        assert f"| {case} | " + " | ".join(" / ".join(pair) for pair in engines.values()) + " |" in page


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_table_of_the_readme_holds_measured_ratios(page):
    """Its rows are the suite "headline"; the columns are two files of benchmarks/results, one thread each."""
    rows = re.findall(r"^\| (\w+ \([^|]*) \| ([^|]*) \|((?: [\d.]+ \|){4})$", (ROOT / page).read_text(), re.MULTILINE)
    assert [case for case, *_ in rows] == [case.name for case in SUITES["headline"][0]]
    results = [
        json.loads((ROOT / f"benchmarks/results/headline-xeon-{name}1thread.json").read_text())
        for name in ("", "avx2-")
    ]
    for case, baseline, figures in rows:
        measured = [r for result in results for r in result["rows"] if (r["case"], r["candidate"]) == (case, "auto")]
        assert [r["mode"] for r in measured] == ["inference", "training"] * 2
        assert re.findall(r"[\d.]+", figures) == [f"{r['ratio']:.2f}" for r in measured]
        assert baseline.removesuffix(" attention") == measured[0]["baseline"]


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_whole_models_of_the_readme_hold_measured_means(page):
    """Geometric means of the four models of G2P size, by instruction set."""
    rows = re.findall(r"^\| (AVX\S+) \|((?: [\d.]+ \|){4})$", (ROOT / page).read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == ["AVX-512", "AVX2"]
    for (_, figures), name in zip(rows, ("", "-avx2"), strict=True):
        result = json.loads((ROOT / f"benchmarks/results/seq2seq-g2p-xeon{name}-1thread.json").read_text())
        ratios = {}
        for row in result["rows"]:
            if row["candidate"] == "fastseq":
                ratios.setdefault(row["mode"], []).append(row["ratio"])
        assert [len(several) for several in ratios.values()] == [4] * 4
        assert re.findall(r"[\d.]+", figures) == [f"{statistics.geometric_mean(r):.2f}" for r in ratios.values()]
