"""docs/deployment.md word for word: its blocks, on three machines made of namespaces, joined by a
watched cable.

A machine has its own network, processes and file system (an overlay whose changes vanish with it),
so ``useradd``, ``/etc/srfed`` and ``/opt/srfed`` are what the text says. Two things are stood in
for: what ``pip install .`` would download is lent by this test's environment, and systemd by a
program that reads the units as systemd does.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from srfed.commands import deploy
from support.tiny_run import TINY

PROJECT = Path(__file__).parents[2]
TEXT = (PROJECT / "docs" / "deployment.md").read_text()
COORDINATOR, SITES = "10.77.0.1", {"clinic-a": "10.77.0.2", "clinic-b": "10.77.0.3"}
OUTSIDE = "10.77.0.254"
"""Where the machines send what is for anybody else: name server and default route."""
WAIT_SECONDS = 300.0
UNITS = ("srfed-superlink", "srfed-site")


@dataclass(frozen=True)
class Block:
    """A block of commands: whose, what they are, and the words after which they are interrupted."""

    whose: str
    commands: str
    until: str | None


def blocks() -> list[Block]:
    found = re.findall(
        r'^```bash (\w+)(?: until="([^"\n]*)")?\n(.*?)^```$', TEXT, re.MULTILINE | re.DOTALL
    )
    return [Block(whose, commands, until or None) for whose, until, commands in found]


# --- Machines ------------------------------------------------------------------------------------

NEEDED = (Path(sys.base_prefix), PROJECT, Path(sys.prefix))
BOOT = """set -e
mount --make-rprivate /
mkdir -p "$1"; mount -t tmpfs tmpfs "$1"; mkdir "$1"/upper "$1"/work "$1"/root
mount -t overlay overlay -o lowerdir=/,upperdir="$1"/upper,workdir="$1"/work "$1"/root
mount -t proc proc "$1"/root/proc; mount --rbind /dev "$1"/root/dev
mount -t tmpfs tmpfs "$1"/root/tmp; chmod 1777 "$1"/root/tmp
number=0
for needed in "${@:2}"; do
    # What tests run with may lie where this machine has a folder of its own, or another file
    # system.
    [ -e "$1/root$needed" ] && continue
    number=$((number + 1)); mkdir -p "$1"/upper$number "$1"/work$number "$1/root$needed"
    mount -t overlay overlay -o "lowerdir=$needed,upperdir=$1/upper$number,workdir=$1/work$number" "$1/root$needed"
