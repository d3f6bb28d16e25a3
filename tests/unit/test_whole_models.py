"""What the server refuses of a site's, and what it makes of that which it takes: the means are NVFlare's own."""

import itertools

import numpy as np
import pytest
import torch
from nvflare.apis.fl_constant import ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import make_reply
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_common.workflows.fedavg import FedAvg

from support.failure import why_lost
from support.on_server.rounds import REFUSED
from support.on_server.whole_models import WholeLocalModels, check_steps, check_weights

GLOBAL = {"weight": torch.ones(2, 2), "mask": torch.tensor([0.0, -torch.inf]), "count": torch.tensor(3)}


class Server:
    """NVFlare's FedAvg behind the filter, or without it."""

    def __init__(self, global_model, filtered=True):
        self.filter, self.filtered = WholeLocalModels(), filtered
        self.fl_ctx = FLContext()
        self.fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, make_model_learnable(global_model, {}))
        self.begin_round()

    def begin_round(self):
        self.controller = FedAvg()
        self.controller.fl_ctx, self.controller.current_round = self.fl_ctx, 0
        self.controller._aggr_helper = WeightedAggregationHelper()
        self.controller._aggr_metrics_helper = WeightedAggregationHelper()
        self.filter.handle_event(AppEventType.ROUND_STARTED, self.fl_ctx)

    def receive(self, params, site="site-2", **meta):
        """Take a local model as it arrives; tell whether FedAvg took it into its mean."""
        result, peer = FLModelUtils.to_shareable(FLModel(params=params, meta=meta)), FLContext()
        peer.set_prop(ReservedKey.IDENTITY_NAME, site)
        self.fl_ctx.set_peer_context(peer)
        if self.filtered:
            result = self.filter.process(result, self.fl_ctx)
        return self.controller._aggregate_one_result(FLModelUtils.from_shareable(result))

    def average(self):
        mean = self.controller._get_aggregated_result()
        self.fl_ctx.set_prop(AppConstants.AGGREGATION_RESULT, mean)
        if self.filtered:
            self.filter.handle_event(AppEventType.AFTER_AGGREGATION, self.fl_ctx)
        return mean.params


def mean_of(global_model, *local_models, filtered=True):
    """Return what a round makes of local models: [(weights, steps), ...]."""
    server = Server(global_model, filtered=filtered)
    for i, (weights, steps) in enumerate(local_models, start=1):
        assert server.receive(weights, f"site-{i}", NUM_STEPS_CURRENT_ROUND=steps)
    return server.average()


# ---- What is refused ----


