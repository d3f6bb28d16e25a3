"""What the server refuses: local models and global models that aren't whole. This module alone travels: to the server.

Of a tensor that a site leaves out, NVFlare 2.9.0's FedAvg takes the mean of the others' or keeps the old values; a
number of steps that is none counts as 1; and a global model of the sites that answered replaces that of all.
"""

import torch
from nvflare.apis.dxo import DataKind, MetaKey, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.model import ModelLearnable, ModelLearnableKey
from nvflare.app_common.abstract.persistor_filter import PersistorFilter
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType


class WholeLocalModels(Filter):
    """Refuse a local model that would spoil the global one; NVFlare then logs the reason and ends the job."""

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        if shareable.get_return_code() == ReturnCode.OK:
            model = from_shareable(shareable)
            wanted = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)[ModelLearnableKey.WEIGHTS]
            check_weights(model.data if model.data_kind in (DataKind.WEIGHTS, DataKind.WEIGHT_DIFF) else {}, wanted)
            check_steps(model.meta.get(MetaKey.NUM_STEPS_CURRENT_ROUND))
        return shareable


def check_weights(weights: dict, wanted: dict) -> None:
    """Raise ValueError if a local model, or its difference to the global one, lacks what the global one has."""
    if missing := [name for name in wanted if name not in weights]:
        raise ValueError(f"its local model lacks {', '.join(missing[:3])}{', ...' if missing[3:] else ''}")
    if unknown := [name for name in weights if name not in wanted]:
        raise ValueError(f"its local model has {unknown[0]}, which the global model doesn't have")
    for name, value in wanted.items():
        local, value = torch.as_tensor(weights[name]), torch.as_tensor(value)
        if local.shape != value.shape:
            raise ValueError(f"its local model's {name} has the shape {tuple(local.shape)}, not {tuple(value.shape)}")
        if value.isfinite().all() and not local.isfinite().all():
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
            raise ValueError(f"the global model of round {meta['current_round']} is {what}")
        return learnable
