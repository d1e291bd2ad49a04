"""What to deploy, in each form that people deploy in: one configuration and one command line, written in six ways.

No form holds a secret: VLLM_API_KEY and HF_TOKEN come from the environment, a Kubernetes Secret or a file of systemd's.
Every form hands the server the same arguments as the trial's own command.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from packaging.version import InvalidVersion, Version
from pydantic import JsonValue

from varcas.errors import InputError, nearest
from varcas.experiment import Experiment
from varcas.records import TrialRow
from varcas.report import RANDOM_WEIGHTS, Recommendation, find, has_random_weights, recommend, row_to_deploy
from varcas.space import SERVER_MODULE, ServingConfig, flag_word, server_python

PORT = 8000
SECRETS = ("HF_TOKEN", "VLLM_API_KEY")
"""Variables that a server may need and no file may hold."""
GPU_IMAGE = "vllm/vllm-openai"
CPU_IMAGE = "public.ecr.aws/q9t5s3a7/vllm-cpu-release-repo"
"""vLLM's own images, tagged `vVERSION` (docs.vllm.ai, *Using Docker* and *CPU*)."""
HUB_CACHE = "/root/.cache/huggingface"
START_MARGIN = 5.0
"""A start may take so many times the measured one, since it may have to fetch the model first."""
LEAST_START_S = 600.0
PROBE_S = 10
SIMULATED = "SIMULATED: no server was measured"


@dataclass(frozen=True, slots=True)
class Deployment:
    """One configuration to deploy, and where it comes from.

    Attributes:
        role: names its files: `optimized`, `trial_7`, a phase; empty for the baseline.
        study: it was found in.
        number: of its trial.
        config: the flags.
        python: absolute path of the Python that measured it.
        env: environment variables of the server; never a secret.
        comments: lines for a file's head.
        engine_version: of the vLLM that measured it.
        gpu_name: as NVML names it; None on a CPU.
        num_gpus: that the server takes; 0 on a CPU.
        start_s: measured seconds from spawn to the first completion; None without a measurement.
        simulated: no server was measured.
    """

    role: str
    study: str
    number: int
    config: ServingConfig
    python: str
    env: Mapping[str, str]
    comments: tuple[str, ...]
    engine_version: str | None
    gpu_name: str | None
    num_gpus: int
    start_s: float | None
    simulated: bool

    @property
    def notices(self) -> tuple[str, ...]:
        """Lines for a file's head, the warning first."""
        return (SIMULATED, *self.comments) if self.simulated else self.comments

    @property
    def name(self) -> str:
        """Of what a cluster or Compose makes of it: a DNS label."""
        words = re.sub(r"[^a-z0-9]+", "-", f"vllm-{self.study}".lower()).strip("-")
        return words[:50].rstrip("-")

    @property
    def model_mount(self) -> str | None:
        """The model's directory, which a container must be given; None of a hub model."""
        placed = self.config.placed_model()
        return placed if Path(placed).is_absolute() else None

    @property
    def ready_after_s(self) -> int:
        """Seconds that a start may take."""
        return math.ceil(max(LEAST_START_S, START_MARGIN * (self.start_s or 0)))


@dataclass(frozen=True, slots=True)
class Options:
    """What a form needs to know beside the configuration.

    Attributes:
        port: to serve on.
        image: container image; None is vLLM's own of the measured version.
    """

    port: int = PORT
    image: str | None = None


def deployment(row: TrialRow, experiment: Experiment, role: str, comments: Sequence[str]) -> Deployment:
    """A trial's configuration as something to deploy."""
    flags: dict[str, JsonValue] = row.config_flags
    config = ServingConfig(experiment.model, experiment.revision, flags)
    random_weights = (RANDOM_WEIGHTS,) if has_random_weights(flags) else ()
    on_gpu = row.gpu_name is not None or experiment.hardware.gpu not in ("auto", "cpu")
    return Deployment(
        role=role,
        study=experiment.name,
        number=row.number,
        config=config,
        python=server_python(experiment),
        env=dict(experiment.server.env),
        comments=(*comments, *random_weights),
        engine_version=row.engine_version,
        gpu_name=row.gpu_name,
        num_gpus=config.num_gpus if on_gpu else 0,
        start_s=row.server_start_s,
        simulated=row.simulated,
    )


