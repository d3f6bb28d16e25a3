"""How does a job do without a site that it lost? For --min_sites. This file travels, to the server and the sites."""

import threading
import time
from pathlib import Path

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, FLMetaKey, ReservedTopic, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

ASK_EVERY = 5  # seconds, which is also how long an answer may take
SILENT_AFTER = 25  # seconds


class Presence(FLComponent):
    """Report a site whose process for this job no longer answers to NVFlare as dead.

    NVFlare 2.9.0 itself takes a site for dead when its client has sent the server no heartbeat for 600 s, and never if
    the client was started again before: then its heartbeats go on, while it knows nothing of the job.
    """

    def __init__(self):
        super().__init__()
        self.over = threading.Event()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.START_RUN:
            threading.Thread(target=self.watch, args=(fl_ctx.get_engine(),), daemon=True).start()
        elif event_type == EventType.END_RUN:
            self.over.set()

    def watch(self, engine) -> None:
        last_answer = {}  # a site that is still starting has none
        while not self.over.wait(ASK_EVERY):
            with engine.new_context() as fl_ctx:
                sites = [client.name for client in engine.get_clients()]
                replies = engine.send_aux_request(
                    sites, ReservedTopic.JOB_HEART_BEAT, Shareable(), ASK_EVERY, fl_ctx, optional=True
                )
                now = time.monotonic()
                for site, reply in (replies or {}).items():
                    if reply.get_return_code() == ReturnCode.OK:
                        last_answer[site] = now
                    elif now - last_answer.get(site, now) > SILENT_AFTER:
                        fl_ctx.get_prop(FLContextKey.RUNNER).handle_dead_job(site, fl_ctx)
                        last_answer[site] = now  # and again, if the next workflow still has to hear of it


class Dispensable(FLComponent):
    """Let the job go on, whatever becomes of this site's process for it.

    NVFlare 2.9.0 ends a job as soon as a site's client reports that this process ended with an error or was killed. It
    reports what this file says, if it is there; the process itself removes it at its start and writes over none.
    """

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.START_RUN:
            run_folder = fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id())
            Path(run_folder, FLMetaKey.PROCESS_RC_FILE).write_text("0")
