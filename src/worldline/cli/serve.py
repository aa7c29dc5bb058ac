"""`worldline serve`: worlds over HTTP, with a queue that outlives the process."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from pydantic import Field

from worldline.catalog import BUNDLED_PREFIX, find
from worldline.cli.messages import results
from worldline.cli.options import ManyValues, parameters, parsed, stated
from worldline.errors import Error, InputError, counted, strerror
from worldline.family import FAMILIES, requests_of
from worldline.locate import bundled_names, locate
from worldline.request import Count
from worldline.serve.scaling import Autoscaler, RayOptions, import_cluster
from worldline.serve.settings import Access, AppSettings
from worldline.serve.sharing import refuse_unless_shared

if TYPE_CHECKING:
    from worldline.serve.jobs import Queue
    from worldline.serve.records import Worker

logger = logging.getLogger(__name__)

KEY = "WORLDLINE_API_KEY"
_ANY_HOST = "*"
_GRACE_S = 3  # for answers on their way, once all jobs have stopped
_BACKLOG = 2048


class ServeFlags(RayOptions, AppSettings):
    """Flags of `worldline serve`."""

    words: tuple[str, ...] = Field(
        (), json_schema_extra={"argument": True, "metavar": "[WORLD]..."}
    )
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    data_dir: Path = Field(
        Path("outputs/serve"),
        strict=False,
        description="Folder of the jobs, their inputs and their videos.",
    )
    workers: Count | Literal["auto", "ray"] = Field(
        "auto",
        description="Workers of each world; auto: as many as there are GPUs for, at least one; "
        "ray: actors of a Ray cluster, as many as waiting jobs ask for.",
    )
    gpus_per_worker: int = Field(
        1,
        ge=0,
        le=64,
        description="GPUs of one machine that make a video together, processes where there is no "
        "GPU; 0 runs on CPUs.",
    )
    api_key_file: Path | None = Field(
        None, strict=False, description=f"File of API keys, one a line.  [default: {KEY}]"
    )
    insecure: bool = Field(False, description="Allow another --host without a key.")
    queue_size: int = Field(256, ge=1, description="Jobs that wait.")
    queue_per_key: int = Field(64, ge=1, description="Jobs of one key that wait.")
    batch_window_ms: float = Field(
        50.0, ge=0, le=60000, description="Milliseconds that a job waits for others of its batch."
    )
    job_timeout_s: float = Field(
        7200.0, gt=0, description="Seconds of a job, after which it is stopped at a step."
    )
    drain_s: float = Field(
        30.0, ge=0, description="Seconds for jobs that run, after Ctrl-C or SIGTERM."
    )
    keep_hours: float | None = Field(
        None, gt=0, description="Hours after which videos are removed.  [default: never]"
    )


# load options of commands that a server has others for -> its own, and what they choose
_REPLACED = {
    "num_gpus": ("gpus_per_worker", "GPUs share a video"),
    "context_parallel_size": ("gpus_per_worker", "GPUs share a video"),
    "data_parallel": ("workers", "workers make different videos"),
}


class ServeCommand(ManyValues):
    """The command; --allow_url_inputs may stand without a value."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        name, words = "--allow_url_inputs", []
        for place, word in enumerate(args):
            words.append(word)
            following = args[place + 1 : place + 2]
            alone = not following or following[0].startswith("-")
            if alone and word.replace("-", "_") == name.replace("-", "_"):
                words.append(_ANY_HOST)
        return super().parse_args(ctx, words)


def load_parameters() -> list[click.Parameter]:
    """Load options of all families, each once."""
    options: dict[str, click.Parameter] = {}
    for family in FAMILIES:
        for option in parameters(requests_of(family).OPTIONS):
            if isinstance(option, click.Option):
                option.hidden = option.name in _REPLACED
            options.setdefault(str(option.name), option)
    return list(options.values())


@click.command(cls=ServeCommand, params=[*parameters(ServeFlags), *load_parameters()])
@click.pass_context
def serve(context: click.Context, /, **_: object) -> None:
    """Serve worlds over HTTP, by OpenAI's forms of requests, and a page.

    WORLD is as of `worldline generate`; without one, bundled worlds are served. Jobs are on the
    disk before they are answered, and survive a restart. SIGTERM and Ctrl-C let running jobs end,
    within --drain_s; a second one ends the server at once.
    """
    from worldline.serve.security import refuse_open_host

    flags = parsed(context, ServeFlags)
    keys = read_keys(flags.api_key_file)
    if reason := refuse_open_host(flags.host, keys, flags.insecure):
        raise InputError(reason)
    import_server()
    worlds = choose_worlds(flags, context)
    refuse_misplaced(flags, context)
    access = Access(host=flags.host, keys=keys)
    listener = listen(flags.host, flags.port)
    with listener, closing(connected(flags, worlds, context.params["device"])) as cluster:
        asyncio.run(run(flags, access, worlds, listener, cluster))