def comments_of(row: TrialRow, experiment: Experiment, what: str) -> list[str]:
    """The head of a file: where the configuration comes from, and on what it was measured."""
    return [
        f"varcas study {experiment.name}, {what}",
        f"vLLM {row.engine_version or 'unknown'} on {row.gpu_name or 'CPU'}; {experiment.workload.described}",
    ]


# ---- forms


def start_script(deployment: Deployment, options: Options) -> str:
    """A bash script."""
    return deployment.config.start_script(
        python=deployment.python,
        vllm_version=deployment.engine_version,
        port=options.port,
        comments=deployment.notices,
        env=deployment.env,
        simulated=deployment.simulated,
    )


def compose_file(deployment: Deployment, options: Options) -> str:
    """A Compose file: `docker compose up`. Reaches no further than this host."""
    model = deployment.model_mount
    volumes: list[Any] = [f"huggingface:{HUB_CACHE}"]
    if model:
        placed = _doubled(model)
        volumes.append({"type": "bind", "source": placed, "target": placed, "read_only": True})
    service: dict[str, Any] = {
        "image": options.image or image_of(deployment),
        "entrypoint": ["python3", "-m", SERVER_MODULE],
        "command": [_doubled(word) for word in _container_arguments(deployment, options)],
        "environment": {name: _doubled(value) for name, value in sorted(deployment.env.items())}
        | dict.fromkeys(SECRETS),  # without a value: the shell's own
        "ports": [f"127.0.0.1:{options.port}:{options.port}"],
        "volumes": volumes,
        "ipc": "host",  # tensor parallel workers share memory (docs.vllm.ai, *Using Docker*)
        "restart": "unless-stopped",
        "healthcheck": {
            "test": ["CMD", "python3", "-c", _health_probe(options.port)],
            "interval": f"{PROBE_S}s",
            "timeout": "5s",
            "retries": 3,
            "start_period": f"{deployment.ready_after_s}s",
        },
        "labels": _labels(deployment),
    }
    if deployment.num_gpus:
        device = {"driver": "nvidia", "count": deployment.num_gpus, "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    document = {"name": deployment.name, "services": {"vllm": service}, "volumes": {"huggingface": {}}}
    usage = ["docker compose -f THIS_FILE up -d", f"{' and '.join(SECRETS)} are taken from your shell or .env, if set."]
    return _head([*deployment.notices, *usage]) + _yaml(document)


def kubernetes_manifest(deployment: Deployment, options: Options) -> str:
    """A Deployment and a Service of Kubernetes, one YAML stream."""
    name, selector = deployment.name, {"app.kubernetes.io/name": deployment.name}
    labels = {**selector, "app.kubernetes.io/managed-by": "varcas"}
    meta = {"name": name, "labels": labels, "annotations": _labels(deployment)}
    spec = {
        "replicas": 1,
        "strategy": {"type": "Recreate"},  # a second pod would wait for the first one's GPU
        "selector": {"matchLabels": selector},
        "template": {"metadata": {"labels": labels}, "spec": _pod(deployment, options)},
    }
    port = {"name": "http", "port": options.port, "targetPort": "http"}
    workload = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": meta, "spec": spec}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": labels},
        "spec": {"selector": selector, "ports": [port]},
    }
    usage = [
        "kubectl apply -f THIS_FILE",
        f"Secrets, optional: kubectl create secret generic {name} --from-literal=VLLM_API_KEY=... "
        "--from-literal=HF_TOKEN=...",
        "The hub cache is an emptyDir: a new pod fetches the model again. Give it a PersistentVolumeClaim to keep it.",
    ]
    if deployment.gpu_name:
        product = deployment.gpu_name.replace(" ", "-")
        usage.append(f"Measured on {deployment.gpu_name}: with GPU feature discovery, nodeSelector "
                     f"nvidia.com/gpu.product: {product}")  # fmt: skip
    return _head([*deployment.notices, *usage]) + _yaml(workload) + "---\n" + _yaml(service)


