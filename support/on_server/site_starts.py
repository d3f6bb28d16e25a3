"""Does each simulated site's process start under its own name, and at its own port?"""

import socket
import threading

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.private.fed.app.simulator import simulator_runner


class SiteStarts(FLComponent):
    """Keep apart the threads of NVFlare 2.9.0's simulator that start the sites' processes at the same moment.

    Each thread writes its site's name into `build_ctx`, which all share, and sends that to the new process. If another
    one writes in between, two processes get the same name, and the run waits without end for the other site. So each
    thread gets a dictionary of its own. Without it, about one of 200 runs of two sites hung.

    Each thread looks for a free port by listening at it for a moment. A process that another thread starts in that
    moment inherits the socket, and keeps the port until it has begun. NVFlare then connects to nobody, or the site's
    process finds its port taken. So free_port doesn't listen. Without it, a few runs of eight sites failed.
    """

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.START_RUN:  # of the server, whose process also starts the sites' processes
            own = threading.local()
            # A property of the class comes before an attribute of its objects. Each thread finds its own copy there.
            simulator_runner.SimulatorClientRunner.build_ctx = property(
                fget=lambda runner: vars(own).setdefault("build_ctx", dict(vars(runner)["build_ctx"])),
                fset=lambda runner, shared: vars(runner).update(build_ctx=shared),
            )
            simulator_runner.get_open_ports = free_port


def free_port(number: int) -> list[int]:
    """Return one free port: the simulator never asks for more."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # so that the port can be had while this lives on
        probe.bind(("", 0))
        return [probe.getsockname()[1]]