def refuse_misplaced(flags: ServeFlags, context: click.Context) -> None:
    """Refuse flags of a cluster without one, and flags that a cluster has others for."""
    if flags.workers != "ray" and (typed := [*stated(context, RayOptions.model_fields)]):
        raise InputError(f"--{typed[0]}: it is of --workers ray; give that, or leave it out")
    for name in stated(context, _REPLACED):
        own, choice = _REPLACED[name]
        raise InputError(f"--{name}: --{own} N is how many {choice}; give that, or leave it out")


class Machine:
    """This machine, in place of a cluster.

    Attributes:
        gpus: of each worker; 0 for none.
        groups: GPUs that the workers of a world take in turn; None: as each finds them.
    """

    def __init__(self, gpus: int, device: str | None) -> None:
        """A machine without workers.

        Args:
            gpus: of each worker.
            device: load option, as it was typed.

        Raises:
            InputError: it has fewer GPUs.
        """
        self.gpus = gpus
        found = visible_devices() if gpus and device in (None, "cuda") else []
        if 0 < len(found) < gpus:
            count = counted(len(found), "GPU")
            raise InputError(
                f"--gpus_per_worker {gpus}: this machine has {count}; give at most {len(found)}, "
                "or --device cpu"
            )
        starts = range(0, len(found) - gpus + 1, max(1, gpus)) if found else ()
        self.groups: list[list[str] | None] = [found[at : at + gpus] for at in starts]
        self.groups = self.groups or [None]

    def worker(self, world: str, name: str, options: Mapping[str, Any], place: str) -> Worker:
        """A worker whose number chooses its GPUs."""
        from worldline.serve.workers import LocalWorker

        worker: Worker = LocalWorker(
            world,
            name,
            {**({} if self.gpus else {"device": "cpu"}), **options},
            processes=max(1, self.gpus),
            devices=self.groups[int(name.rpartition("/")[2]) % len(self.groups)],
            place=place,
        )
        return worker

    def close(self) -> None:
        """Nothing is connected."""


def connected(flags: ServeFlags, worlds: Sequence[World], device: str | None) -> Any:
    """What makes workers: this machine, or a connection to a cluster.

    Raises:
        InputError: the GPUs of this machine, or a world, are too few or wrong for a worker.
        Error: Ray is not installed, or there is no cluster at the address.
    """
    if flags.workers == "ray":
        return import_cluster()(flags.address, flags.gpus_per_worker)
    machine = Machine(flags.gpus_per_worker, device)
    if machine.gpus > 1:
        refuse_unless_shared(machine.gpus, [(world.place, world.options) for world in worlds])
    return machine