def _pod(deployment: Deployment, options: Options) -> dict[str, Any]:
    probe = {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": PROBE_S}
    container: dict[str, Any] = {
        "name": "vllm",
        "image": options.image or image_of(deployment),
        "command": ["python3", "-m", SERVER_MODULE],
        "args": [_doubled(word) for word in _container_arguments(deployment, options)],
        "env": [{"name": n, "value": _doubled(v)} for n, v in sorted(deployment.env.items())]
        + [_from_secret(name, deployment.name) for name in SECRETS],
        "ports": [{"name": "http", "containerPort": options.port}],
        "startupProbe": probe | {"failureThreshold": math.ceil(deployment.ready_after_s / PROBE_S)},
        "readinessProbe": probe | {"timeoutSeconds": 5},
        "livenessProbe": probe | {"timeoutSeconds": 5, "failureThreshold": 6},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}, {"name": "huggingface", "mountPath": HUB_CACHE}],
    }
    volumes: list[dict[str, Any]] = [
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
        {"name": "huggingface", "emptyDir": {}},
    ]
    if deployment.num_gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": deployment.num_gpus}}
    if model := deployment.model_mount:
        container["volumeMounts"].append({"name": "model", "mountPath": model, "readOnly": True})
        volumes.append({"name": "model", "hostPath": {"path": model, "type": "Directory"}})
    return {
        "enableServiceLinks": False,  # a Service named vllm would set VLLM_PORT, which vLLM reads
        "automountServiceAccountToken": False,
        "containers": [container],
        "volumes": volumes,
    }


def _from_secret(variable: str, secret: str) -> dict[str, Any]:
    return {"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": variable, "optional": True}}}


def systemd_unit(deployment: Deployment, options: Options) -> str:
    """A unit of systemd, for the system's manager or a user's."""
    words = [deployment.python, "-m", SERVER_MODULE, *deployment.config.argv(placed=True)]
    words += ["--host", "127.0.0.1", "--port", str(options.port)]
    start = " ".join(_unit_word(word.replace("$", "$$")) for word in words)
    about = f"vLLM: varcas study {deployment.study}, trial {deployment.number}"
    lines = [
        *(f"# {line}" for line in _lines(deployment.notices)),
        f"# Secrets ({', '.join(SECRETS)}), optional, one NAME=VALUE a line: /etc/varcas/{deployment.name}.env",
        "[Unit]",
        f"Description={about}{' (SIMULATED)' if deployment.simulated else ''}",
        "Wants=network-online.target",
        "After=network-online.target",
        "",
        "[Service]",
        *(f"Environment={_unit_word(f'{name}={value}')}" for name, value in sorted(deployment.env.items())),
        f"EnvironmentFile=-/etc/varcas/{deployment.name}.env",
        f"ExecStart={start}",
        "KillMode=mixed",
        "TimeoutStopSec=30",
        "Restart=on-failure",
        "RestartSec=10",
        "NoNewPrivileges=true",
        "",
        "[Install]",
        "WantedBy=multi-user.target",
        "",
    ]
    return "\n".join(lines)


def _unit_word(word: str) -> str:
    """A word as systemd reads it (systemd.syntax: quoting; systemd.unit: `%` specifiers)."""
    word = word.replace("%", "%%")
    if re.fullmatch(r"[A-Za-z0-9@+=:,./_%$-]+", word):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{escaped}"'


