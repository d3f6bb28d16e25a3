"""What does a job's server do beside FedAvg? It reports, and refuses models that aren't whole. This file travels.

Of a tensor that a site leaves out, NVFlare 2.9.0's FedAvg takes the mean of the others' or keeps the old values; a
number of steps that is none counts as 1; and a global model of the sites that answered replaces that of all.
"""

import json
import random
from pathlib import Path

import torch
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.filter import Filter
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.abstract.model import ModelLearnable, ModelLearnableKey
from nvflare.app_common.abstract.persistor_filter import PersistorFilter
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.logging.job_log_receiver import JobLogReceiver
from nvflare.widgets.info_collector import InfoCollector


class Rounds(FLComponent):
    """Report how the rounds get on, in the server's log, and draw the sites of a round by the seed.

    Args:
        min_sites: how many of the sites must be left for the job to go on.
    """

    def __init__(self, num_rounds: int, min_sites: int, seed: int):
        super().__init__()
        self.num_rounds, self.min_sites, self.seed = num_rounds, min_sites, seed
        self.place = "the start"
        self.said, self.lost = [], {}

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.START_RUN:
            # Until now it was how many sites the job waits for.
            fl_ctx.get_prop(FLContextKey.JOB_META)[JobMetaKey.MIN_CLIENTS.value] = self.min_sites
        elif event_type == AppEventType.ROUND_STARTED:
            current_round = fl_ctx.get_prop(AppConstants.CURRENT_ROUND)
            random.seed(f"{self.seed} {current_round}")  # from which FedAvg draws next
            self.place = f"round {current_round + 1}/{self.num_rounds}"
            self.say(f"{self.place}  begins")
        elif event_type == AppEventType.AFTER_CONTRIBUTION_ACCEPT:
            self.report(fl_ctx.get_peer_context().get_identity_name(), fl_ctx)
        elif event_type == AppEventType.AFTER_AGGREGATION:
            models = fl_ctx.get_prop(AppConstants.AGGREGATION_RESULT).meta["nr_aggregated"]
            self.say(f"{self.place}  averaged {models} local model{'s' if models != 1 else ''}")
        elif event_type in (EventType.CLIENT_DISCONNECTED, EventType.CLIENT_RECONNECTED):
            site = fl_ctx.get_prop(FLContextKey.DISCONNECTED_CLIENT_NAME) or fl_ctx.get_prop(
                FLContextKey.RECONNECTED_CLIENT_NAME
            )
            self.lose(site, fl_ctx, "was lost" if event_type == EventType.CLIENT_DISCONNECTED else "came back")
        elif event_type == InfoCollector.EVENT_TYPE_GET_STATS:  # asked for by whoever may view the job
            fl_ctx.get_prop(InfoCollector.CTX_KEY_STATS_COLLECTOR).add_info("rounds", {"said": self.said[-1000:]})

    def say(self, text: str) -> None:
        self.logger.info(text)
        self.said.append(text)

    def report(self, site: str, fl_ctx: FLContext) -> None:
        """Say what a site reports of a round."""
        if not fl_ctx.get_prop(AppConstants.AGGREGATION_ACCEPTED):
            self.lose(site, fl_ctx, "was left out")
            return
        if site in self.lost:
            self.lose(site, fl_ctx, "came back")
        metrics = from_shareable(fl_ctx.get_prop(AppConstants.TRAINING_RESULT)).meta.get(MetaKey.INITIAL_METRICS) or {}
        texts = (
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in metrics.items()
        )
        self.say(f"{site}  {self.place}  reports {one_line(', '.join(texts)) or 'no metrics'}")

    def lose(self, site: str, fl_ctx: FLContext, what: str) -> None:
        """Say what happened to a site, unless it is the same as before, and keep it for the summary."""
        if site in self.lost and self.lost[site][-1].startswith(what):
            return
        self.say(f"{site}  {self.place}  {what}")
        since = f"from {self.place} on" if what == "was left out" else f"in {self.place}"
        self.lost.setdefault(site, []).append(f"{what} {since}")
        run_folder = fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id())
        Path(run_folder, "lost_sites.json").write_text(json.dumps(self.lost))


class LogsOfSites(JobLogReceiver):
    """Keep the sites' logs where NVFlare 2.9.0 looks for them while a job runs, which isn't where it keeps them."""

    def _register(self, event_type: str, fl_ctx: FLContext) -> None:
        workspace = fl_ctx.get_engine().get_workspace()
        self._dest_dir = str(Path(workspace.get_log_root(fl_ctx.get_job_id())).parent)
        super()._register(event_type, fl_ctx)


