"""The load generators of the bench: how each is installed and what command offers one load.

All get the same load: {count} requests at {rate} per second, 16 prompt tokens, {tokens} output tokens,
one worker process where their number can be set, caps on what is in flight lifted.
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from engines.environments import Environment, Package, cache_folder, environment

SCRIPTS = Path(__file__).resolve().parents[2]
LISTS = SCRIPTS / "load_clients"
HERE = Path(__file__).resolve().parent
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
PROMPT_TOKENS = 16

OWN = "python {here}/SCRIPT {url} {rate} {seconds} {seed} {tokens} {records}"
VLLM = """
    vllm bench serve --backend vllm --base-url {url} --model sink --tokenizer {tokenizer}
        --dataset-name random --random-input-len 16 --random-output-len {tokens} --ignore-eos
        --num-prompts {count} --request-rate {rate} --seed {seed} --disable-tqdm
"""
SGLANG = """
    python -m sglang.bench_serving --backend vllm --base-url {url} --model sink
        --tokenizer {tokenizer} --dataset-name random-ids --random-range-ratio 1.0
        --random-input-len 16 --random-output-len {tokens} --num-prompts {count}
        --request-rate {rate} --seed {seed} --warmup-requests 0 --disable-tqdm
        --output-file {folder}/report.json
"""
GUIDELLM = """
    guidellm run --backend kind=openai_http,target={url},request_format=/v1/completions
        --tokenizer kind=huggingface_auto,model={tokenizer}
        --data kind=synthetic_text,prompt_tokens=16,output_tokens={tokens}
        --profile kind=poisson,rate={rate} --constraint kind=max_requests,count={count}
        --output kind=json,path={folder}/report.json --disable-console-interactive
"""
AIPERF = """
    aiperf profile --model sink --url {url} --endpoint-type completions --streaming
        --request-rate {rate} --request-rate-mode poisson --request-count {count}
        --isl 16 --osl {tokens} --extra-inputs ignore_eos:true --tokenizer {tokenizer}
        --random-seed {seed} --ui none --no-gpu-telemetry --no-server-metrics
        --workers-max 1 --artifact-dir {folder}/report
"""
INFERENCE_PERF = "inference-perf --config_file {folder}/config.yml"


@dataclass(frozen=True)
class Client:
    """A load generator. ``exact``: it notes the schedule that it drew. ``first_rate``: where the search
    for its limit begins. ``lean``: critrate's own protocol, which is to be on time."""

    name: str
    command: str
    first_rate: float
    package: Package | None = None
    cores: int = 1
    exact: bool = False
    lean: bool = False
    environ: dict[str, str] = field(default_factory=dict)

    def installed(self) -> Environment:
        """Its environment, made on first use. Raises CannotRun."""
        if self.package is None:
            paths = Path(f"{SCRIPTS.parent}:{SCRIPTS / 'bench'}")
            return Environment(Path(sys.executable).parent, paths, "")
        folder = cache_folder() / "clients" / f"{self.package.name}-{self.package.version}"
        variable = f"CRITRATE_CLIENT_{self.package.name.upper().replace('-', '_')}"
        return environment(self.package, folder, variable)


@dataclass(frozen=True)
class Load:
    """One load to be offered to the sink at ``url``; the client may write into ``folder``."""

    url: str
    rate: float
    seconds: float
    seed: int
    tokens: int
    folder: Path
    tokenizer: Path
    streams: int = 1
    """Seeds side by side, each at ``rate``; critrate's clients alone can."""

    @property
    def count(self) -> int:
        return round(self.streams * self.rate * self.seconds)

    @property
    def records(self) -> Path:
        return self.folder / "noted.bin"


def argv(client: Client, load: Load) -> list[str]:
    """The client's command for this load, with the files that it reads."""
    if client.name == "inference-perf":
        (load.folder / "config.yml").write_text(json.dumps(inference_perf_config(load)))
    words = client.command.format(
        here=HERE,
        url=load.url,
        rate=f"{load.rate:g}",
        seconds=f"{load.seconds:g}",
        seed=load.seed,
        tokens=load.tokens,
        records=load.records,
        count=load.count,
        tokenizer=load.tokenizer,
        folder=load.folder,
    )
    return shlex.split(words) + (["--streams", f"{load.streams}"] if load.streams > 1 else [])


def inference_perf_config(load: Load) -> dict[str, object]:
    def fixed(tokens: int) -> dict[str, object]:
        shape = {"mean": tokens, "std_dev": 0, "min": tokens, "max": tokens}
        return {**shape, "total_count": load.count}

    return {
        "api": {"type": "completion", "streaming": True},
        "data": {
            "type": "random",
            "input_distribution": fixed(PROMPT_TOKENS),
            "output_distribution": fixed(load.tokens),
        },
        "load": {
            "type": "poisson",
            "stages": [{"rate": load.rate, "duration": round(load.seconds)}],
            "num_workers": 1,
            "worker_max_concurrency": 100_000,
            "worker_max_tcp_connections": 100_000,
            "base_seed": load.seed,
        },
        "server": {
            "type": "vllm",
            "model_name": "sink",
            "base_url": load.url,
            "ignore_eos": True,
        },
        "tokenizer": {"pretrained_model_name_or_path": str(load.tokenizer)},
        "storage": {"local_storage": {"path": str(load.folder / "report")}},
    }


def own(name: str, script: str, first_rate: float, cores: int = 1) -> Client:
    command = OWN.replace("SCRIPT", script)
    lean = "lean" in script or "--ray" in script
    return Client(name, command, first_rate, cores=cores, exact=True, lean=lean)


CLIENTS = {
    client.name: client
    for client in (
        own("critrate", "ours.py --transport lean", 1000),
        own("critrate, 2 workers", "ours.py --transport lean --workers 2", 1000, cores=2),
        own("critrate, 2 Ray actors", "ours.py --ray 2", 500, cores=2),
        own("critrate on aiohttp", "ours.py --transport aiohttp", 400),
        own("bare protocol", "bare_protocol.py", 1500),
        own("bare aiohttp", "bare_aiohttp.py", 400),
        Client(
            "vllm bench serve",
            VLLM,
            300,
            Package("vllm", "0.32.0", 600, 2200, 3, LISTS / "vllm.txt"),
        ),
        Client(
            "sglang.bench_serving",
            SGLANG,
            200,
            Package(
                "sglang",
                "0.5.23",
                670,
                2800,
                3,
                LISTS / "sglang.txt",
                python_path=SCRIPTS / "engines" / "sglang_shims",
            ),
        ),
        Client(
            "guidellm",
            GUIDELLM,
            80,
            Package("guidellm", "0.8.1", 330, 1600, 3, LISTS / "guidellm.txt"),
            environ={"GUIDELLM__MAX_WORKER_PROCESSES": "1", "GUIDELLM__MAX_CONCURRENCY": "100000"},
        ),
        Client(
            "aiperf",
            AIPERF,
            150,
            Package("aiperf", "0.13.0", 250, 860, 3, LISTS / "aiperf.txt"),
            # Told to stay offline, it takes a folder for the name of a repository.
            environ={"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": ""},
        ),
        Client(
            "inference-perf",
            INFERENCE_PERF,
            200,
            Package(
                "inference-perf",
                "0.7.0",
                200,
                640,
                3,
                LISTS / "inference-perf.txt",
                python="python3.12",
            ),
        ),
    )
}