def vllm_config(deployment: Deployment, options: Options) -> str:
    """A file for vLLM's own `--config`.

    Raises:
        InputError: a value that such a file cannot hold.
    """
    config = deployment.config
    keys: dict[str, Any] = {"model": config.placed_model()}
    keys |= {"revision": config.revision} if config.revision else {}
    for flag, value in config.flags.items():
        keys |= _config_key(flag, value)
    keys |= {"host": "127.0.0.1", "port": options.port}
    env = [f"Measured with {name}={value} in the environment." for name, value in sorted(deployment.env.items())]
    return _head([*deployment.notices, "vllm serve --config THIS_FILE", *env]) + _yaml(keys)


def _config_key(flag: str, value: JsonValue) -> dict[str, Any]:
    """One flag as vLLM's `load_config_file` reads it back into the same words.

    A false is `no-FLAG: true`, since older versions drop one; a mapping is JSON text, which all take.
    """
    name = flag.replace("_", "-")
    if isinstance(value, bool):
        return {name: True} if value else {f"no-{name}": True}
    words = [_config_word(item) for item in value] if isinstance(value, list) else [_config_word(value)]
    if not words or any(_is_option(str(word)) for word in words):
        raise InputError(
            f"{flag}: {json.dumps(value)}: vLLM's --config file cannot hold it. Use --format sh, which can."
        )
    return {name: words if isinstance(value, list) else words[0]}


def _is_option(word: str) -> bool:
    """Whether argparse would take a value for an option: what begins with a dash and is no plain number."""
    return word.startswith("-") and not re.fullmatch(r"-\d+|-\d*\.\d+", word)


def _config_word(value: JsonValue) -> str | int | float:
    if isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    return flag_word(value)


def json_form(deployment: Deployment, options: Options) -> str:
    """Everything as JSON, for a script of one's own."""
    config = deployment.config
    document = {
        "study": deployment.study,
        "trial": deployment.number,
        "simulated": deployment.simulated,
        "about": list(deployment.notices),
        "model": config.placed_model(),
        "revision": config.revision,
        "flags": dict(config.flags),
        "argv": config.argv(placed=True),
        "env": dict(deployment.env),
        "secrets_from_environment": list(SECRETS),
        "python": deployment.python,
        "module": SERVER_MODULE,
        "port": options.port,
        "image": options.image or image_of(deployment),
        "engine_version": deployment.engine_version,
        "gpu_name": deployment.gpu_name,
        "num_gpus": deployment.num_gpus,
        "config_hash": config.hash,
    }
    return json.dumps(document, indent=2) + "\n"


@dataclass(frozen=True, slots=True)
class Form:
    """One way to write a deployment down.

    Attributes:
        write: gives its text.
        file: name of its file; `{}` is the role, with an underscore before it.
        executable: the file is one to run.
    """

    write: Callable[[Deployment, Options], str]
    file: str
    executable: bool = False


FORMS: dict[str, Form] = {
    "sh": Form(start_script, "start_vllm{}.sh", executable=True),
    "compose": Form(compose_file, "compose{}.yaml"),
    "k8s": Form(kubernetes_manifest, "kubernetes{}.yaml"),
    "systemd": Form(systemd_unit, "vllm{}.service"),
    "vllm-yaml": Form(vllm_config, "vllm{}.yaml"),
    "json": Form(json_form, "vllm{}.json"),
}
"""Form by the name that `varcas export --format` takes."""


def export(deployment: Deployment, form: str, options: Options | None = None) -> str:
    """The text of a deployment in one form.

    Raises:
        InputError: no such form, or one that cannot hold this configuration.
    """
    return form_named(form).write(deployment, options or Options())


def form_named(name: str) -> Form:
    """Raises InputError for a form that is none."""
    if name not in FORMS:
        raise InputError(f"--format: {name!r}: unknown.{nearest(name, FORMS)} Known: {', '.join(FORMS)}.")
    return FORMS[name]


