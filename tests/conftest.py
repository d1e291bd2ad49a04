from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from varcas.child import free_port

os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads it when it is imported, which some tests do themselves

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny local Llama with a chat template, made by the quickstart's own script."""
    spec = importlib.util.spec_from_file_location("make_model", ROOT / "experiments" / "make_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    module.make_model("tiny-llama", directory)
    return directory


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """A database of VARCAS_TEST_POSTGRESQL, else of a PostgreSQL server started here; skipped where there is none."""
    if named := os.environ.get("VARCAS_TEST_POSTGRESQL"):
        yield named
        return
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs:
        pytest.skip("no PostgreSQL server here (Debian: apt-get install postgresql)")
    bin_dir, port = programs[-1].parent, free_port()
    as_user: dict[str, object] = {}
    directory = Path(tempfile.mkdtemp(prefix="varcas-pg-"))
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        user = pwd.getpwnam("postgres")
        shutil.chown(directory, user.pw_uid, user.pw_gid)
        as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}

    def run(*argv: str) -> None:
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, cwd="/", timeout=60, **as_user)  # type: ignore[call-overload]

    try:
        run(str(bin_dir / "initdb"), "-D", f"{directory}/data", "-U", "varcas", "--auth=trust", "--no-sync")
        options = f"-p {port} -h 127.0.0.1 -k {directory} -c fsync=off"
        run(str(bin_dir / "pg_ctl"), "-D", f"{directory}/data", "-o", options, "-l", f"{directory}/log", "-w", "start")
        try:
            yield f"postgresql://varcas@127.0.0.1:{port}/postgres"
        finally:
            run(str(bin_dir / "pg_ctl"), "-D", f"{directory}/data", "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
