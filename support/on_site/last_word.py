"""What does a site tell the server when it can't take part, for example because its script did not start?"""

from pathlib import Path

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLMetaKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

TOPIC = "hello_pt.last_word"


class LastWord(FLComponent):
    """Tell the server that this site can't take part, and leave it to the server whether the job goes on.

    If a script ends before flare.init(), NVFlare 2.9.0 stops the site's process for this job, and doesn't tell the
    server.

    If the site's process for this job ends with a failure, NVFlare ends the job, and doesn't say which site failed.
    If there is a file with an exit code, NVFlare's client reads that in place of the process's own. So this writes
    one with 0, and rounds.py decides whether the job goes on.
    """

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        engine = fl_ctx.get_engine()
        if event_type == EventType.START_RUN:
            run_folder = engine.get_workspace().get_run_dir(fl_ctx.get_job_id())
            Path(run_folder, FLMetaKey.PROCESS_RC_FILE).write_text("0")
        elif event_type == EventType.FATAL_SYSTEM_ERROR:
            engine.send_aux_request(["server"], TOPIC, Shareable(), timeout=10, fl_ctx=fl_ctx)
