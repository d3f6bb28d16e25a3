"""NVFlare's three environments, each with what it needs to run well."""

from support.federation.environments import PocEnv as PocEnv
from support.federation.environments import ProdEnv as ProdEnv
from support.simulation import SimEnv as SimEnv