def test_whole_local_model_is_taken():
    check_weights({name: value.numpy() for name, value in GLOBAL.items()}, GLOBAL)
    for steps in (None, 1, 2.5, 10**9):
        check_steps(steps)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"weight": None}, "^its local model lacks weight$"),
        ({"weight": torch.ones(4)}, r"^its local model's weight has the shape \(4,\), not \(2, 2\)$"),
        ({"weight": torch.tensor([[1, torch.nan], [1, 1]])}, "weight isn't finite: training diverged"),
        ({"weight": torch.full((2, 2), 1e300, dtype=torch.float64)}, "weight isn't finite: training diverged"),
        ({"count": torch.tensor(torch.nan)}, "count isn't finite: training diverged"),
        ({"mask": torch.tensor([-torch.inf, -torch.inf])}, "mask isn't finite: training diverged"),
        ({"weight": "ones"}, "weight is no tensor"),
        ({"extra": torch.ones(1)}, "has extra, which the global model doesn't have"),
    ],
)
def test_local_model_that_is_not_whole_is_refused(change, reason):
    weights = {name: value for name, value in {**GLOBAL, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=reason):
        check_weights(weights, GLOBAL)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod."])
def test_wrapper_that_was_left_around_a_model_is_named(wrapper):
    with pytest.raises(ValueError, match=rf"begin with '{wrapper}': send model\.{wrapper}state_dict\(\)"):
        check_weights({f"{wrapper}{name}": value for name, value in GLOBAL.items()}, GLOBAL)


def test_names_of_the_global_model_may_begin_with_anything():
    weights = {f"module.{name}": value for name, value in GLOBAL.items()}
    check_weights(weights, weights)


@pytest.mark.parametrize("steps", [0, -5, float("nan"), float("inf"), 1e308, 10**400, "many", True, [3]])
def test_number_of_steps_that_is_none_is_refused(steps):
    with pytest.raises(ValueError, match=r"it must be above 0 \(and below 2\*\*53\)$"):
        check_steps(steps)


@pytest.mark.parametrize(
    "change, meta, reason",
    [
        ({"weight": torch.ones(4)}, {}, "its local model's weight has the shape (4,), not (2, 2)"),
        ({"weight": torch.full((2, 2), torch.nan)}, {}, "its local model's weight isn't finite"),
        ({"weight": "ones"}, {}, "its local model's weight is no tensor"),
        ({"x\n\x1b[2J" * 1000: torch.ones(1)}, {}, "its local model has x"),
        (
            {},
            {"NUM_STEPS_CURRENT_ROUND": -1},
            "its NUM_STEPS_CURRENT_ROUND is -1: it must be above 0 (and below 2**53)",
        ),
    ],
)
def test_bad_model_is_refused_and_one_line_says_why_whatever_a_site_calls_its_tensors(change, meta, reason, tmp_path):
    server = Server(GLOBAL)
    with pytest.raises(ValueError) as refused:
        server.receive({**GLOBAL, **change}, **meta)
    line = server.fl_ctx.get_prop(REFUSED)
    assert line == str(refused.value)  # which NVFlare logs
    assert line.startswith(reason) and len(line) < 400 and line.isprintable()
    assert why_lost(tmp_path, "site-2", ["was left out", "round 1/2", line]) == line
    assert server.receive(GLOBAL, "site-1") and torch.equal(server.average()["weight"], GLOBAL["weight"])


def test_result_of_a_site_that_failed_is_left_to_nvflare():
    failed = make_reply(ReturnCode.EXECUTION_EXCEPTION)
    server = Server(GLOBAL)
    assert server.filter.process(failed, server.fl_ctx) is failed and server.fl_ctx.get_prop(REFUSED) is None


# ---- The mean ----


def test_five_models_in_all_their_orders_have_a_mean_of_the_same_bits():
    random = torch.Generator().manual_seed(0)
    models = [({"weight": torch.randn(10_000, generator=random)}, steps) for steps in (1, 3, 7, 11, 200)]
    orders = list(itertools.permutations(models))
    assert len(orders) == 120
    start = {"weight": torch.zeros(10_000)}
    means = [mean_of(start, *order)["weight"] for order in orders]
    assert means[0].dtype == torch.float32
    assert all(torch.equal(mean, means[0]) for mean in means)
    exact = sum(model["weight"].double() * steps for model, steps in models) / 222
    assert torch.equal(means[0], exact.float())
    plain = [mean_of(start, *order, filtered=False)["weight"] for order in orders]
    assert not all(torch.equal(mean, plain[0]) for mean in plain)  # so there is something to keep


@pytest.mark.parametrize("kind", [lambda tensor: tensor, torch.Tensor.numpy], ids=["tensors", "arrays"])
@pytest.mark.parametrize(
    "dtype, values, steps, mean",
    [
        (torch.float16, [[60.0]] * 6, [200] * 6, [60.0]),
        (torch.float16, [[60_000.0], [1.0]], [1, 1], [30_000.0]),
        (torch.int64, [[2**53 + 1, 2**63 - 1, -(2**63)]] * 3, [1, 7, 200], [2**53 + 1, 2**63 - 1, -(2**63)]),
        (torch.int64, [[2**53 + 1, 2], [2**53 + 1, 5]], [1, 2], [2**53 + 1, 4]),
        (torch.int64, [[3], [4]], [1, 3], [4]),
        (torch.int64, [[3], [4]], [3, 1], [3]),
        (torch.uint8, [[255], [255]], [200, 200], [255]),
        (torch.bool, [[True, False, True], [True, False, False]], [2, 1], [True, False, True]),
        (torch.float32, [[0.0, -torch.inf], [1.0, -torch.inf]], [1, 1], [0.5, -torch.inf]),
        (torch.float64, [[1e300], [1e-300]], [1, 1], [5e299]),
        (torch.complex64, [[1 + 2j], [3 + 4j]], [1, 1], [2 + 3j]),
    ],
)
def test_mean_has_the_type_of_the_global_model(dtype, values, steps, mean, kind):
    models = [({"it": kind(torch.tensor(value, dtype=dtype))}, n) for value, n in zip(values, steps)]
    (result,) = mean_of({"it": models[0][0]["it"]}, *models).values()
    assert isinstance(result, type(models[0][0]["it"]))
    assert torch.as_tensor(result).dtype == dtype and result.tolist() == mean


def test_without_the_filter_float16_overflows_and_large_integers_change():
    models = [({"sum": torch.tensor([60.0]).half(), "count": torch.tensor([2**63 - 1])}, 200)] * 6
    mean = mean_of(models[0][0], *models, filtered=False)
    assert mean["sum"].isinf() and mean["count"].tolist() != [2**63 - 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_local_model_of_another_type_leaves_the_global_models_type(dtype):
    local = {name: value.to(dtype) for name, value in GLOBAL.items()}
    mean = mean_of(GLOBAL, (local, 3), (GLOBAL, 1))
    assert {name: value.dtype for name, value in mean.items()} == {name: value.dtype for name, value in GLOBAL.items()}
    assert all(torch.equal(mean[name], GLOBAL[name]) for name in GLOBAL)


def test_fraction_that_all_sites_send_in_place_of_an_integer_is_rounded():
    local = {"count": torch.tensor([2.75, 4.25])}
    assert mean_of({"count": torch.tensor([1, 1])}, (local, 1), (local, 2))["count"].tolist() == [3, 4]


def test_integers_on_which_sites_agree_are_those_of_the_same_round():
    server = Server({"count": torch.tensor(2**53 + 1)})
    for count in (2**53 + 1, 2**53 + 3, 2**53 + 5):
        server.begin_round()
        for site in ("site-1", "site-2"):
            assert server.receive({"count": torch.tensor(count)}, site, NUM_STEPS_CURRENT_ROUND=3)
        assert server.average()["count"].item() == count


def test_empty_tensors_and_scalars_are_averaged():
    start = {"empty": torch.zeros(0), "nothing": torch.zeros(0, dtype=torch.int64), "scalar": np.float32(1)}
    mean = mean_of(start, (start, 1), ({**start, "scalar": np.float32(2)}, 3))
    assert mean["empty"].shape == mean["nothing"].shape == (0,) and mean["nothing"].dtype == torch.int64
    assert mean["scalar"].item() == 1.75 and mean["scalar"].dtype == np.float32


def test_local_models_are_left_as_they_were():
    local = {name: value.clone() for name, value in GLOBAL.items()}
    mean_of(GLOBAL, (local, 3), (local, 5))
    assert all(torch.equal(local[name], GLOBAL[name]) for name in GLOBAL)
