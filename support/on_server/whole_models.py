"""Which models count? Filters refuse what would spoil the mean, let NVFlare add up in float64, and keep tensors' types.

Without them, NVFlare 2.9.0's FedAvg averages a tensor over the sites that sent it, and keeps the old values if none
did. It counts a number of steps that isn't positive as 1. And it saves a mean of the few sites that answered.
"""

import torch
from nvflare.apis.dxo import DXO, MetaKey, from_shareable
from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.abstract.model import ModelLearnable, ModelLearnableKey
from nvflare.app_common.abstract.persistor_filter import PersistorFilter
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType

from support.on_server.rounds import REFUSED, printable


class WholeLocalModels(Filter):
    """Refuse a local model that would spoil the global one. Hand on the others in float64.

    NVFlare 2.9.0 adds local models up in the order of arrival and in their own type. With three sites, two equal runs
    would differ in the last bits, and float16 would overflow. What the order changes in float64 is all but always gone
    when the mean is rounded to float32. The mean gets the types of the global model again.
    """

    def __init__(self):
        super().__init__()
        self.integers = {}  # {name: (the first site's, a mask of where all agree)}

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        if shareable.get_return_code() != ReturnCode.OK:
            return shareable
        model = from_shareable(shareable)
        wanted = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)[ModelLearnableKey.WEIGHTS]
        check_local_model(model, wanted, fl_ctx)
        self.compare_integers(model.data, wanted)
        model.data = {name: in_float64(value) for name, value in model.data.items()}
        model.update_shareable(shareable)
        # NVFlare 2.9.0 believes the name that a script puts into meta.
        shareable.set_header(MetaKey.SITE_NAME, fl_ctx.get_peer_context().get_identity_name())
        return shareable

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == AppEventType.ROUND_STARTED:
            self.integers = {}
        elif event_type == AppEventType.AFTER_AGGREGATION:
            means = fl_ctx.get_prop(AppConstants.AGGREGATION_RESULT).params
            weights = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)[ModelLearnableKey.WEIGHTS]
            for name in means:
                means[name] = self.in_type_of(weights[name], means[name], name)

    def compare_integers(self, weights: dict, wanted: dict) -> None:
        """Keep the integers and booleans on which all sites agree: float64 is exact only up to 2**53."""
        for name, value in wanted.items():
            if not torch.as_tensor(value).is_floating_point():
                local = torch.as_tensor(weights[name])
                first, same = self.integers.get(name, (local, torch.ones_like(local, dtype=torch.bool)))
                self.integers[name] = first, same & (first == local)

    def in_type_of(self, wanted, mean, name: str):
        """Return a mean in the type of a tensor or array: integers rounded, or as they were where all sites agree."""
        tensor, dtype = torch.as_tensor(mean), torch.as_tensor(wanted).dtype
        if dtype.is_floating_point or dtype.is_complex:
            tensor = tensor.to(dtype)
        else:
            first, same = self.integers[name]
            first = first.round() if first.is_floating_point() else first
            tensor = torch.where(same, first.to(dtype), tensor.round().to(dtype))
        return tensor if isinstance(wanted, torch.Tensor) else tensor.numpy()


class WholeSubmittedModels(Filter):
    """Refuse a submitted local model that other sites couldn't load, or the empty one of a site never drawn."""

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        if shareable.get_return_code() == ReturnCode.OK:
            model = from_shareable(shareable)
            if not model.data:
                return make_reply(ReturnCode.TASK_ABORTED)  # which Rounds doesn't note
            check_local_model(model, fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)[ModelLearnableKey.WEIGHTS], fl_ctx)
        return shareable


class WholeGlobalModels(PersistorFilter):
    """Refuse to save a global model of too few sites: the file keeps that of the round before, and the job ends."""

    def __init__(self, min_models: int):
        super().__init__()
        self.min_models = min_models

    def process_pre_save(self, learnable: ModelLearnable, fl_ctx: FLContext) -> ModelLearnable:
        models = learnable[ModelLearnableKey.META]["nr_aggregated"]
        if models < self.min_models:
            raise ValueError(f"the mean of {models} local models was not saved: a round needs {self.min_models}")
        return learnable


def check_local_model(model: DXO, wanted: dict, fl_ctx: FLContext) -> None:
    """Raise ValueError if a local model isn't whole, and tell Rounds why. NVFlare makes it a failed result."""
    try:
        check_weights(model.data, wanted)
        check_steps(model.meta.get(MetaKey.NUM_STEPS_CURRENT_ROUND))
    except ValueError as error:
        reason = printable(str(error))
        fl_ctx.set_prop(REFUSED, reason, private=True, sticky=False)
        raise ValueError(reason) from None


def check_weights(weights: dict, wanted: dict) -> None:
    """Raise ValueError if a local model, or its difference to the global one, can't be averaged with others."""
    if missing := [name for name in wanted if name not in weights]:
        for wrapper in ("module.", "_orig_mod."):
            if weights and all(str(name).startswith(wrapper) for name in weights):
                raise ValueError(f"its tensors' names begin with {wrapper!r}: send model.{wrapper}state_dict()")
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
        finite = local.isfinite() & local.to(value.dtype).isfinite()  # 1e300 isn't finite as float32
        if not (finite | ~value.isfinite()).all():  # a mask may hold infinity
            raise ValueError(f"its local model's {name} isn't finite: training diverged, try a smaller --lr")


def check_steps(steps: object) -> None:
    """Raise ValueError if FedAvg's weight of a site isn't a positive number. A missing number counts as one step."""
    number = isinstance(steps, (int, float)) and not isinstance(steps, bool)
    if steps is not None and not (number and 0 < steps < 2**53):
        raise ValueError(f"its NUM_STEPS_CURRENT_ROUND is {steps!r}: it must be above 0 (and below 2**53)")


def in_float64(value):
    """Return a tensor or an array in float64, or in complex128."""
    tensor = torch.as_tensor(value)
    wide = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
    return wide if isinstance(value, torch.Tensor) else wide.numpy()
