"""The program as a person runs it: one whole experiment in processes of its own, on real sockets."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.experiments.analyse import load_evidence
from harness.records.store import Store
from tests.harness.program import config_file, critrate, exit_status, mock_pids

pytestmark = pytest.mark.live
INVALID = 13
TRIES = 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """An experiment whose load was what it claimed: where the machine was held up, critrate says so
    (exit status 13) and asks to repeat it."""
    for _ in range(TRIES):
        folder = tmp_path_factory.mktemp("experiment")
        done = critrate("run", config_file(folder), "--out", folder / "out")
        if done.returncode != INVALID:
            break
    assert done.returncode in (0, 11), done.stdout + done.stderr
    yield folder / "out", done.stdout
    assert mock_pids(folder) == []


def test_a_whole_experiment_measures_what_it_predicted(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    verdict = json.loads((folder / "verdict.json").read_text())
    assert verdict["outcome"] in ("confirmed", "inconclusive")
    assert verdict["ratio"]["value"] == pytest.approx(1.0, abs=0.1)
    assert verdict["binding_observed"] == "kv_cache"
    assert all(check["holds"] for check in verdict["audit"]), verdict["audit"]
    assert "predicted" in printed
    assert (folder / "report.html").stat().st_size > 50_000
    assert (folder / "report.md").exists()


def test_the_prediction_is_older_than_the_first_request(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    written = (folder / "prediction.json").stat().st_mtime
    assert all(written < p.stat().st_mtime for p in folder.glob("runs/*/requests.jsonl"))
    store = Store.open(folder)
    assert {store.read_run(r).prediction_digest for r in store.run_ids()} == {
        store.digest("prediction.json")
    }


def test_nothing_of_the_mock_stands_in_what_the_prediction_saw(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    limits = json.loads((folder / "limits.json").read_text())
    assert "max_num_seqs" in limits["shown"]["not_shown"]
    assert limits["shown"]["max_num_batched_tokens"] is None
    assert "b2_ns_per_kv_token" not in (folder / "prediction.json").read_text()


def test_analyse_and_report_work_again_from_the_folder_alone(
    finished: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    before = json.loads((copy / "verdict.json").read_text())
    for name in ("verdict.json", "report.html", "report.md"):
        (copy / name).unlink()
    assert exit_status(monkeypatch, "analyse", copy) == before["exit_code"], capsys.readouterr()
    assert json.loads((copy / "verdict.json").read_text()) == before
    assert exit_status(monkeypatch, "report", copy) == 0
    assert (copy / "report.html").exists() and (copy / "report.md").exists()
    # A prediction that was changed after the fact decides nothing.
    text = (copy / "prediction.json").read_text()
    (copy / "prediction.json").write_text(text.replace('"claim"', '"claim" ', 1))
    assert exit_status(monkeypatch, "analyse", copy) == 2
    assert "prediction.json" in capsys.readouterr().err


def test_what_befell_a_gpu_stands_under_the_run_that_it_qualifies(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    first, second = Store.open(copy).whole_runs()
    end = json.loads((copy / "runs" / second / "end.json").read_text())
    lost = {"t_ns": end["end_ns"] - 10**9, "gpu": 1, "kind": "lost", "text": "GPU is lost"}
    end["sampler"]["gpu_events"] = [lost]
    (copy / "runs" / second / "end.json").write_text(json.dumps(end))
    counted = [{"t_ns": end["end_ns"], "gpu": 0, "ecc_uncorrected": n} for n in (3, 4)]
    text = "".join(json.dumps(row) + "\n" for row in counted)
    (copy / "runs" / second / "gpu.jsonl").write_text(text)
    warnings = {r.frames.run.id: r.warnings for r in load_evidence(Store.open(copy)).runs}
    assert not [w for w in warnings[first] if "GPU" in w]
    assert [w[:14] for w in warnings[second] if "GPU" in w] == ["GPU 1 was lost", "GPU 0 counted "]


def test_a_finished_folder_is_not_overwritten(
    finished: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert exit_status(monkeypatch, "run", config_file(tmp_path), "--out", finished[0]) == 2
    assert "choose another name" in capsys.readouterr().err
