"""How does a job get on? The server says which rounds begin, what sites report, and which are slow or lost."""

import collections
import json
import random
import threading
import time
from pathlib import Path

from nvflare.apis.dxo import MetaKey, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, ReservedTopic, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.private.fed.simulator.simulator_const import SimulatorConstants
from nvflare.widgets.info_collector import InfoCollector

from support.on_site.last_word import TOPIC

ASK_EVERY = 5  # seconds, which is also how long an answer may take
SILENT_AFTER = 25  # seconds
MORE_AT_FIRST = 95  # more seconds that a site has for its first answer
REFUSED = "hello_pt_refused"  # a key: why whole_models.py refused a result


def printable(text: str) -> str:
    """Return a site's text in one short line. A site may say anything."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text[:300]).split())


class Rounds(FLComponent):
    """Say in the server's log how the rounds get on, and keep in lost_sites.json which sites were lost, and why.

    It reports a site to NVFlare as dead if the site says that it can't take part, or if its process for this job no
    longer answers. Without that, NVFlare 2.9.0 waits 600 s for a silent client, and forever for a script that ended
    before flare.init() or for a client that was started again, whose heartbeats go on without the job.

    Args:
        min_sites: how many of the sites must be left for the job to go on.
        patience: seconds after which a site that is still at work on a task is named. It is named again each time that
            the wait has doubled.
    """

    def __init__(self, last_round: int, min_sites: int, seed: int, patience: float):
        super().__init__()
        self.last_round, self.min_sites, self.seed = last_round, min_sites, seed
        self.patience = patience
        self.place = "the start"
        self.said = collections.deque(maxlen=1000)
        self.lost = {}  # {site: [[what happened, at what stage, why], ...]}
        self.at_work = {}  # {site: {"on": what, "since": when, "patience": how long until it is named}}
        self.could_not_take_part = set()
        self.last_answer = {}  # {site: when}
        self.over = threading.Event()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        peer = fl_ctx.get_peer_context()
        site = peer.get_identity_name() if peer else None
        if event_type == EventType.START_RUN:
            # To begin, the job waited for all sites. From now on, so many must be left.
            fl_ctx.get_prop(FLContextKey.JOB_META)[JobMetaKey.MIN_CLIENTS.value] = self.min_sites
            engine = fl_ctx.get_engine()
            engine.register_aux_message_handler(TOPIC, self.hear_last_word)
            self.last_answer = {client.name: time.monotonic() + MORE_AT_FIRST for client in engine.get_clients()}
            threading.Thread(target=self.watch, args=(engine,), daemon=True).start()
        elif event_type == EventType.END_RUN:
            self.over.set()
        elif event_type == AppEventType.ROUND_STARTED:
            current_round = fl_ctx.get_prop(AppConstants.CURRENT_ROUND)
            random.seed(f"{self.seed} {current_round}")  # FedAvg draws the round's sites next
            self.place = f"round {current_round + 1}/{self.last_round}"
            self.say(f"{self.place}  begins")
        elif event_type == EventType.AFTER_TASK_DATA_FILTER:
            task = fl_ctx.get_prop(FLContextKey.TASK_NAME)
            if task != AppConstants.TASK_TRAIN:
                self.place = f"the task {task}"
            self.at_work[site] = {"on": self.place, "since": time.monotonic(), "patience": self.patience}
        elif event_type == EventType.BEFORE_PROCESS_SUBMISSION:
            self.at_work.pop(site, None)
            code = fl_ctx.get_prop(FLContextKey.TASK_RESULT).get_return_code()
            if code not in (ReturnCode.OK, ReturnCode.TASK_ABORTED):
                self.note(site, fl_ctx, "was left out", fl_ctx.get_prop(REFUSED) or "")  # "": its own log says why
        elif event_type == AppEventType.AFTER_CONTRIBUTION_ACCEPT:
            if fl_ctx.get_prop(AppConstants.AGGREGATION_ACCEPTED):
                self.report(site, fl_ctx)
        elif event_type == AppEventType.AFTER_AGGREGATION:
            models = fl_ctx.get_prop(AppConstants.AGGREGATION_RESULT).meta["nr_aggregated"]
            self.say(f"{self.place}  averaged {models} local model{'s' if models != 1 else ''}")
        elif event_type == AppEventType.CROSS_VAL_INIT:
            self.say("the sites evaluate the models")
        elif event_type == EventType.CLIENT_DISCONNECTED:
            site = fl_ctx.get_prop(FLContextKey.DISCONNECTED_CLIENT_NAME)
            self.note(site, fl_ctx, "could not take part" if site in self.could_not_take_part else "was lost", "")
        elif event_type == EventType.CLIENT_RECONNECTED:
            self.note(fl_ctx.get_prop(FLContextKey.RECONNECTED_CLIENT_NAME), fl_ctx, "came back", "")
        elif event_type == InfoCollector.EVENT_TYPE_GET_STATS:  # asked for by whoever may view the job
            fl_ctx.get_prop(InfoCollector.CTX_KEY_STATS_COLLECTOR).add_info("rounds", {"said": list(self.said)})

    def say(self, text: str) -> None:
        self.logger.info(text)
        self.said.append(text)

    def report(self, site: str, fl_ctx: FLContext) -> None:
        """Say what a site reports of a round."""
        if site in self.lost:
            self.note(site, fl_ctx, "came back", "")
        metrics = from_shareable(fl_ctx.get_prop(AppConstants.TRAINING_RESULT)).meta.get(MetaKey.INITIAL_METRICS) or {}
        texts = (
            f"{name} {value:#.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in metrics.items()
        )
        self.say(f"{site}  {self.place}  reports {printable(', '.join(texts)) or 'no metrics'}")

    def note(self, site: str, fl_ctx: FLContext, what: str, why: str) -> None:
        """Say and keep that a site is missing or back, unless its last event says so already."""
        self.at_work.pop(site, None)
        events = self.lost.get(site, [])
        was_missing = bool(events) and events[-1][0] != "came back"
        is_missing = what != "came back"
        if is_missing == was_missing:
            return
        self.lost[site] = [*events, [what, self.place, why]]
        self.say(f"{site}  {self.place}  {what}{why and f': {why}'}")
        run_folder = fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id())
        Path(run_folder, "lost_sites.json").write_text(json.dumps(self.lost))

    def hear_last_word(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        self.could_not_take_part.add(fl_ctx.get_peer_context().get_identity_name())
        return make_reply(ReturnCode.OK)

    def watch(self, engine) -> None:
        while not self.over.wait(ASK_EVERY):
            self.name_slow_sites()
            with engine.new_context() as fl_ctx:
                for site in self.could_not_take_part | self.silent_sites(engine, fl_ctx):
                    # Each time: only the workflow that is running hears it, and the next one must be told, too.
                    fl_ctx.get_prop(FLContextKey.RUNNER).handle_dead_job(site, fl_ctx)

    def name_slow_sites(self) -> None:
        for site, work in sorted(self.at_work.copy().items()):
            seconds = time.monotonic() - work["since"]
            if seconds > work["patience"]:
                work["patience"] *= 2
                self.say(f"still waiting for {site}: at work on {work['on']} for {seconds:.0f} s")

    def silent_sites(self, engine, fl_ctx: FLContext) -> set[str]:
        """Ask all sites whether they are there, and return those that have not answered for some time."""
        if fl_ctx.get_job_id() == SimulatorConstants.JOB_NAME:
            return set()  # NVFlare's simulator may end a site's process between its tasks
        topic = ReservedTopic.JOB_HEART_BEAT
        sites = list(self.last_answer)
        replies = engine.send_aux_request(sites, topic, Shareable(), ASK_EVERY, fl_ctx, optional=True) or {}
        now = time.monotonic()
        self.last_answer |= {site: now for site in replies if replies[site].get_return_code() == ReturnCode.OK}
        return {site for site in self.last_answer if now - self.last_answer[site] > SILENT_AFTER}
