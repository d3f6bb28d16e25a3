"""Is each simulated site's process started under its own name?"""

import threading

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.private.fed.app.simulator.simulator_runner import SimulatorClientRunner


class SiteNames(FLComponent):
    """Give each thread that starts a site's process a dictionary of its own to write the site's name into.

    NVFlare 2.9.0's simulator starts each site from a thread, which writes the name into `build_ctx` and sends that to
    the new process. All threads share it. If one writes while another is about to send, two processes get the same
    name, and the run waits without end for the other site. That happened in about one of 200 runs.
    """

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.START_RUN:  # of the server, whose process also starts the sites' processes
            own = threading.local()
            # A property of the class comes before an attribute of its objects. Each thread finds its own copy there.
            SimulatorClientRunner.build_ctx = property(
                fget=lambda runner: vars(own).setdefault("build_ctx", dict(vars(runner)["build_ctx"])),
                fset=lambda runner, shared: vars(runner).update(build_ctx=shared),
            )
