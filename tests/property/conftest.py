"""Settings of hypothesis: the same examples in every run, so that a failure comes back."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "d2_balance",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("d2_balance")