done
ip link set lo up
exec chroot "$1"/root bash -c 'echo up; while :; do sleep 1000 & wait; done'
"""
SYSTEMCTL = '''#!{python}
"""As much of systemd as the units need: Environment, EnvironmentFile, User, Group, UMask, WorkingDirectory, ExecStart,
Restart, RestartSec, TimeoutStopSec."""
import os, pathlib, re, shlex, signal, subprocess, sys, time, uuid

def unit(name):
    text = pathlib.Path(f"/etc/systemd/system/{{name}}.service").read_text().replace("\\\\\\n", " ")
    keys = [line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#")]
    return {{key: [value for other, value in keys if other == key] for key, _ in keys}}

def group(invocation):
    found = []
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if f"INVOCATION_ID={{invocation}}".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            pass
    return found

def supervise(name):
    keys = unit(name)
    one = lambda key, default=None: keys.get(key, [default])[-1]
    user = one("User")
    environment = {{"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "USER": user, "HOME": os.path.expanduser("~" + user)}}
    environment["INVOCATION_ID"] = uuid.uuid4().hex
    words = [word for line in keys["Environment"] for word in shlex.split(line)]
    for file in keys.get("EnvironmentFile", []):
        words += [line for line in pathlib.Path(file).read_text().splitlines() if line and not line.startswith("#")]
    environment |= dict(word.split("=", 1) for word in words)
    expand = lambda word: re.sub(r"\\$\\{{(\\w+)\\}}", lambda found: environment[found[1]], word)
    command = [expand(word) for word in shlex.split(one("ExecStart"))]
    log = open(f"/var/log/{{name}}.log", "ab")
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    while not stop:
        process = subprocess.Popen(
            command, env=environment, user=user, group=one("Group"), extra_groups=[], umask=int(one("UMask"), 8),
            cwd=one("WorkingDirectory"), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        while process.poll() is None and not stop:
            time.sleep(0.1)
        process.terminate()
        try:
            process.wait(float(one("TimeoutStopSec", "90")))
        except subprocess.TimeoutExpired:
            pass
        while left := group(environment["INVOCATION_ID"]):  # all of the unit's control group ends with it
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        assert one("Restart") == "always"
        for _ in range(10 * int(one("RestartSec"))):
            stop or time.sleep(0.1)

def stop(name):
    file = pathlib.Path(f"/run/{{name}}.pid")
    pid = int(file.read_text())
    os.kill(pid, signal.SIGTERM)
    while os.path.exists(f"/proc/{{pid}}"):
        time.sleep(0.1)

def start(name):
    unit(name)
    supervisor = subprocess.Popen(
        [sys.executable, __file__, "supervise", name], start_new_session=True, stdin=subprocess.DEVNULL,
        stdout=open(f"/var/log/{{name}}.supervisor", "ab"), stderr=subprocess.STDOUT)
    pathlib.Path(f"/run/{{name}}.pid").write_text(str(supervisor.pid))

match sys.argv[1:]:
    case ["daemon-reload"]: pass
    case ["enable", "--now", name]: start(name)
    case ["restart", name]: stop(name); start(name)
    case ["supervise", name]: supervise(name)
    case words: sys.exit(f"not stood in for: {{words}}")
'''
LISTENER = """import socket, struct, sys
seen = set()
listener = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
print("listening", flush=True)
while True:
    packet = listener.recv(65536)
    if packet[12:14] != b"\\x08\\x00":
        continue
    ip = packet[14:]
    at = 4 * (ip[0] & 15)
    ports = struct.unpack("!HH", ip[at:at + 4]) if ip[9] in (6, 17) else (0, 0)
    flow = (socket.inet_ntoa(ip[12:16]), ports[0], socket.inet_ntoa(ip[16:20]), ports[1], ip[9])
    if flow not in seen:
        seen.add(flow)
        print(*flow, flush=True)