def import_server() -> None:
    """Import what the extra installs.

    Raises:
        Error: it is not installed.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in ("fastapi", "prometheus_client", "python_multipart", "uvicorn", "starlette"):
            raise
        install = 'pip install "worldline[serve]"'
        raise Error(f"serve: {name} is not installed; `{install}`") from None


@dataclass(frozen=True)
class World:
    """A world to serve.

    Attributes:
        place: its name or path, as `worldline.load` takes it.
        options: load options that its family has.
    """

    name: str
    place: str
    options: Mapping[str, Any]


def choose_worlds(flags: ServeFlags, context: click.Context) -> list[World]:
    """The worlds that were asked for, by the names that clients see.

    Raises:
        InputError: one is not there, or two have a name, or an option is of no world.
    """
    places = list(dict.fromkeys(flags.words)) or default_worlds()
    names = {*(str(option.name) for option in load_parameters())}
    typed = stated(context, names)
    worlds, used = [], set[str]()
    for place in places:
        checkpoint_dir = typed.get("checkpoint_dir", "checkpoints")
        found = locate(place, checkpoint_dir)
        name = place if found.bundled or found.released else found.folder.name
        known = options_of(place.removeprefix(BUNDLED_PREFIX), found.folder.name)
        options = {n: v for n, v in typed.items() if known is None or n in known}
        used |= options.keys()
        worlds.append(World(name.strip("/") or "world", place, options))
    if unused := sorted(typed.keys() - used):
        raise InputError(f"--{unused[0]}: no world that is served has it; leave it out")
    counts = Counter(world.name for world in worlds)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise InputError(f"two worlds have the name {twice[0]}; rename the folder of one")
    return worlds


def default_worlds() -> list[str]:
    """One bundled world of each family."""
    first: dict[str | None, str] = {}
    for name in bundled_names():
        first.setdefault(family_of(name.removeprefix(BUNDLED_PREFIX)), name)
    return list(first.values())


def family_of(*names: str) -> str | None:
    """Family of a released model, or one named like it; None where the name is unknown."""
    entries = filter(None, map(find, names))
    families = (entry.command.partition(" ")[0] for entry in entries)
    models = (
        entry.command.partition(" ")[0]
        for entry in _entries()
        if {*names} & {model.name for model in entry.models}
    )
    return next((family for family in (*families, *models) if family in FAMILIES), None)


def _entries() -> Sequence[Any]:
    from worldline.catalog import ENTRIES

    return ENTRIES


def options_of(*names: str) -> set[str] | None:
    """Names of the load options of a model; None where its family is not known by its name."""
    family = family_of(*names)
    return None if family is None else {*requests_of(family).OPTIONS.flags().values()}


def read_keys(path: Path | None) -> tuple[str, ...]:
    """API keys of a file, else of the environment.

    Raises:
        InputError: the file cannot be read, or a key is too short or has blanks.
    """
    source, text = f"${KEY}", os.environ.get(KEY, "")
    if path is not None:
        source = f"--api_key_file {path}"
        try:
            text = path.read_text()
        except (OSError, ValueError) as error:
            raise InputError(f"{source}: {strerror(error)}") from error
    keys = [line.strip() for line in text.splitlines() if line.strip() and line[0] != "#"]
    if path is not None and not keys:
        raise InputError(f"{source}: it holds no key; write one a line")
    for number, key in enumerate(keys, 1):
        if len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key:
            message = "it needs 8 or more characters of ASCII without blanks"
            raise InputError(f"{source}, key {number}: {message}")
    return tuple(dict.fromkeys(keys))


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        InputError: the address is taken, or not of this machine.
    """
    name = host.strip("[]")
    try:
        family, _, _, _, address = socket.getaddrinfo(
            name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # with its protocol, asyncio sends small answers at once; else after 40 ms
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = f"--host {host} --port {port}: {strerror(error)}; give another"
        raise InputError(reason) from error
    return listener


async def run(
    flags: ServeFlags,
    access: Access,
    worlds: Sequence[World],
    listener: socket.socket,
    cluster: Any,
) -> None:
    """Serve until a signal ends it; `cluster` is what `connected` gives."""
    from worldline.serve.app import make_app
    from worldline.serve.jobs import Queue, Settings
    from worldline.serve.server import make_server
    from worldline.serve.store import Store

    store = Store(flags.data_dir)
    try:
        settings = Settings(
            queue_size=flags.queue_size,
            queue_per_key=flags.queue_per_key,
            batch_window=flags.batch_window_ms / 1000,
            job_timeout=flags.job_timeout_s,
            keep_hours=flags.keep_hours,
        )
        by_name = {world.name: world for world in worlds}

        def make_worker(world: str, name: str) -> Worker:
            made: Worker = cluster.worker(world, name, by_name[world].options, by_name[world].place)
            return made

        number = flags.min_workers if flags.workers == "ray" else flags.workers
        if number == "auto":
            number = len(cluster.groups)
        workers = {
            world: [make_worker(world, f"{world}/{place}") for place in range(number)]
            for world in by_name
        }
        queue = Queue(store, workers, make_worker, settings)
        names = ", ".join(by_name)

        def announce(event: str, _: Mapping[str, Any]) -> None:
            if event == "loaded" and all(map(queue.facts, by_name)):
                queue.observers.remove(announce)
                results.add(f"ready: {names}")

        queue.observers.append(announce)
        app = make_app(queue, store, flags, access)
        server = make_server(app, _GRACE_S)
        port = listener.getsockname()[1]
        host = f"[{flags.host.strip('[]')}]" if ":" in flags.host else flags.host
        await queue.start()
        if flags.workers == "ray":
            Autoscaler(queue, flags).start()
        follow_signals(queue, server, flags.drain_s)
        results.add(f"loading {names}; page and API: http://{host}:{port}")
        await server.serve([listener])
        await queue.drain(0)  # where no signal ended the server
    finally:
        store.close()


def follow_signals(queue: Queue, server: Any, drain_s: float) -> None:
    """Drain at the first SIGTERM, SIGINT or SIGHUP; end at the second."""
    loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[None]]()

    async def drain() -> None:
        try:
            await queue.drain(drain_s)
        finally:
            server.should_exit = True

    def end(number: signal.Signals) -> None:
        if tasks:
            os._exit(0)  # workers end with their sockets; their jobs are in the store
        message = "%s: jobs that run have %g s (--drain_s), again ends at once"
        logger.warning(message, number.name, drain_s)
        tasks.add(loop.create_task(drain()))

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as below nohup
            loop.add_signal_handler(number, end, number)


def visible_devices() -> list[str]:
    """GPUs of this machine, by number or name; found without torch."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [each.strip() for each in visible.split(",") if each.strip() not in ("", "-1")]
    with suppress(OSError):
        files = [path.name for path in Path("/dev").glob("nvidia*")]
        return [str(n) for n in range(sum(name[6:].isdecimal() for name in files))]
    return []
