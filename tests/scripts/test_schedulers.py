"""The schedulers' files: each by its own checker where that is installed, and by what they must say."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.scripts.program import script

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "configs" / "schedulers"
INSTALLED = "/opt/critrate"
CONFIG = "configs/h100_llama3_8b_vllm.yaml"
"""What every file measures."""


def checker(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed here")
    return path


def checked(*command: object, **options: Any) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=60, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FILES / name).read_text()))


def test_every_file_calls_the_program_as_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, asked = script("nightly"), []

    def stop(configs: list[Path], *rest: object) -> None:
        asked.append(configs)
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "run_night", stop)
    texts = {path.name: path.read_text() for path in FILES.iterdir() if path.suffix != ".timer"}
    for name, text in texts.items():
        # YAML's list and the shell's continued line as one line of words.
        flat = re.sub(r"\\\n|\n\s*- (?=configs/|--)", " ", text)
        (call,) = re.findall(rf"scripts/nightly ({CONFIG}[^\n>&]*)", flat)
        own = ["--history", str(tmp_path / "h.sqlite"), "--out", str(tmp_path / name)]
        with pytest.raises(KeyboardInterrupt):
            program.main([*shlex.split(call), *own])
    assert asked == [[Path(CONFIG)]] * 5
    assert (ROOT / CONFIG).exists()


def test_systemd_takes_the_service_and_the_timer(tmp_path: Path) -> None:
    tool = checker("systemd-analyze")
    for path in FILES.glob("critrate-nightly.*"):
        (tmp_path / path.name).write_text(path.read_text().replace(INSTALLED, str(ROOT)))
    units = sorted(tmp_path.iterdir())
    assert [unit.suffix for unit in units] == [".service", ".timer"]
    said = checked(tool, "verify", "--man=no", *units)
    assert not [line for line in said.splitlines() if "critrate-nightly" in line]


def test_the_batch_job_is_a_shell_script_with_slurms_options() -> None:
    path = FILES / "nightly.sbatch"
    checked(checker("bash"), "-n", path)
    options = re.findall(r"^#SBATCH (--[a-z-]+)=?(.*)$", path.read_text(), re.MULTILINE)
    assert dict(options)["--signal"] == "B:TERM@300"
    assert {name for name, _ in options} <= {
        *("--job-name", "--nodes", "--ntasks", "--gpus-per-node", "--cpus-per-task"),
        *("--exclusive", "--time", "--signal", "--output"),
    }


def test_slurm_takes_the_batch_job() -> None:
    checked(checker("sbatch"), "--test-only", FILES / "nightly.sbatch", "--once")


def test_kubectl_knows_every_field_of_the_cron_job(tmp_path: Path) -> None:
    tool = checker("kubectl")
    claim, job = documents("kubernetes-cronjob.yaml")
    assert (claim["kind"], job["kind"]) == ("PersistentVolumeClaim", "CronJob")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    # Without a cluster: what its own types do not know falls away in reading.
    read = checked(tool, "set", "env", "--local", "-f", tmp_path / "job.yaml", "A=1", "-o", "json")
    lost = list(differences(job, json.loads(read)))
    assert lost == []


def differences(wanted: Any, found: Any, where: str = "") -> Any:
    """Paths at which something wanted is missing or another."""
    if isinstance(wanted, dict):
        for key, value in wanted.items():
            if not isinstance(found, dict) or key not in found:
                yield f"{where}.{key}"
            else:
                yield from differences(value, found[key], f"{where}.{key}")
    elif isinstance(wanted, list) and isinstance(found, list) and len(wanted) <= len(found):
        for i, value in enumerate(wanted):
            yield from differences(value, found[i], f"{where}[{i}]")
    elif wanted != found:
        yield where


def test_the_cron_job_keeps_its_history_and_hides_no_regression() -> None:
    claim, job = documents("kubernetes-cronjob.yaml")
    spec = job["spec"]["jobTemplate"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert f"--history={mounts['results']}/history.sqlite" in container["command"]
    assert spec["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert job["spec"]["concurrencyPolicy"] == "Forbid"


def test_the_workflow_passes_actionlint(tmp_path: Path) -> None:
    checked(checker("actionlint"), "-config-file", lint_config(tmp_path), FILES / WORKFLOW)


def test_the_workflow_follows_the_schema_of_workflows() -> None:
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed here")
    schema = ("--builtin-schema", "vendor.github-workflows")
    checked(sys.executable, "-m", "check_jsonschema", *schema, FILES / WORKFLOW)


WORKFLOW = "github-actions.yaml"


def lint_config(folder: Path) -> Path:
    """Labels of runners of one's own are told to actionlint."""
    path = folder / "actionlint.yaml"
    path.write_text("self-hosted-runner: {labels: [gpu]}\n")
    return path


def test_the_workflow_runs_on_ones_own_runner_and_shows_the_page_after_a_regression() -> None:
    (workflow,) = documents(WORKFLOW)
    # YAML 1.1 reads the key "on" as true.
    assert workflow[True]["schedule"] == [{"cron": "0 2 * * *"}]
    job = workflow["jobs"]["nightly"]
    assert job["runs-on"][0] == "self-hosted"
    for step in job["steps"]:
        assert ("uses" in step) != ("run" in step)
        if "run" in step:
            checked("sh", "-n", input=step["run"])
    *_, measure, show, keep = job["steps"]
    assert "if" not in measure
    assert show["if"] == keep["if"] == "always()"


def test_cron_gets_five_fields_and_a_command_that_the_shell_reads() -> None:
    lines = [
        line
        for line in (FILES / "crontab").read_text().splitlines()
        if line and line[0] != "#" and not re.match(r"[A-Z]+=", line)
    ]
    (line,) = lines
    *fields, command = line.split(None, 5)
    assert fields == ["0", "2", "*", "*", "*"]
    # A per cent sign ends the command for cron.
    assert "%" not in command
    checked("sh", "-n", input=command)
