"""A private SLURM cluster on this machine: the real daemons, several nodes, nothing outside one directory."""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

# SLURM binds a GPU only if it is a character device of its own; these exist in every container.
_GPUS = [f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty", "ptmx")]


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin"  # where the daemons are, outside an ordinary user's PATH


def missing(*, accounting: bool = False) -> str:
    """The packages to install before a cluster can start; empty where all are there."""
    packages = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
    if accounting:
        packages |= {
            "slurmdbd": "slurmdbd",
            "mariadbd": "mariadb-server-core",
            "mariadb": "mariadb-client-core",
        }
    return " ".join(
        package for program, package in packages.items() if not shutil.which(program, path=_path())
    )


def foreign(variables: Iterable[str]) -> list[str]:
    """The variables of another cluster or job, which would leak into what is submitted here."""
    return [name for name in variables if name.startswith(("SLURM", "SBATCH_", "SRUN_", "SUBMITIT_"))]


class Cluster:
    """Two partitions over the same nodes: jobs in `high` preempt (requeue) those in `main`, the default.

    `nodes` are loopback addresses, so that the first host of a job, MASTER_ADDR, resolves. Without accounting
    `sacct` answers an error, as it does on many a real cluster. `daemons` by name: "munged", "slurmctld", each
    node's slurmd by the node's name, "slurmdbd" and "mariadbd" for accounting.
    """

    def __init__(
        self,
        *,
        nodes: int = 2,
        cpus: int = 4,
        gpus: int = 2,
        max_array_size: int | None = None,
        accounting: bool = False,
        preempt_send_user_signal: bool = False,
    ) -> None:
        self.nodes = [f"127.0.0.{1 + index}" for index in range(nodes)]
        self.accounting = accounting
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        # Short, since a socket's path has at most 107 characters.
        self._temporary = tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp")
        self.directory = Path(self._temporary.name)
        self.directory.chmod(0o711)  # munged refuses a socket that not everybody can reach
        for name in ("log", "state", *(f"spool/{node}" for node in self.nodes)):
            (self.directory / name).mkdir(parents=True)
        self.environment = {"SLURM_CONF": str(self.directory / "slurm.conf"), "PATH": _path()}
        self._controller_port, self._dbd_port, self._db_port, *node_ports = _free_ports(3 + nodes)
        self._configure(node_ports, cpus, gpus, max_array_size, preempt_send_user_signal)

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends every daemon and every process of a job, whatever state they are in; removes all files."""
        # Their state is thrown away with the directory, so nothing needs to end in peace.
        self._end()
        self._temporary.cleanup()

    # What tests ask

    def run(self, *command: str, timeout: float = 30) -> str:
        """The standard output of a SLURM command."""
        done = subprocess.run(command, env=self._env(), capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def queue(self) -> dict[str, str]:
        """State by job id (arrays: JOB_INDEX), of the jobs that have not ended."""
        return self._jobs()

    def history(self) -> dict[str, str]:
        """State by job id, of the jobs that have ended too."""
        return self._jobs("-t", "all")

    def states(self) -> dict[str, str]:
        """State by node, as `sinfo` prints it: idle, mixed, allocated, down*, draining, ..."""
        lines = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N|%T").splitlines()
        return dict(line.split("|") for line in lines)

    def wait(self, condition: Callable[[], object], timeout_s: float = 30) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"it did not happen within {timeout_s:.0f} s\n{self._logs()}")
            time.sleep(0.2)

    # What tests do to it

    def kill_node(self, name: str) -> None:
        """The machine loses its power, with all that runs on it, and the controller notices at once."""
        self._end(name)
        self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=killed")

    def revive_node(self, name: str) -> None:
        # What the controller still has to tell the dead node, to end its jobs, would end the restarted ones.
        self.drain(name)
        self._slurmd(name)
        pending = re.compile(r"^Agent (count|queue size): *[1-9]", re.MULTILINE)
        self.wait(lambda: not pending.search(self.run("sdiag")))
        self.resume(name)
        self.wait(lambda: self.states()[name] == "idle")

    def drain(self, name: str) -> None:
        self.run("scontrol", "update", f"nodename={name}", "state=drain", "reason=drained")

    def resume(self, name: str) -> None:
        self.run("scontrol", "update", f"nodename={name}", "state=resume")

    @contextlib.contextmanager
    def out_of_service(self) -> Iterator[None]:
        """No node takes a job."""
        for node in self.nodes:
            self.drain(node)
        try:
            yield
        finally:
            for node in self.nodes:
                self.resume(node)

    def clear(self) -> None:
        """Ends every job, also those that ignore SIGTERM, without the seconds that SLURM would grant them."""

        def ended() -> bool:
            if jobs := {job.partition("_")[0] for job in self.queue()}:
                with contextlib.suppress(RuntimeError):  # they may end by themselves meanwhile
                    self.run("scancel", *jobs)
                _kill(self._processes("SLURMD_NODENAME=", "SLURM_JOB_ID="))
            return not jobs

        self.wait(ended)

    # How it is made

    def _configure(
        self, ports: list[int], cpus: int, gpus: int, max_array_size: int | None, user_signal: bool
    ) -> None:
        here, user = self.directory, getpass.getuser()
        socket_file = here / "munge.sock"
        lines = [
            "ClusterName=test",
            "SlurmctldHost=localhost(127.0.0.1)",
            f"SlurmctldPort={self._controller_port}",
            f"SlurmUser={user}",
            f"SlurmdUser={user}",
            f"StateSaveLocation={here}/state",
            f"SlurmctldPidFile={here}/slurmctld.pid",
            f"SlurmdPidFile={here}/slurmd-%n.pid",
            f"SlurmdSpoolDir={here}/spool/%n",
            f"SlurmdLogFile={here}/spool/%n/log",  # of the job steps; slurmd itself writes to its stderr
            # cred_expire is also how long a requeued job waits before it may start again: 120 s by default
            f"AuthInfo=socket={socket_file},cred_expire=5",
            "ProctrackType=proctrack/linuxproc",  # no cgroups, so no root
            "TaskPlugin=task/none",
            "MpiDefault=none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",  # with memory too, a job that names none would take a whole node
            "SlurmdParameters=config_overrides",  # more CPUs than the machine has
            "ReturnToService=2",
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            "SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=0",
            "KillWait=30",  # SLURM's default, and a busy machine needs it
            "MinJobAge=600",  # how long history() knows a job that has ended
            "MailProg=/bin/true",
            "PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=5",
            "PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF",
        ]
        for node, port in zip(self.nodes, ports, strict=True):
            gres = f" Gres=gpu:{gpus}" if gpus else ""
            lines.append(
                f"NodeName={node} NodeHostname=localhost Port={port} CPUs={cpus} RealMemory=8000{gres}"
            )
        if gpus:
            lines.append("GresTypes=gpu")
            devices = [f"Name=gpu File={_GPUS[index]}" for index in range(gpus)]
            _write(here / "gres.conf", "AutoDetect=off", *devices)
        if max_array_size is not None:
            lines.append(f"MaxArraySize={max_array_size}")
        if user_signal:
            lines.append("SlurmctldParameters=preempt_send_user_signal")
        if self.accounting:
            lines += [
                "AccountingStorageType=accounting_storage/slurmdbd",
                "AccountingStorageHost=127.0.0.1",
                f"AccountingStoragePort={self._dbd_port}",
                f"AccountingStoragePass={socket_file}",
                "AccountingStorageEnforce=associations",
            ]
            _write(
                here / "slurmdbd.conf",
                f"AuthInfo=socket={socket_file}",
                "DbdHost=localhost",
                "DbdAddr=127.0.0.1",
                f"DbdPort={self._dbd_port}",
                f"SlurmUser={user}",
                f"PidFile={here}/slurmdbd.pid",
                "StorageType=accounting_storage/mysql",
                "StorageHost=127.0.0.1",
                f"StoragePort={self._db_port}",
                "StorageUser=slurm",
                "StoragePass=slurm",
            )
        _write(here / "slurm.conf", *lines)

    def _start(self) -> None:
        here = self.directory
        (here / "munge.key").write_bytes(os.urandom(128))
        (here / "munge.key").chmod(0o600)
        options = [f"--{name}-file={here}/munge.{name}" for name in ("key", "pid", "seed")]
        self._daemon("munged", "munged", "--foreground", f"--socket={here}/munge.sock", *options)
        self._until((here / "munge.sock").exists)
        if self.accounting:
            self._start_accounting()
        self._daemon("slurmctld", "slurmctld", "-D")
        self._until(self._answers("scontrol", "show", "config"))
        for node in self.nodes:
            self._slurmd(node)
        self._until(lambda: set(self.states().values()) == {"idle"})

    def _start_accounting(self) -> None:
        here, user = self.directory, getpass.getuser()
        database = ["--no-defaults", f"--user={user}", f"--datadir={here}/database", f"--tmpdir={here}"]
        as_usual = ["--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve"]
        self.run("mariadb-install-db", *database, *as_usual, timeout=60)
        _write(
            here / "users.sql",
            "CREATE USER slurm@'%' IDENTIFIED BY 'slurm';",
            "GRANT ALL ON *.* TO slurm@'%';",
        )
        self._daemon(
            "mariadbd",
            "mariadbd",
            *database,
            f"--socket={here}/mariadb.sock",
            f"--pid-file={here}/mariadb.pid",
            "--bind-address=127.0.0.1",
            f"--port={self._db_port}",
            "--skip-name-resolve",
            f"--init-file={here}/users.sql",
            "--innodb-flush-log-at-trx-commit=0",
            "--innodb-buffer-pool-size=64M",
        )
        self._until((here / "mariadb.sock").exists)
        self._daemon("slurmdbd", "slurmdbd", "-D")
        self._until(self._answers("sacctmgr", "-n", "show", "cluster"))
        self.run("sacctmgr", "-i", "add", "cluster", "test")
        self.run("sacctmgr", "-i", "add", "account", "lab")
        self.run("sacctmgr", "-i", "add", "user", user, "account=lab")

    def _slurmd(self, node: str) -> None:
        self._daemon(node, "slurmd", "-D", "-N", node)

    def _daemon(self, name: str, *command: str) -> None:
        # SLURMD_NODENAME is in the environment of every task; with it in the daemons' own, and so in that of
        # whatever they start, one look at /proc tells what belongs to which.
        with open(self.directory / "log" / f"{name}.log", "ab") as log:
            self.daemons[name] = subprocess.Popen(
                command,
                env=self._env() | {"SLURMD_NODENAME": name},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                start_new_session=True,  # Ctrl-C is for the tests, which then stop the cluster
            )

    def _env(self) -> dict[str, str]:
        inherited = dict(os.environ)
        for name in foreign(inherited):
            del inherited[name]
        return inherited | self.environment

    def _jobs(self, *options: str) -> dict[str, str]:
        lines = self.run("squeue", "-h", "-r", "-o", "%i|%T", *options).splitlines()
        return dict(line.split("|") for line in lines)

    def _answers(self, *command: str) -> Callable[[], bool]:
        def answers() -> bool:
            return subprocess.run(command, env=self._env(), capture_output=True, timeout=30).returncode == 0

        return answers

    def _until(self, condition: Callable[[], bool]) -> None:
        """A step of the start; a daemon that ends meanwhile is an error at once."""

        def done() -> bool:
            if ended := [name for name, daemon in self.daemons.items() if daemon.poll() is not None]:
                raise RuntimeError(f"{', '.join(ended)} ended\n{self._logs()}")
            return condition()

        self.wait(done)

    def _logs(self) -> str:
        logs = sorted((self.directory / "log").iterdir())
        return "\n".join(f"--- {log.name}\n{_tail(log)}" for log in logs)

    def _end(self, *names: str) -> None:
        """Kills these daemons and all that they started, or everything."""
        marks = [f"SLURMD_NODENAME={name}\0" for name in names] or ["SLURMD_NODENAME="]
        self.wait(lambda: not any(_kill(self._processes(mark)) for mark in marks), 10)
        for name in names or self.daemons:
            self.daemons[name].wait(10)

    def _processes(self, *marks: str) -> Iterator[int]:
        """The living processes of this cluster with each of these in their environment, and their descendants."""
        wanted = [f"\0{mark}".encode() for mark in (f"SLURM_CONF={self.environment['SLURM_CONF']}\0", *marks)]
        parents, marked = {}, set()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # ended meanwhile, or somebody else's
                pid, environment = int(entry.name), b"\0" + (entry / "environ").read_bytes()
                state, parent, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
                if state != "Z":
                    parents[pid] = int(parent)
                    marked |= {pid} if all(mark in environment for mark in wanted) else set()
        for pid in parents:
            ancestor = pid
            while ancestor in parents and ancestor not in marked:
                ancestor = parents[ancestor]
            if ancestor in marked:
                yield pid


def _kill(processes: Iterable[int]) -> int:
    """How many it killed."""
    pids = list(processes)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(pids)


def _free_ports(count: int) -> list[int]:
    # Below the range from which the kernel takes the ports of outgoing connections: they stay free.
    free: list[int] = []
    for port in random.sample(range(10_000, 32_768), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            free.append(port)
        if len(free) == count:
            break
    return free


def _write(file: Path, *lines: str) -> None:
    file.touch(0o600)  # slurmdbd refuses a password that others may read
    file.write_text("\n".join([*lines, ""]))


def _tail(file: Path, lines: int = 15) -> str:
    return "\n".join(file.read_text(errors="replace").splitlines()[-lines:])