def file_name(form: str, role: str) -> str:
    """Of a form's file: `start_vllm_optimized.sh`."""
    return form_named(form).file.format(f"_{role}" if role else "")


def write_file(text: str, path: Path, form: str) -> None:
    """Writes a form's file; a script can be run.

    Raises:
        InputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        if form_named(form).executable:
            path.chmod(0o755)
    except OSError as error:
        raise InputError(f"--output: {path}: cannot be written ({error.strerror}). Give another file.") from error


# ---- a study's scripts


def write_scripts(rows: Sequence[TrialRow], experiment: Experiment, directory: Path) -> str | None:
    """Writes `start_vllm.sh` (baseline) and `start_vllm_optimized.sh` (another winner); returns the one to deploy."""
    answer, found = recommend(rows, experiment), find(rows, experiment)
    deployed = row_to_deploy(answer, rows)
    best = deployed if answer.changes else found.winner
    paths: dict[str, str] = {}
    for role, row in (("", found.baseline), ("optimized", best)):
        path = directory / file_name("sh", role)
        if row is None or (role and answer.verdict == "baseline_best"):
            path.unlink(missing_ok=True)  # of an earlier answer
            continue
        made = deployment(row, experiment, role, comments_of(row, experiment, _what(row, answer)))
        write_file(export(made, "sh"), path, "sh")
        paths[row.config_hash] = str(path)
    return paths.get(deployed.config_hash) if deployed else None


def recommended(rows: Sequence[TrialRow], experiment: Experiment) -> Deployment | None:
    """What the study says to deploy; None when nothing can be."""
    answer = recommend(rows, experiment)
    row = row_to_deploy(answer, rows)
    if row is None:
        return None
    role = "optimized" if answer.changes else ""
    return deployment(row, experiment, role, comments_of(row, experiment, _what(row, answer)))


def trial_deployment(row: TrialRow, experiment: Experiment) -> Deployment:
    """One trial's configuration, whatever came of it."""
    came = "" if row.state == "complete" else f": it is {row.state} ({row.reason_rule or row.failure_kind})"
    comments = comments_of(row, experiment, f"trial {row.number}{came}")
    return deployment(row, experiment, f"trial_{row.number}", comments)


def _what(row: TrialRow, answer: Recommendation) -> str:
    return "baseline" if row.purpose == "baseline" else f"trial {row.number}: {answer.headline}"


# ---- pieces


def image_of(deployment: Deployment) -> str:
    """The image of vLLM's own makers, of the version that was measured."""
    try:
        tag = f"v{Version(deployment.engine_version or '').base_version}"
    except InvalidVersion:
        tag = "latest"
    return f"{GPU_IMAGE if deployment.num_gpus else CPU_IMAGE}:{tag}"


def _container_arguments(deployment: Deployment, options: Options) -> list[str]:
    return [*deployment.config.argv(placed=True), "--host", "0.0.0.0", "--port", str(options.port)]


def _doubled(text: str) -> str:
    """Compose and Kubernetes both read `$` as the start of a variable, and `$$` as itself."""
    return text.replace("$", "$$")


def _health_probe(port: int) -> str:
    return f"import urllib.request as r; r.urlopen('http://127.0.0.1:{port}/health', timeout=4)"


def _labels(deployment: Deployment) -> dict[str, str]:
    labels = {"varcas/study": deployment.study, "varcas/trial": str(deployment.number)}
    return labels | ({"varcas/simulated": "true"} if deployment.simulated else {})


def _lines(comments: Sequence[str]) -> list[str]:
    return [line for comment in comments for line in comment.splitlines()]


def _head(comments: Sequence[str]) -> str:
    return "".join(f"# {line}".rstrip() + "\n" for line in _lines(comments))


def _yaml(document: Any) -> str:
    text: str = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=4096)
    return text