class WholeLocalModels(Filter):
    """Refuse a local model that would spoil the global one.

    Args:
        spare: whether the round can do without it. If not, NVFlare logs the reason and ends the job.
    """

    def __init__(self, spare: bool):
        super().__init__()
        self.spare = spare

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        site = fl_ctx.get_peer_context().get_identity_name()
        try:
            if shareable.get_return_code() != ReturnCode.OK:
                if not self.spare:
                    return shareable
                raise ValueError(f"its client says {shareable.get_return_code()}")
            model = from_shareable(shareable)
            wanted = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)[ModelLearnableKey.WEIGHTS]
            check_weights(model.data if model.data_kind in (DataKind.WEIGHTS, DataKind.WEIGHT_DIFF) else {}, wanted)
            check_steps(model.meta.get(MetaKey.NUM_STEPS_CURRENT_ROUND))
        except ValueError as error:
            if not self.spare:
                raise
            self.logger.warning(f"{site}  refused: {one_line(str(error))}")
            return DXO(DataKind.WEIGHTS, data={}).to_shareable()  # which FedAvg passes over
        shareable.set_header(MetaKey.SITE_NAME, site)  # NVFlare 2.9.0 believes the name that a script puts into meta
        return shareable


class WholeBestModels(Filter):
    """Refuse a best local model that the other sites couldn't load; one is empty if its site was never drawn."""

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        if shareable.get_return_code() == ReturnCode.OK:
            if not (weights := from_shareable(shareable).data):
                return make_reply(ReturnCode.EXECUTION_RESULT_ERROR)
            try:
                check_weights(weights, fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)[ModelLearnableKey.WEIGHTS])
            except ValueError as error:
                site = fl_ctx.get_peer_context().get_identity_name()
                raise ValueError(f"the best model of {site} is refused: {one_line(str(error))}") from None
        return shareable


def one_line(text: str) -> str:
    """Return what a site says in one line that isn't long: it may say anything."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text[:300]).split())


def check_weights(weights: dict, wanted: dict) -> None:
    """Raise ValueError if a local model, or its difference to the global one, lacks what the global one has."""
    if missing := [name for name in wanted if name not in weights]:
        raise ValueError(f"its local model lacks {', '.join(missing[:3])}{', ...' if missing[3:] else ''}")
    if unknown := [name for name in weights if name not in wanted]:
        raise ValueError(f"its local model has {unknown[0]}, which the global model doesn't have")
    for name, value in wanted.items():
        value = torch.as_tensor(value)
        try:
            local = torch.as_tensor(weights[name])
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"its local model's {name} is no tensor") from None
        if local.shape != value.shape:
            raise ValueError(f"its local model's {name} has the shape {tuple(local.shape)}, not {tuple(value.shape)}")
        finite = local.isfinite() & local.to(value.dtype).isfinite()  # 1e300 isn't, as float32
        if value.isfinite().all() and not finite.all():
            raise ValueError(f"its local model's {name} isn't finite: training diverged, try a smaller --lr")


def check_steps(steps: object) -> None:
    """Raise ValueError if FedAvg's weight of a site is no positive number. Without one, a site counts as one step."""
    try:
        number = 1 if steps is None else float(steps)
    except (TypeError, ValueError):
        number = 0
    if isinstance(steps, bool) or not 0 < number < float("inf"):
        raise ValueError(f"its NUM_STEPS_CURRENT_ROUND is {steps!r}, which is no positive number")


def keep_integers(means: dict, weights: dict) -> None:
    """Round the means of integers and booleans, such as BatchNorm's counts of batches, and give them their types again.

    NVFlare 2.9.0 makes floating-point numbers of them, and load_state_dict would cut these off: 5 may be 4.999.
    """
    for name, mean in means.items():
        if not (wanted := torch.as_tensor(weights[name])).is_floating_point():
            rounded = torch.as_tensor(mean).round().to(wanted.dtype)
            means[name] = rounded if isinstance(weights[name], torch.Tensor) else rounded.numpy()


class WholeGlobalModels(PersistorFilter):
    """Refuse to save a global model of too few sites: the file keeps that of the round before, and the job ends."""

    def __init__(self, min_sites: int):
        super().__init__()
        self.min_sites = min_sites

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.START_RUN:
            fl_ctx.get_engine().get_component("persistor").filter_id = "whole_global_models"
        elif event_type == AppEventType.AFTER_AGGREGATION:
            keep_integers(
                fl_ctx.get_prop(AppConstants.AGGREGATION_RESULT).params,
                fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)[ModelLearnableKey.WEIGHTS],
            )

    def process_pre_save(self, learnable: ModelLearnable, fl_ctx: FLContext) -> ModelLearnable:
        meta = learnable[ModelLearnableKey.META]
        if meta["nr_aggregated"] < self.min_sites:
            what = f"of {meta['nr_aggregated']} of {self.min_sites} sites, and was not saved"
            raise ValueError(f"the global model of round {meta['current_round'] + 1} is {what}")
        return learnable