"""


class Machine:
    """A machine of its own as far as commands can tell, and root's shell on it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        unshare = [
            "unshare",
            "--net",
            "--mount",
            "--uts",
            "--ipc",
            "--pid",
            "--fork",
            "--kill-child",
        ]
        self._holder = subprocess.Popen(
            [*unshare, "bash", "-c", BOOT, "boot", str(folder / name), *map(str, NEEDED)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._holder.stdout is not None
        if (said := self._holder.stdout.readline()) != "up\n":
            self._holder.kill()
            pytest.skip(
                f"no machine can be made of namespaces here: {said or self._holder.stdout.read()}"
            )
        self.pid = int(
            Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text()
        )
        self.root = Path(f"/proc/{self.pid}/root")
        self._count = 0
        self._environment = {
            "PATH": f"{sysconfig.get_path('scripts')}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "LANG": "C.UTF-8",
            # What pip would download is there already.
            "PIP_NO_INDEX": "1",
            "PIP_NO_DEPS": "1",
            "PIP_NO_BUILD_ISOLATION": "0",
            "PYTHONPATH": sysconfig.get_path("purelib"),
            # Lines come one by one, as on a terminal.
            "PYTHONUNBUFFERED": "1",
        }

    def close(self) -> None:
        """The machine is gone, with all its processes."""
        self._holder.kill()
        self._holder.wait()

    def _enter(self, *command: str) -> list[str]:
        where = [
            "nsenter",
            "-t",
            str(self.pid),
            "--net",
            "--mount",
            "--uts",
            "--ipc",
            "--pid",
            "--root",
            "--wd",
        ]
        return [
            *where,
            "env",
            "-i",
            *(f"{key}={value}" for key, value in self._environment.items()),
            *command,
        ]

    def do(self, commands: str) -> str:
        """What commands print; none of them may fail. Their shell's exported variables stay."""
        self._count += 1
        (self.root / "tmp" / "block").write_text(commands)
        script = (
            "cd /srv/srfed 2>/dev/null || cd /; set -o pipefail; trap 'echo FAILED: $BASH_COMMAND; "
            "exit 9' ERR\n"
            ". /tmp/block; trap - ERR; env -0 > /tmp/environment"
        )
        done = subprocess.run(
            self._enter("bash", "-c", script),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=2 * WAIT_SECONDS,
            check=False,
        )
        with self._log.open("a") as log:
            log.write(f"--- {commands}\n{done.stdout}")
        assert done.returncode == 0, f"{self.name}: {commands}\n{done.stdout}\n{self.journal()}"
        pairs = (self.root / "tmp" / "environment").read_text().split("\0")
        self._environment = dict(pair.split("=", 1) for pair in pairs if pair)
        return done.stdout

    def do_until(self, commands: str, words: str) -> str:
        """What commands print until they have printed some words, and are interrupted as by
        Ctrl-C.
        """
        said = self._log.with_suffix(".until")
        with said.open("wb") as out:
            process = subprocess.Popen(
                self._enter("bash", "-c", f"cd /srv/srfed; {commands}"),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            ended = lambda: words in said.read_text() or process.poll() is not None  # noqa: E731
            wait_until(ended, lambda: said.read_text() + self.journal())
            assert words in said.read_text(), said.read_text() + self.journal()
            os.killpg(process.pid, signal.SIGINT)
            process.wait(WAIT_SECONDS)
        finally:
            with ExitStack() as stack:
                stack.callback(process.wait)
                process.kill()
        return said.read_text()

    def journal(self) -> str:
        """What its services have said."""
        logs = sorted((self.root / "var" / "log").glob("srfed-*"))
        return "".join(f"{log.name}:\n{log.read_text(errors='replace')[-4000:]}\n" for log in logs)


def wait_until(true: Callable[[], object], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not true():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


def install(machine: Machine, address: str) -> None:
    """What stands on a machine before the walk begins: a clone, names, and what pip would
    download.
    """
    clone = machine.root / "srv" / "srfed"
    for name in ("srfed", "configs", "systemd"):
        shutil.copytree(PROJECT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, clone / name)
    # The same settings by the same name, but small enough for a test.
    config = yaml.safe_load((clone / "configs" / "sites.yaml").read_text())
    for section, keys in TINY.items():
        if section != "federation":
            config[section] |= keys
    config["data"] |= {"image_size": 8, "channels": 1}
    config["training"] |= {"local_epochs": None, "local_steps": 2}
    # As many as an owner wants behind each number.
    config["evaluation"] |= {"samples": 40, "samples_between": 40, "ssim_images": 8}
    (clone / "configs" / "sites.yaml").write_text(yaml.safe_dump(config))
    systemctl = machine.root / "usr" / "local" / "sbin" / "systemctl"
    systemctl.write_text(SYSTEMCTL.format(python=sys.executable))
    systemctl.chmod(0o755)
    with (machine.root / "etc" / "hosts").open("a") as hosts:
        hosts.write(f"{COORDINATOR} superlink.example.org\n")
    (machine.root / "etc" / "resolv.conf").unlink(missing_ok=True)
    (machine.root / "etc" / "resolv.conf").write_text(
        f"nameserver {OUTSIDE}\noptions timeout:1 attempts:1\n"
    )
    for folder in NEEDED:
        for parent in (folder, *folder.parents):
            inside = machine.root / parent.relative_to("/")
            inside.chmod(
                inside.stat().st_mode | 0o111
            )  # the service user passes, on this machine alone
    machine.do(
        f"ip address add {address}/24 dev eth0; ip link set eth0 up; ip route add default via "
        f"{OUTSIDE}"
    )


def lend_dependencies(machine: Machine) -> None:
    """What ``pip install .`` would have downloaded beside srfed itself."""
    machine.do("unset PYTHONPATH")
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    target = machine.root / "opt" / "srfed"
    (target / "lib" / python / "site-packages" / "lent.pth").write_text(
        f"{sysconfig.get_path('purelib')}\n"
    )
    for script in Path(sysconfig.get_path("scripts")).iterdir():
        if re.match(r"flwr|flower|tensorboard$", script.name):
            lines = script.read_text().splitlines(keepends=True)
            (target / "bin" / script.name).write_text(
                "".join(["#!/opt/srfed/bin/python\n", *lines[1:]])
            )
            (target / "bin" / script.name).chmod(0o755)


@contextmanager
def cable(folder: Path, machines: list[Machine]) -> Iterator[Path]:
    """Join machines; gives a file with every flow that was seen: source, its port, destination, its
    port, protocol.
    """
    flows = folder / "flows"
    with subprocess.Popen(["unshare", "--net", "sleep", "infinity"]) as hub:
        try:
            wait_until(
                lambda: os.readlink(f"/proc/{hub.pid}/ns/net") != os.readlink("/proc/self/ns/net"),
                str,
            )

            def on_hub(*command: str) -> list[str]:
                return ["nsenter", "-t", str(hub.pid), "--net", *command]

            commands = [
                "ip link add br0 type bridge",
                f"ip address add {OUTSIDE}/24 dev br0",
                "ip link set br0 up",
            ]
            for number, machine in enumerate(machines):
                commands.append(
                    f"ip link add port{number} type veth peer name eth0 netns {machine.pid}"
                )
                commands.append(f"ip link set port{number} master br0 up")
            for command in commands:
                subprocess.run(on_hub(*command.split()), check=True)
            with (
                flows.open("wb") as out,
                subprocess.Popen(on_hub(sys.executable, "-c", LISTENER), stdout=out) as listener,
            ):
                try:
                    wait_until(lambda: "listening" in flows.read_text(), flows.read_text)
                    yield flows
                finally:
                    listener.kill()
        finally:
            hub.kill()


def flows_of(file: Path, source: str) -> set[tuple[str, int]]:
    """Where packets of a machine went: address and port."""
    lines = [line.split() for line in file.read_text().splitlines()[1:]]
    return {(words[2], int(words[3])) for words in lines if len(words) == 5 and words[0] == source}


# --- The walk ------------------------------------------------------------------------------------


def why_not() -> str | None:
    """What this machine lacks for the walk."""
    if os.geteuid() != 0:
        return "root alone can make machines of namespaces and add a user"
    missing = [
        name
        for name in ("unshare", "nsenter", "ip", "useradd", "runuser")
        if not shutil.which(name)
    ]
    if missing:
        return f"there is no {', '.join(missing)} here"
    with suppress(PackageNotFoundError):
        if int(version("setuptools").split(".")[0]) >= 77:
            return None
    return "there is no setuptools here, of version 77 or later, to install srfed with"


@pytest.mark.slow
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_the_walkthrough_works_word_for_word_and_nobody_but_the_superlink_is_contacted(
    tmp_path: Path,
) -> None:
    with ExitStack() as stack:
        machines = {name: Machine(tmp_path, name) for name in ("coordinator", *SITES)}
        for machine in machines.values():
            stack.callback(machine.close)
        coordinator, sites = machines["coordinator"], [machines[name] for name in SITES]
        flows = stack.enter_context(cable(tmp_path, list(machines.values())))
        for machine, address in zip(machines.values(), (COORDINATOR, *SITES.values()), strict=True):
            install(machine, address)
        for seed, site in enumerate(sites):
            draw_pictures(site.root / "data" / "xrays", seed)

        said = ""
        for block in blocks():
            whose = {
                "everywhere": list(machines.values()),
                "coordinator": [coordinator],
                "site": sites,
            }[block.whose]
            for machine in whose:
                # At clinic-b its name stands where clinic-a's does.
                words = (
                    block.commands
                    if block.whose != "site"
                    else block.commands.replace("clinic-a", machine.name)
                )
                said += (
                    machine.do(words)
                    if block.until is None
                    else machine.do_until(words, block.until)
                )
                if "pip install" in words:
                    lend_dependencies(machine)
            if "--site" in block.commands:
                carry(coordinator, sites)
            if "enable --now srfed-site" in block.commands:
                for site in sites:
                    wait_until(
                        lambda site=site: "connected to the SuperLink" in site.journal(),
                        site.journal,
                    )
            if "srfed-superlink" in block.commands:
                wait_for_superlink(coordinator)
        assert "round 2/2" in said
        assert "going on after round 2" in said
        assert "site: connected" in sites[0].journal()
        assert "it is finished; its table is in /var/lib/srfed/run/summary.txt" in said
        for site in sites:
            assert (site.root / "var" / "lib" / "srfed" / "grid.png").stat().st_size > 0

        # The certificate is another one by now; the sites have done nothing, and answer.
        (resume,) = (block for block in blocks() if block.until == "round  3/20")
        assert "going on after round" in coordinator.do_until(
            resume.commands, "going on after round"
        )

        everywhere = {(COORDINATOR, 8000)}
        for name, address in SITES.items():
            assert flows_of(flows, address) == everywhere, name
        assert {where for where, _ in flows_of(flows, COORDINATOR)} <= set(SITES.values())
        # The cable would have shown it: this is what any program of Flower's does without the
        # variable.
        post = "from flwr.supercore.telemetry import *; create_event(EventType.PING, None)"
        sites[0].do(f"FLWR_TELEMETRY_ENABLED=1 /opt/srfed/bin/python -c '{post}'")
        wait_until(lambda: flows_of(flows, SITES["clinic-a"]) > everywhere, flows.read_text)


def draw_pictures(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(seed)
    for number in range(150):
        Image.fromarray(pixels.integers(0, 256, (12, 10), dtype=np.uint8)).save(
            folder / f"{number}.png"
        )


def carry(coordinator: Machine, sites: list[Machine]) -> None:
    """What the text's table says who gets."""
    for site in sites:
        for name, source, target in (
            ("ca.crt", coordinator, site),
            (f"site-{site.name}.pub", site, coordinator),
        ):
            path = Path("etc", "srfed", name)
            shutil.copy(source.root / path, target.root / path)
            (target.root / path).chmod(0o644)


def wait_for_superlink(machine: Machine) -> None:
    probe = "until (echo > /dev/tcp/superlink.example.org/8000) 2>/dev/null; do sleep 0.2; done"
    machine.do(f"timeout {WAIT_SECONDS:.0f} bash -c '{probe}'")


# --- What is started elsewhere -------------------------------------------------------------------


def test_units_and_images_are_quiet_towards_flowers_host() -> None:
    units = [(PROJECT / "systemd" / f"{name}.service").read_text() for name in UNITS]
    for text in (*units, TEXT, (PROJECT / "docker" / "Dockerfile").read_text()):
        assert re.search(r"FLWR_TELEMETRY_ENABLED=0", text)
        assert re.search(r"FLWR_DISABLE_UPDATE_CHECK=1", text)


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("there is no systemd-analyze here to verify with")
    for name in UNITS:
        text = (PROJECT / "systemd" / f"{name}.service").read_text()
        (tmp_path / f"{name}.service").write_text(
            re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", text)
        )
    files = [str(tmp_path / f"{name}.service") for name in UNITS]
    done = subprocess.run([verify, "verify", *files], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_each_container_of_a_site_runs_what_the_command_understands() -> None:
    services = yaml.safe_load((PROJECT / "docker" / "compose.yaml").read_text())["services"]
    sites = {name: service for name, service in services.items() if name != "superlink"}
    assert set(sites) == {"clinic-a", "clinic-b", "clinic-c"}
    for name, service in sites.items():
        options = deploy._parser().parse_args(["site", *service["command"]])
        assert (options.client_id, str(options.key)) == (name, f"/run/secrets/{name}.key")
    assert (
        'ENTRYPOINT ["python", "-m", "srfed.deploy", "site"]'
        in (PROJECT / "docker" / "Dockerfile").read_text()
    )
